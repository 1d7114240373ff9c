// What the pair-wise operators share; included once per instruction set, inside SEGFAST_KERNELS, after vec.h.
//
// Everything is fp64: near the teacher the Gram form cancels nine digits. A panel is eight channels (or nodes) of every
// sample, interleaved: panel[sample][8]. Two register-blocked products run over panels:
//   gram:  out[i][j] = sum_s a[s][i] b[s][j]                  (channels x channels, or nodes x nodes)
//   mix:   out[r][c] = sum_k z[k / 8][r][k % 8] w[k][c]       (the gradient of the normalised features)
// Each result is summed in one fixed order, so neither threads nor scheduling change a bit.
#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

constexpr int kVectors = 8 / lanes<double>;
constexpr int kRows = lanes<double> == 8 ? 8 : (lanes<double> == 4 ? 4 : 2);  // rows x vectors held in registers
constexpr int kHeld = lanes<double> == 8 ? 3 : 1;                             // panels held in registers

template <int P>
SEGFAST_INLINE void gram_held(const double* a, const double* b, int64_t b_stride, int64_t count, double* out) {
  for (int row = 0; row < 8; row += kRows) {
    Vec<double> sum[kRows][P * kVectors] = {};
    for (int64_t s = 0; s < count; ++s) {
      Vec<double> right[P * kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < P * kVectors; ++v) {
        right[v] = load(b + (v / kVectors) * b_stride + s * 8 + (v % kVectors) * lanes<double>);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<double> left = splat<double>(a[s * 8 + row + r]);
#pragma GCC unroll 8
        for (int v = 0; v < P * kVectors; ++v) sum[r][v] += left * right[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < P * kVectors; ++v) {
        double* to = out + (v / kVectors) * 64 + (row + r) * 8 + (v % kVectors) * lanes<double>;
        store(to, load(to) + sum[r][v]);
      }
    }
  }
}

// out[p][i][j] += sum_s a[s][i] b_p[s][j] for `panels` (at most 3) neighbours b_p.
inline void gram_tile(const double* a, const double* b, int64_t b_stride, int64_t count, int panels, double* out) {
  if constexpr (kHeld == 3) {
    if (panels == 3) return gram_held<3>(a, b, b_stride, count, out);
    if (panels == 2) return gram_held<2>(a, b, b_stride, count, out);
    return gram_held<1>(a, b, b_stride, count, out);
  } else {
    for (int p = 0; p < panels; ++p) gram_held<1>(a, b + p * b_stride, b_stride, count, out + p * 64);
  }
}

template <int P>
SEGFAST_INLINE void mix_held(const double* z, int64_t z_stride, const double* w, int64_t k_panels, double* out,
                             int64_t out_stride) {
  for (int row = 0; row < 8; row += kRows) {
    Vec<double> sum[kRows][P * kVectors] = {};
    for (int64_t k = 0; k < k_panels; ++k) {
      const double* left = z + k * z_stride + row * 8;
      const double* right = w + k * 64;
      for (int i = 0; i < 8; ++i) {
        Vec<double> held[P * kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < P * kVectors; ++v) {
          held[v] = load(right + (v / kVectors) * k_panels * 64 + i * 8 + (v % kVectors) * lanes<double>);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec<double> factor = splat<double>(left[r * 8 + i]);
#pragma GCC unroll 8
          for (int v = 0; v < P * kVectors; ++v) sum[r][v] += factor * held[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < P * kVectors; ++v) {
        store(out + (v / kVectors) * out_stride + (row + r) * 8 + (v % kVectors) * lanes<double>, sum[r][v]);
      }
    }
  }
}

// out[c][row] for `rows` (a multiple of 8) rows of z[k_panels][..][8] and `c_panels` panels w[c_panels][8 k_panels][8].
inline void mix(const double* z, int64_t z_stride, const double* w, int64_t k_panels, int64_t c_panels, int64_t rows, double* out,
                int64_t out_stride) {
  for (int64_t c = 0; c < c_panels;) {
    const int64_t left = c_panels - c;
    const double* panel = w + c * k_panels * 64;
    for (int64_t row = 0; row < rows; row += 8) {
      double* to = out + c * out_stride + row * 8;
      if (kHeld == 3 && left >= 3) {
        mix_held<kHeld>(z + row * 8, z_stride, panel, k_panels, to, out_stride);
      } else {
        mix_held<1>(z + row * 8, z_stride, panel, k_panels, to, out_stride);
      }
    }
    c += kHeld == 3 && left >= 3 ? 3 : 1;
  }
}

// The norms of nodes [0, count) of x[c * stride_c + m * stride_m], and their inverses 1 / (norm + eps); a zero vector's is 0.
template <class T>
void norms(const T* x, int64_t channels, int64_t stride_c, int64_t stride_m, int64_t count, double eps, double* norm,
           double* inverse) {
  for (int64_t m = 0; m < count; ++m) norm[m] = 0;
  if (stride_m == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* row = x + c * stride_c;
      for (int64_t m = 0; m < count; ++m) norm[m] += static_cast<double>(widen(row[m])) * widen(row[m]);
    }
  } else {
    for (int64_t m = 0; m < count; ++m) {
      double total[8] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const double value = widen(x[c * stride_c + m * stride_m]);
        total[c % 8] += value * value;
      }
      for (int i = 0; i < 8; ++i) norm[m] += total[i];
    }
  }
  for (int64_t m = 0; m < count; ++m) {
    norm[m] = __builtin_sqrt(norm[m]);
    inverse[m] = norm[m] == 0 ? 0 : 1 / (norm[m] + eps);
  }
}

// Normalised features as channel panels: panel[c / 8][m][c % 8], zeros in channels and in nodes [count, padded) that are not.
template <class T>
void pack_channels(const T* x, int64_t channels, int64_t stride_c, int64_t stride_m, int64_t count, int64_t padded,
                   const double* inverse, double* panels, int64_t panel_stride) {
  for (int64_t c = 0; c < channels; c += 8) {
    double* to = panels + c / 8 * panel_stride;
    const T* from = x + c * stride_c;
    const int here = channels - c < 8 ? static_cast<int>(channels - c) : 8;
    for (int64_t m = 0; m < count; ++m) {
      if (here == 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) to[m * 8 + i] = widen(from[i * stride_c + m * stride_m]) * inverse[m];
      } else {
        for (int i = 0; i < 8; ++i) to[m * 8 + i] = i < here ? widen(from[i * stride_c + m * stride_m]) * inverse[m] : 0;
      }
    }
    for (int64_t m = count * 8; m < padded * 8; ++m) to[m] = 0;
  }
}

// The same as node panel: panel[c][m] for at most 8 nodes.
template <class T>
void pack_nodes(const T* x, int64_t channels, int64_t stride_c, int64_t stride_m, int64_t count, const double* inverse,
                double* panel) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int m = 0; m < 8; ++m) panel[c * 8 + m] = m < count ? widen(x[c * stride_c + m * stride_m]) * inverse[m] : 0;
  }
}

// From the gradient of the normalised features (channel panels) to that of the features:
//   grad_x = g / (norm + eps) - y (y . g) / norm    (the second term is the norm's own gradient), zero for a zero vector.
// `out` is x's own layout: out[c * stride_c + m * stride_m].
template <class T>
void unpack_gradient(const double* y, int64_t y_stride, const double* g, int64_t g_stride, int64_t channels, int64_t count,
                     const double* norm, const double* inverse, double scale, bool detach_norm, T* out, int64_t stride_c,
                     int64_t stride_m) {
  for (int64_t m = 0; m < count; ++m) {
    Vec<double> dots[kVectors] = {};
    if (!detach_norm && norm[m] != 0) {
      for (int64_t c = 0; c < channels; c += 8) {
        const double* left = y + c / 8 * y_stride + m * 8;
        const double* right = g + c / 8 * g_stride + m * 8;
        for (int v = 0; v < kVectors; ++v) dots[v] += load(left + v * lanes<double>) * load(right + v * lanes<double>);
      }
    }
    double along = 0;
    for (int v = 0; v < kVectors; ++v) along += sum_lanes<double>(dots[v]);
    const double factor = scale * inverse[m];
    const double radial = detach_norm || norm[m] == 0 ? 0 : scale * along / norm[m];
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = m * 8 + c % 8;
      const double value = norm[m] == 0 ? 0 : g[c / 8 * g_stride + at] * factor - y[c / 8 * y_stride + at] * radial;
      out[c * stride_c + m * stride_m] = static_cast<T>(static_cast<compute<T>>(value));
    }
  }
}

// One block of nodes: norms, then panels.
template <class T>
void pack_block(const T* x, int64_t channels, int64_t stride_c, int64_t stride_m, int64_t count, int64_t padded, double eps,
                double* panels, int64_t panel_stride, double* norm, double* inverse) {
  norms(x, channels, stride_c, stride_m, count, eps, norm, inverse);
  pack_channels(x, channels, stride_c, stride_m, count, padded, inverse, panels, panel_stride);
}

}  // namespace segfast::SEGFAST_ISA
#else

#include <algorithm>
#include <new>
#include <vector>

namespace segfast {
namespace {

constexpr int64_t kNodes = 64;  // nodes that are packed, and given their gradient, together

// Uninitialised doubles on a cache line's boundary.
class Scratch {
 public:
  explicit Scratch(int64_t size) : p_(static_cast<double*>(::operator new(size * sizeof(double) + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(p_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  double* get() const { return p_; }

 private:
  double* p_;
};

// A tile of a symmetric product of panels: rows of panel i, columns of panels j .. j + count - 1, all of them j >= i.
struct Tile {
  int64_t i, j;
  int count;
};

inline std::vector<Tile> upper_tiles(int64_t panels) {
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < panels; ++i) {
    for (int64_t j = i; j < panels; j += 3) tiles.push_back({i, j, static_cast<int>(std::min<int64_t>(3, panels - j))});
  }
  return tiles;
}

// (N, C, M) of any float dtype and any strides.
struct Features {
  Tensor x;
  int64_t images, channels, nodes, stride_n, stride_c, stride_m;

  explicit Features(const Tensor& t)
      : x(t),
        images(t.size(0)),
        channels(t.size(1)),
        nodes(t.size(2)),
        stride_n(t.stride(0)),
        stride_c(t.stride(1)),
        stride_m(t.stride(2)) {}

  int64_t panels() const { return (channels + 7) / 8; }

  // Nodes [begin, begin + count) of an image as channel panels, with zeros up to `padded` nodes.
  void pack(int64_t image, int64_t begin, int64_t count, int64_t padded, double eps, double* panels, int64_t panel_stride,
            double* norm, double* inverse) const {
    dispatch_float("pairwise", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const T* from = data<T>(x) + image * stride_n + begin * stride_m;
      SEGFAST_CALL(pack_block<T>)
      (from, channels, stride_c, stride_m, count, padded, eps, panels, panel_stride, norm, inverse);
    });
  }

  // At most eight nodes as a node panel of all channels.
  void pack_nodes(int64_t image, int64_t begin, double eps, double* panel) const {
    dispatch_float("pairwise", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const T* from = data<T>(x) + image * stride_n + begin * stride_m;
      const int64_t count = std::min<int64_t>(8, nodes - begin);
      double norm[8], inverse[8];
      SEGFAST_CALL(norms<T>)(from, channels, stride_c, stride_m, count, eps, norm, inverse);
      SEGFAST_CALL(pack_nodes<T>)(from, channels, stride_c, stride_m, count, inverse, panel);
    });
  }

  // The gradient of x has x's layout if that is (N, M, C) in memory, else it is contiguous.
  bool nodes_first() const { return !x.is_contiguous() && torch::stable::transpose(x, 1, 2).is_contiguous(); }

  Tensor empty_gradient() const {
    if (nodes_first()) return torch::stable::transpose(empty({images, nodes, channels}, x.scalar_type(), x), 1, 2);
    return empty({images, channels, nodes}, x.scalar_type(), x);
  }

  void unpack(const Tensor& gradient, int64_t image, int64_t begin, int64_t count, const double* y, int64_t y_stride,
              const double* g, int64_t g_stride, const double* norm, const double* inverse, double scale,
              bool detach_norm) const {
    dispatch_float("pairwise", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      T* to = data<T>(gradient) + image * gradient.stride(0) + begin * gradient.stride(2);
      SEGFAST_CALL(unpack_gradient<T>)
      (y, y_stride, g, g_stride, channels, count, norm, inverse, scale, detach_norm, to, gradient.stride(1), gradient.stride(2));
    });
  }
};

}  // namespace
}  // namespace segfast
#endif
