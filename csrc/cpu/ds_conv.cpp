// Depthwise k x k + BN + activation + pointwise 1x1 + BN + activation, channels_last.
//
// A tile is `pixels` consecutive output pixels (flattened over n, oy, ox). Its depthwise rows go into a buffer [pixels][C]
// that stays in cache; the pointwise product is a register-blocked [pixels, C] x [C, K] over packed weights. Buffers are in
// the compute type (float, or double for double), rows padded to whole vectors (`padded`).
//
// Training keeps u (depthwise output) and z (pointwise output) and recomputes everything else. Reductions run over chunks of
// tiles whose number does not depend on the thread count and are added in order: results are bitwise the same on any number
// of threads.
#define SEGFAST_FILE "ds_conv.cpp"
#include "each_isa.h"
#include "fused_conv.h"

#ifndef SEGFAST_DS_CONV_TYPES
#define SEGFAST_DS_CONV_TYPES
namespace segfast {

// What the kernels of one call share. Pointers in the compute type A point to rows of padded length.
template <class T, class A>
struct DsConv {
  Geometry g;
  int64_t cp, kp, tile;         // padded channels in and out, pixels a tile
  const T *x, *u, *z, *grad_y;  // [N,H,W,C] [N,OH,OW,C] [N,OH,OW,K] [N,OH,OW,K]
  T *u_out, *z_out, *y, *grad_u, *grad_x;
  const A *dw, *dw_shift;            // [kh*kw][cp] (scaled at inference), [cp]
  const A* dw_flipped;               // [kh*kw][cp] for the input gradient
  const A *pw, *pw_shift;            // packed panels, [kp]
  const A* pw_back;                  // packed panels of the transposed weight
  const A *scale1, *shift1, *mean1;  // BN of the depthwise half as v = scale * u + shift
  const A *scale2, *shift2, *mean2;
  const A *center1, *slope1;  // grad_u = scale * (g - center - slope * (u - mean)): BN backward
  const A *center2, *slope2;
  const A* zeros;  // as long as the longest row: the shift of what has none
  int64_t act1, act2;
};

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// Gradient of the activation at pre-activation v, times g.
template <class A>
SEGFAST_INLINE Vec<A> activate_grad(Vec<A> v, Vec<A> g, int64_t act) {
  const Vec<A> zero{}, three = splat<A>(3), six = splat<A>(6);
  switch (act) {
    case kRelu:
      return v <= zero ? zero : g;
    case kRelu6:
      return v <= zero ? zero : (v >= six ? zero : g);
    case kSilu: {
      const Vec<A> s = 1 / (exp(-v) + 1);
      return g * s * (1 + v * (1 - s));
    }
    case kHardswish:
      return v < -three ? zero : (v <= three ? g * (v / three + (A)0.5) : g);
    default:
      return g;
  }
}

template <class A>
struct Add {
  A* to;
  int64_t ld, cols;
  SEGFAST_INLINE void soon(int64_t, int64_t) const {}
  SEGFAST_INLINE void operator()(int64_t i, int64_t col, Vec<A> v) const {
    store(to + i * ld + col, load(to + i * ld + col) + v);
  }
  SEGFAST_INLINE void part(int64_t i, int64_t col, Vec<A> v) const { (*this)(i, col, v); }
};

// put's matrix[r][c]: sum over pixels p of a[p * lda + r] * b[p * ldb + c]: the weight gradient of the pointwise half.
template <class A, class P>
SEGFAST_INLINE void product_transposed(int64_t pixels, const A* a, int64_t lda, int64_t rows, const A* b, int64_t ldb,
                                       const P& put) {
  constexpr int V = kVectors<A>, L = lanes<A>;
  int64_t col = 0;
  for (; col + V * L <= ldb; col += V * L) rows_of<V, A>(rows, pixels, a, 1, lda, b + col, ldb, col, put);
  for (; col < ldb; col += L) rows_of<1, A>(rows, pixels, a, 1, lda, b + col, ldb, col, put);
}

// Packs w (element (col, d) at w[col * col_step + d * d_step]) into panels, times scale[col] or scale_d.
template <class T, class A>
void pack(const T* w, int64_t cols, int64_t depth, int64_t col_step, int64_t d_step, const A* scale, A* out) {
  constexpr int V = kVectors<A>, L = lanes<A>;
  const int64_t padded = (cols + 15) / 16 * 16;  // as the launchers pad every row
  for (int64_t col = 0; col < padded;) {
    const int64_t width = padded - col >= V * L ? V * L : L;
    A* panel = out + col * depth;
    const int64_t inside = cols - col < width ? (cols > col ? cols - col : 0) : width;
    for (int64_t d = 0; d < depth; ++d) {
      const T* from = w + col * col_step + d * d_step;
      for (int64_t j = 0; j < width; ++j) {
        panel[d * width + j] = j < inside ? widen(from[j * col_step]) * (scale ? scale[col + j] : A(1)) : A(0);
      }
    }
    col += width;
  }
}

template <class T, class A, bool Clamp1, bool Clamp2>
SEGFAST_INLINE void ds_conv_tiles_of(const DsConv<T, A>& o, int64_t begin, int64_t end, A* buffer) {
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    const Put<A, A, Clamp1> middle{buffer, o.cp, o.g.c, o.dw_shift, o.act1};
    each_row(o.g, t0, t1, [&](int64_t n, int64_t oy, int64_t ox0, int64_t ox1, int64_t offset) {
      depthwise_row(o.g, o.x, o.dw, o.cp, n, oy, ox0, ox1, offset, middle);
    });
    product<A>(t1 - t0, o.g.c, buffer, o.cp, o.pw, o.kp, Put<T, A, Clamp2>{o.y + t0 * o.g.k, o.g.k, o.g.k, o.pw_shift, o.act2},
               DepthwiseAhead<T>(o.g, o.x, t1));
  }
}

template <class T, class A>
void ds_conv_tiles(const DsConv<T, A>& o, int64_t begin, int64_t end, A* buffer) {
  if (is_clamp(o.act1)) {
    if (is_clamp(o.act2)) return ds_conv_tiles_of<T, A, true, true>(o, begin, end, buffer);
    return ds_conv_tiles_of<T, A, true, false>(o, begin, end, buffer);
  }
  if (is_clamp(o.act2)) return ds_conv_tiles_of<T, A, false, true>(o, begin, end, buffer);
  return ds_conv_tiles_of<T, A, false, false>(o, begin, end, buffer);
}

// f(p, p % P) for p < count; the remainder is known at compile time, so that f may choose a register by it.
template <int P, class F>
SEGFAST_INLINE void each_of(int64_t count, F f) {
  int64_t p = 0;
  for (; p + P <= count; p += P) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) f(p + i, i);
  }
  for (; p < count; ++p) f(p, 0);
}

// Adds a tile [pixels][channels] of T to running moments in double: count-weighted mean and sum of squares about it. Two passes
// over the tile, which is in cache: about its own mean nothing cancels, and four sums each keep the rounding down.
template <class T, class A>
void add_moments(const T* x, int64_t pixels, int64_t channels, double before, double* mean, double* square) {
  constexpr int L = lanes<A>, P = 4;
  const double n = static_cast<double>(pixels), inverse = 1 / n, weight = n / (before + n);
  for (int64_t c0 = 0; c0 < channels; c0 += L) {
    const int left = static_cast<int>(channels - c0 < L ? channels - c0 : L);
    const Vec<A> shift = load_n(x + c0, left);
    Vec<A> first[P] = {}, sum[P] = {}, squares[P] = {};
    const T* from = x + c0;
    each_of<P>(pixels, [&](int64_t p, int i) { first[i] += load_n(from + p * channels, left) - shift; });
    const Vec<A> center = shift + (first[0] + first[1] + (first[2] + first[3])) * static_cast<A>(inverse);
    each_of<P>(pixels, [&](int64_t p, int i) {
      const Vec<A> d = load_n(from + p * channels, left) - center;
      sum[i] += d;
      squares[i] += d * d;
    });
    Vec<A> sums = sum[0] + sum[1] + (sum[2] + sum[3]), all = squares[0] + squares[1] + (squares[2] + squares[3]), at = center;
    for (int i = 0; i < left; ++i) {
      const double m = lane<A>(sums, i) * inverse, delta = lane<A>(at, i) + m - mean[c0 + i];
      square[c0 + i] += lane<A>(all, i) - m * m * n + delta * delta * before * weight;
      mean[c0 + i] += delta * weight;
    }
  }
}

// u = depthwise(x) + bias and its moments.
template <class T, class A>
void train_depthwise(const DsConv<T, A>& o, int64_t begin, int64_t end, double* moments) {
  double count = 0;
  each_row(o.g, begin, end, [&](int64_t n, int64_t oy, int64_t ox0, int64_t ox1, int64_t offset) {
    T* u = o.u_out + (begin + offset) * o.g.c;
    depthwise_row(o.g, o.x, o.dw, o.cp, n, oy, ox0, ox1, 0, Put<T, A>{u, o.g.c, o.g.c, o.dw_shift, kIdentity});
    if (moments) {
      add_moments<T, A>(u, ox1 - ox0, o.g.c, count, moments, moments + o.cp);
      count += static_cast<double>(ox1 - ox0);
    }
  });
}

// f(act): ReLU as a constant, which leaves no branch in the loop; the others as they come.
template <class F>
SEGFAST_INLINE void with_act(int64_t act, F f) {
  if (act == kRelu) return f(Int<kRelu>{});
  f(act);
}

// f(Int<vectors>, c0, left) over the channels: groups of vectors, whose loads make runs that the hardware prefetches and whose
// sums make chains that hide each other's latency, then single vectors with `left` lanes.
template <class A, class F>
SEGFAST_INLINE void each_group(int64_t c, F f) {
  constexpr int L = lanes<A>, G = SEGFAST_BYTES == 64 ? 4 : 2;
  int64_t c0 = 0;
  for (; c0 + G * L <= c; c0 += G * L) f(Int<G>{}, c0, L);
  for (; c0 < c; c0 += L) f(Int<1>{}, c0, static_cast<int>(c - c0 < L ? c - c0 : L));
}

// v[p][c] = act(scale * u + shift) of one tile
template <class T, class A>
SEGFAST_INLINE void normalise_tile(const T* u, int64_t pixels, int64_t c, int64_t cp, const A* scale, const A* shift, int64_t act,
                                   A* v) {
  constexpr int L = lanes<A>;
  with_act(act, [&](auto act) {
    for (int64_t p = 0; p < pixels; ++p) {
      int64_t c0 = 0;
      for (; c0 + L <= c; c0 += L)
        store(v + p * cp + c0, activate<A>(load(u + p * c + c0) * load(scale + c0) + load(shift + c0), act));
      if (c0 < c) {
        const Vec<A> at = load_n(u + p * c + c0, static_cast<int>(c - c0));
        store(v + p * cp + c0, activate<A>(at * load(scale + c0) + load(shift + c0), act));
      }
    }
  });
}

// z = pointwise(act(bn(u))) + bias and its moments.
template <class T, class A>
void train_pointwise(const DsConv<T, A>& o, int64_t begin, int64_t end, A* buffer, double* moments) {
  double count = 0;
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    normalise_tile(o.u + t0 * o.g.c, t1 - t0, o.g.c, o.cp, o.scale1, o.shift1, o.act1, buffer);
    T* z = o.z_out + t0 * o.g.k;
    product<A>(t1 - t0, o.g.c, buffer, o.cp, o.pw, o.kp, Put<T, A>{z, o.g.k, o.g.k, o.pw_shift, kIdentity},
               RowsAhead<T>{o.u + t1 * o.g.c, o.g.c});
    if (moments) {
      add_moments<T, A>(z, t1 - t0, o.g.k, count, moments, moments + o.kp);
      count += static_cast<double>(t1 - t0);
    }
  }
}

template <class T, class A>
void train_output(const DsConv<T, A>& o, int64_t begin, int64_t end) {
  constexpr int L = lanes<A>;
  const int64_t k = o.g.k;
  with_act(o.act2, [&](auto act) {
    for (int64_t p = begin; p < end; ++p) {
      int64_t c0 = 0;
      for (; c0 + L <= k; c0 += L) {
        store(o.y + p * k + c0, activate<A>(load(o.z + p * k + c0) * load(o.scale2 + c0) + load(o.shift2 + c0), act));
      }
      if (c0 < k) {
        const int left = static_cast<int>(k - c0);
        const Vec<A> v = load_n(o.z + p * k + c0, left) * load(o.scale2 + c0) + load(o.shift2 + c0);
        store_n(o.y + p * k + c0, activate<A>(v, act), left);
      }
    }
  });
}

// Adds, per channel, sum g and sum g * (x - mean) over the pixels, for g = g_of(p, channel, x, left); x: [pixels][c]. In blocks
// of a few pixels, whose sums are added in double: a gradient is what is left of such sums.
template <class T, class A, class G>
SEGFAST_INLINE void add_sums(const T* x, int64_t pixels, int64_t c, const A* mean, double* sums, int64_t stride, G g_of) {
  constexpr int L = lanes<A>, kBlock = 24;
  each_group<A>(c, [&](auto group, int64_t c0, int left) {
    constexpr int N = decltype(group)::value;
    for (int64_t p0 = 0; p0 < pixels; p0 += kBlock) {
      const int64_t p1 = p0 + kBlock < pixels ? p0 + kBlock : pixels;
      Vec<A> sum[N] = {}, product[N] = {};
      for (int64_t p = p0; p < p1; ++p) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
          prefetch(x + (p + 8) * c + c0 + j * L);
          const Vec<A> at = load_n(x + p * c + c0 + j * L, left), g = g_of(p, c0 + j * L, at, left);
          sum[j] += g;
          product[j] += g * (at - load(mean + c0 + j * L));
        }
      }
      for (int j = 0; j < N; ++j) {
        double* to = sums + c0 + j * L;
        for (int i = 0; i < left; ++i) {
          to[i] += lane<A>(sum[j], i);
          to[stride + i] += lane<A>(product[j], i);
        }
      }
    }
  });
}

// The sums of the second BatchNorm's backward: g = grad * act'(scale * z + shift).
template <class T, class A>
void backward_sums(const DsConv<T, A>& o, int64_t begin, int64_t end, double* sums) {
  const int64_t k = o.g.k;
  with_act(o.act2, [&](auto act) {
    for (int64_t t0 = begin; t0 < end; t0 += 64) {
      const T* grad = o.grad_y + t0 * k;
      add_sums<T, A>(
          o.z + t0 * k, t0 + 64 < end ? 64 : end - t0, k, o.mean2, sums, o.kp, [&](int64_t p, int64_t c0, Vec<A> z, int left) {
            return activate_grad<A>(z * load(o.scale2 + c0) + load(o.shift2 + c0), load_n(grad + p * k + c0, left), act);
          });
    }
  });
}

// Per tile: grad_z, then the gradients of the pointwise weight and of v, then g1 = grad_v * act'(bn(u)) and its sums.
template <class T, class A>
void backward_pointwise(const DsConv<T, A>& o, int64_t begin, int64_t end, A* buffer, A* grad_pw, double* sums) {
  constexpr int L = lanes<A>;
  const int64_t c = o.g.c, k = o.g.k;
  A* v = buffer;               // [tile][cp]
  A* gz = v + o.tile * o.cp;   // [tile][kp]
  A* gv = gz + o.tile * o.kp;  // [tile][cp]
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end, pixels = t1 - t0;
    normalise_tile(o.u + t0 * c, pixels, c, o.cp, o.scale1, o.shift1, o.act1, v);
    with_act(o.act2, [&](auto act) {
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c0 = 0; c0 < k; c0 += L) {
          const int left = static_cast<int>(k - c0 < L ? k - c0 : L);
          const Vec<A> z = load_n(o.z + (t0 + p) * k + c0, left), scale = load(o.scale2 + c0);
          const Vec<A> g = activate_grad<A>(z * scale + load(o.shift2 + c0), load_n(o.grad_y + (t0 + p) * k + c0, left), act);
          store(gz + p * o.kp + c0, scale * (g - load(o.center2 + c0) - load(o.slope2 + c0) * (z - load(o.mean2 + c0))));
        }
      }
    });
    product_transposed<A>(pixels, gz, o.kp, k, v, o.cp, Add<A>{grad_pw, o.cp, o.cp});
    product<A>(pixels, k, gz, o.kp, o.pw_back, o.cp, Put<A, A>{gv, o.cp, o.cp, o.zeros, kIdentity});
    with_act(o.act1, [&](auto act) {
      T* grad_u = o.grad_u + t0 * c;
      add_sums<T, A>(o.u + t0 * c, pixels, c, o.mean1, sums, o.cp, [&](int64_t p, int64_t c0, Vec<A> u, int left) {
        const Vec<A> g = activate_grad<A>(u * load(o.scale1 + c0) + load(o.shift1 + c0), load(gv + p * o.cp + c0), act);
        store_n(grad_u + p * c + c0, g, left);
        return g;
      });
    });
  }
}

// g1 -> grad_u of `count` pixels in place, and its products with a 3 x 3 window that moves S columns a pixel: the nine sums are
// added to grad_dw where `valid`. All columns lie inside; `rows` start at the first pixel's.
template <int S, class T, class A>
SEGFAST_NOINLINE void weight_run(const T* const* rows, const bool* valid, const T* u, T* gu, int64_t count, int64_t c,
                                 const A* scale, const A* mean, const A* center, const A* slope, A* grad_dw, int64_t cp) {
  const Vec<A> a = load(scale), m = load(mean), b = load(center), s = load(slope);
  Vec<A> acc[3][3] = {}, window[3][3];
  const T *row0 = rows[0], *row1 = rows[1], *row2 = rows[2];
#pragma GCC unroll 3
  for (int kx = 0; kx < 3 - S; ++kx) {
    window[0][kx] = load(row0 + kx * c), window[1][kx] = load(row1 + kx * c), window[2][kx] = load(row2 + kx * c);
  }
  row0 += (3 - S) * c, row1 += (3 - S) * c, row2 += (3 - S) * c;
  for (int64_t p = 0; p < count; ++p) {
    prefetch(gu + 8 * c), prefetch(u + 8 * c), prefetch(row2 + 8 * S * c);
    const Vec<A> v = a * (load(gu) - b - s * (load(u) - m));
    store(gu, v);
#pragma GCC unroll 3
    for (int kx = 3 - S; kx < 3; ++kx) {
      window[0][kx] = load(row0), window[1][kx] = load(row1), window[2][kx] = load(row2);
      row0 += c, row1 += c, row2 += c;
    }
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ++ky) {
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) acc[ky][kx] += v * window[ky][kx];
#pragma GCC unroll 3
      for (int kx = 0; kx < 3 - S; ++kx) window[ky][kx] = window[ky][kx + S];
    }
    gu += c, u += c;
  }
  for (int ky = 0; ky < 3; ++ky) {
    for (int kx = 0; kx < 3 && valid[ky]; ++kx) {
      A* out = grad_dw + (ky * 3 + kx) * cp;
      store(out, load(out) + acc[ky][kx]);
    }
  }
}

// g1 -> grad_u in place, and the gradient of the depthwise weight [kh * kw][cp].
template <class T, class A>
void backward_depthwise_weight(const DsConv<T, A>& o, int64_t begin, int64_t end, A* grad_dw) {
  constexpr int L = lanes<A>;
  const Geometry& g = o.g;
  const bool fast = g.kh == 3 && g.kw == 3 && g.dh == 1 && g.dw == 1 && g.sh == g.sw && (g.sw == 1 || g.sw == 2) && g.w >= 3;
  each_row(g, begin, end, [&](int64_t n, int64_t oy, int64_t ox0, int64_t ox1, int64_t offset) {
    T* gu = o.grad_u + (begin + offset) * g.c;
    const T* u = o.u + (begin + offset) * g.c;
    const T* image = o.x + n * g.h * g.w * g.c;
    const int64_t iy = oy * g.sh - g.ph;
    int64_t first = ox1, last = ox1;  // the pixels whose taps all lie inside, horizontally
    if (fast) {
      first = (g.pw + g.sw - 1) / g.sw;
      last = g.w - g.kw + g.pw < 0 ? 0 : (g.w - g.kw + g.pw) / g.sw + 1;
      first = first < ox0 ? ox0 : (first > ox1 ? ox1 : first);
      last = last < first ? first : (last > ox1 ? ox1 : last);
    }
    for (int64_t c0 = 0; c0 < g.c; c0 += L) {
      const int left = static_cast<int>(g.c - c0 < L ? g.c - c0 : L);
      const auto pixel = [&](int64_t ox) {
        T* at = gu + (ox - ox0) * g.c + c0;
        const Vec<A> d = load_n(u + (ox - ox0) * g.c + c0, left) - load(o.mean1 + c0);
        const Vec<A> v = load(o.scale1 + c0) * (load_n(at, left) - load(o.center1 + c0) - load(o.slope1 + c0) * d);
        store_n(at, v, left);
        for (int64_t ky = 0; ky < g.kh; ++ky) {
          const int64_t y = iy + ky * g.dh;
          for (int64_t kx = 0; kx < g.kw && y >= 0 && y < g.h; ++kx) {
            const int64_t xx = ox * g.sw - g.pw + kx * g.dw;
            if (xx < 0 || xx >= g.w) continue;
            A* out = grad_dw + (ky * g.kw + kx) * o.cp + c0;
            store(out, load(out) + v * load_n(image + (y * g.w + xx) * g.c + c0, left));
          }
        }
      };
      const bool run = left == L && last > first;
      for (int64_t ox = ox0; ox < (run ? first : ox1); ++ox) pixel(ox);
      if (!run) continue;
      const T* rows[3];
      bool valid[3];
      for (int ky = 0; ky < 3; ++ky) {  // a row outside reads another one, for nothing
        valid[ky] = iy + ky >= 0 && iy + ky < g.h;
        rows[ky] = image + ((valid[ky] ? iy + ky : 0) * g.w + first * g.sw - g.pw) * g.c + c0;
      }
      const int64_t at = (first - ox0) * g.c + c0;
      const auto weights = g.sw == 1 ? &weight_run<1, T, A> : &weight_run<2, T, A>;
      weights(rows, valid, u + at, gu + at, last - first, g.c, o.scale1 + c0, o.mean1 + c0, o.center1 + c0, o.slope1 + c0,
              grad_dw + c0, o.cp);
      for (int64_t ox = last; ox < ox1; ++ox) pixel(ox);
    }
  });
}

// The input gradient of a 3 x 3 kernel with stride 2 and padding 1: N pairs of pixels (2j, 2j + 1) of one row, from the gradient
// at j and j + 1 of one or two rows.
template <int N, class T, class A, class P>
SEGFAST_NOINLINE void input_pairs(int number, const T* const* rows, const A* const* weights, int64_t cp, int64_t c, int64_t pixel,
                                  const P put) {
  constexpr int L = lanes<A>;
  for (int64_t c0 = 0; c0 < c; c0 += L) {
    const int left = static_cast<int>(c - c0 < L ? c - c0 : L);
    Vec<A> even[N] = {}, odd[N] = {};
    for (int r = 0; r < number; ++r) {
      const T* from = rows[r] + c0;
      const A* w = weights[r] + c0;
      const Vec<A> w0 = load(w), w1 = load(w + cp), w2 = load(w + 2 * cp);
      Vec<A> g = load_n(from, left);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        prefetch(from + (N + j + 1) * c);
        const Vec<A> next = load_n(from + (j + 1) * c, left);
        even[j] += g * w1;
        odd[j] += g * w2 + next * w0;
        g = next;
      }
    }
    if (left == L) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) put(pixel + 2 * j, c0, even[j]), put(pixel + 2 * j + 1, c0, odd[j]);
    } else {
      for (int j = 0; j < N; ++j) put.part(pixel + 2 * j, c0, even[j]), put.part(pixel + 2 * j + 1, c0, odd[j]);
    }
  }
}

// grad_x: rows [begin, end) of N * H; gathered, so no two threads write one pixel.
template <class T, class A>
void backward_input(const DsConv<T, A>& o, int64_t begin, int64_t end) {
  const Geometry& g = o.g;
  const Put<T, A> put{o.grad_x, g.c, g.c, o.zeros, kIdentity};
  if (g.sh == 1 && g.sw == 1) {  // a depthwise convolution with the kernel turned round
    Geometry back = g;
    back.h = g.oh, back.w = g.ow, back.oh = g.h, back.ow = g.w;
    back.ph = g.dh * (g.kh - 1) - g.ph, back.pw = g.dw * (g.kw - 1) - g.pw;
    if (back.ph >= 0 && back.pw >= 0) {
      for (int64_t r = begin; r < end; ++r) {
        depthwise_row(back, static_cast<const T*>(o.grad_u), o.dw_flipped, o.cp, r / g.h, r % g.h, int64_t{0}, g.w, r * g.w, put);
      }
      return;
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.h, y = r % g.h;
    int64_t done = 0;
    if (g.kh == 3 && g.kw == 3 && g.sh == 2 && g.sw == 2 && g.ph == 1 && g.pw == 1 && g.dh == 1 && g.dw == 1) {
      const T* rows[2];
      const A* weights[2];
      int number = 0;
      for (int64_t ky = (y + 1) % 2; ky < 3; ky += 2) {
        const int64_t oy = (y + 1 - ky) / 2;
        if (oy >= g.oh) continue;
        rows[number] = o.grad_u + (n * g.oh + oy) * g.ow * g.c;
        weights[number++] = o.dw + ky * 3 * o.cp;
      }
      const int64_t pairs = g.w / 2 < g.ow - 1 ? g.w / 2 : g.ow - 1;
      const auto run = [&](auto size) {
        constexpr int N = decltype(size)::value;
        for (; done + 2 * N <= 2 * pairs; done += 2 * N) {
          input_pairs<N>(number, rows, weights, o.cp, g.c, r * g.w + done, put);
          for (int i = 0; i < number; ++i) rows[i] += N * g.c;
        }
      };
      run(Int<4>{});
      run(Int<1>{});
    }
    for (int64_t xx = done; xx < g.w; ++xx) {
      const T* from[64];
      const A* weight[64];
      int taps = 0;
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        const int64_t up = y + g.ph - ky * g.dh;
        if (up < 0 || up % g.sh || up / g.sh >= g.oh) continue;
        for (int64_t kx = 0; kx < g.kw; ++kx) {
          const int64_t along = xx + g.pw - kx * g.dw;
          if (along < 0 || along % g.sw || along / g.sw >= g.ow) continue;
          from[taps] = o.grad_u + ((n * g.oh + up / g.sh) * g.ow + along / g.sw) * g.c;
          weight[taps++] = o.dw + (ky * g.kw + kx) * o.cp;
        }
      }
      depthwise_pixel(taps, from, weight, r * g.w + xx, put);
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

namespace segfast {
namespace {

Counter counter("ds_conv"), train_counter("ds_conv_train"), backward_counter("ds_conv_backward");

using Optional = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using torch::headeronly::IntHeaderOnlyArrayRef;

// float32 and bfloat16 have the tuned sets; float64 and float16 the plain one, which keeps the build short.
#define DS_CONV_CALL(...)                                      \
  [&] {                                                        \
    if constexpr (sizeof(T) == 8 || std::is_same_v<T, Half>) { \
      return &::segfast::portable::__VA_ARGS__;                \
    } else {                                                   \
      return SEGFAST_CALL(__VA_ARGS__);                        \
    }                                                          \
  }()

constexpr int64_t kChunks = 32;  // of a reduction, at most

// A small parameter tensor of any float dtype, in double.
std::vector<double> read(const Optional& t, int64_t n, double missing) {
  std::vector<double> out(n, missing);
  if (!t) return out;
  const Tensor c = torch::stable::contiguous(*t);
  dispatch_float("ds_conv", c.scalar_type(), [&](auto zero) {
    const auto* p = data<decltype(zero)>(c);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(p[i]);
  });
  return out;
}

Geometry geometry(const Tensor& x, const Tensor& dw_weight, int64_t k, const Ints& stride, const Ints& padding,
                  const Ints& dilation) {
  Geometry g{x.size(0),         x.size(1), x.size(2), x.size(3),  k,          0,           0,          dw_weight.size(2),
             dw_weight.size(3), stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  g.oh = (g.h + 2 * g.ph - g.dh * (g.kh - 1) - 1) / g.sh + 1;
  g.ow = (g.w + 2 * g.pw - g.dw * (g.kw - 1) - 1) / g.sw + 1;
  STD_TORCH_CHECK(g.kh * g.kw <= 64 && g.oh >= 0 && g.ow >= 0,
                  "ds_conv: want a kernel of at most 64 taps that fits the padded input");
  return g;
}

// What segfast.ops.ds_conv says in its own words where this refuses.
void want_block(const Tensor& x, const Tensor& dw, const Tensor& pw, std::initializer_list<const Optional*> dw_vectors,
                std::initializer_list<const Optional*> pw_vectors, const Ints& stride, const Ints& padding,
                const Ints& dilation) {
  const auto want = [](bool holds) { STD_TORCH_CHECK(holds, "ds_conv: want tensors and options that fit one another"); };
  want(x.dim() == 4 && dw.dim() == 4 && pw.dim() == 4);
  const int64_t c = x.size(1), k = pw.size(0);
  want(dw.size(0) == c && dw.size(1) == 1 && pw.size(1) == c && pw.size(2) == 1 && pw.size(3) == 1);
  const ScalarType dtype = x.scalar_type();
  dispatch_float("ds_conv", dtype, [](auto) {});
  want(dw.scalar_type() == dtype && pw.scalar_type() == dtype && dw.is_cpu() && pw.is_cpu());
  for (const auto& [value, least] : {std::pair{&stride, 1}, {&padding, 0}, {&dilation, 1}}) {
    want(value->size() == 2 && (*value)[0] >= least && (*value)[1] >= least);
  }
  for (int i = 0; i < 2; ++i) {
    want(dw.size(2 + i) > 0 && x.size(2 + i) + 2 * padding[i] > dilation[i] * (dw.size(2 + i) - 1));
  }
  const ScalarType wide = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ? ScalarType::Float : dtype;
  const auto vectors = [&](std::initializer_list<const Optional*> list, int64_t n) {
    int place = 0;
    for (const Optional* v : list) {  // the bias of the convolution first: of x's dtype alone
      const bool bias = place++ == 0;
      if (!*v) continue;
      const Tensor& t = **v;
      want(t.is_cpu() && t.dim() == 1 && t.size(0) == n && (t.scalar_type() == dtype || (!bias && t.scalar_type() == wide)));
    }
  };
  vectors(dw_vectors, c);
  vectors(pw_vectors, k);
}

// BatchNorm as v = scale * u + shift, with mean and 1 / sqrt(var + eps) kept for the backward.
template <class A>
struct Fold {
  Buffer<A> scale, shift, mean;
  std::vector<double> gamma, inverse;
  Fold(const Optional& m, const Optional& var, const Optional& weight, const Optional& bias, double eps, int64_t c)
      : scale(padded(c)), shift(padded(c)), mean(padded(c)), gamma(read(weight, c, 1)), inverse(read(var, c, 1 - eps)) {
    const auto mu = read(m, c, 0), beta = read(bias, c, 0);
    for (int64_t i = 0; i < c; ++i) {
      inverse[i] = 1 / std::sqrt(inverse[i] + eps);
      scale.p[i] = static_cast<A>(gamma[i] * inverse[i]);
      shift.p[i] = static_cast<A>(beta[i] - mu[i] * gamma[i] * inverse[i]);
      mean.p[i] = static_cast<A>(mu[i]);
    }
  }
};

// Depthwise weight [C,1,kh,kw] -> [kh * kw][padded C], times scale.
template <class A>
Buffer<A> depthwise_weight(const Tensor& weight, const Geometry& g, const A* scale, bool flip = false) {
  const int64_t taps = g.kh * g.kw, cp = padded(g.c);
  Buffer<A> out(taps * cp);
  const auto w = read(weight, g.c * taps, 0);
  for (int64_t c = 0; c < g.c; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      out.p[(flip ? taps - 1 - t : t) * cp + c] = static_cast<A>(w[c * taps + t] * (scale ? static_cast<double>(scale[c]) : 1.0));
    }
  }
  return out;
}

// Reductions over `work` pixels go in chunks, each a multiple of `step`, at most kChunks of about 512 or more: their number does
// not depend on the threads.
struct Chunks {
  int64_t work, size, number;
  Chunks(int64_t pixels, int64_t step) : work(pixels) {
    const int64_t most = std::clamp<int64_t>(pixels / 512, 1, kChunks);
    size = std::max<int64_t>(1, (pixels + most * step - 1) / (most * step)) * step;
    number = (pixels + size - 1) / size;
  }
  // f(chunk, begin, end)
  template <class F>
  void each(F f) const {
    parallel_for(0, number, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f(i, i * size, std::min(work, (i + 1) * size));
    });
  }
};

template <class F>
void with_types(const Tensor& x, F f) {
  dispatch_float("ds_conv", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      f(T{}, double{});
    } else {
      f(T{}, float{});
    }
  });
}

Tensor ds_conv_cpu(const Tensor& input, const Tensor& dw_weight, Optional dw_bias, Optional dw_mean, Optional dw_var,
                   Optional dw_gamma, Optional dw_beta, double dw_eps, const Tensor& pw_weight, Optional pw_bias,
                   Optional pw_mean, Optional pw_var, Optional pw_gamma, Optional pw_beta, double pw_eps,
                   IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation, int64_t dw_act,
                   int64_t act) {
  const Ints strides(stride.begin(), stride.end()), paddings(padding.begin(), padding.end()),
      dilations(dilation.begin(), dilation.end());
  want_block(input, dw_weight, pw_weight, {&dw_bias, &dw_mean, &dw_var, &dw_gamma, &dw_beta},
             {&pw_bias, &pw_mean, &pw_var, &pw_gamma, &pw_beta}, strides, paddings, dilations);
  counter.add();
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, true);
  const Geometry g = geometry(x, dw_weight, pw_weight.size(0), strides, paddings, dilations);
  const Tensor y = empty({g.n, g.k, g.oh, g.ow}, x.scalar_type(), x, true);
  if (y.numel() > 0) {
    with_types(x, [&](auto t, auto a) {
      using T = decltype(t);
      using A = decltype(a);
      DsConv<T, A> o{};
      o.g = g, o.cp = padded(g.c), o.kp = padded(g.k);
      const Fold<A> first(dw_mean, dw_var, dw_gamma, dw_beta, dw_eps, g.c),
          second(pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, g.k);
      const auto bias1 = read(dw_bias, g.c, 0), bias2 = read(pw_bias, g.k, 0);
      for (int64_t i = 0; i < g.c; ++i) first.shift.p[i] += static_cast<A>(bias1[i]) * first.scale.p[i];
      for (int64_t i = 0; i < g.k; ++i) second.shift.p[i] += static_cast<A>(bias2[i]) * second.scale.p[i];
      const Buffer<A> dw = depthwise_weight<A>(dw_weight, g, first.scale.p), panels(o.kp * g.c, false);
      const Tensor w = torch::stable::contiguous(pw_weight);
      DS_CONV_CALL(pack<T, A>)(data<T>(w), g.k, g.c, g.c, 1, second.scale.p, panels.p);
      o.x = data<T>(x), o.y = data<T>(y), o.dw = dw.p, o.dw_shift = first.shift.p, o.pw = panels.p, o.pw_shift = second.shift.p;
      o.act1 = dw_act, o.act2 = act, o.tile = tile_pixels(o.cp * sizeof(A));
      const int64_t tiles = (g.pixels() + o.tile - 1) / o.tile;
      parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        const Buffer<A> scratch(o.tile * o.cp, false);
        DS_CONV_CALL(ds_conv_tiles<T, A>)(o, begin * o.tile, std::min(end * o.tile, g.pixels()), scratch.p);
      });
    });
  }
  return contiguous_as(y, channels_last);
}

// The chunks' moments combined in order: mean and biased variance.
void combine(const Buffer<double>& moments, const Chunks& chunks, int64_t c, int64_t cp, std::vector<double>& mean,
             std::vector<double>& var) {
  mean.assign(c, 0), var.assign(c, 0);
  double before = 0;
  for (int64_t chunk = 0; chunk < chunks.number; ++chunk) {
    const double n = static_cast<double>(std::min(chunks.size, chunks.work - chunk * chunks.size));
    const double* own = moments.p + chunk * 2 * cp;
    for (int64_t i = 0; i < c; ++i) {
      const double delta = own[i] - mean[i];
      var[i] += own[cp + i] + delta * delta * before * n / (before + n);
      mean[i] += delta * n / (before + n);
    }
    before += n;
  }
  for (auto& v : var) v /= before;
}

Tensor vector_tensor(const std::vector<double>& v, const Tensor& like, ScalarType dtype) {
  const Tensor t = empty({static_cast<int64_t>(v.size())}, dtype, like);
  dispatch_float("ds_conv", dtype, [&](auto zero) {
    using T = decltype(zero);
    for (size_t i = 0; i < v.size(); ++i) data<T>(t)[i] = static_cast<T>(v[i]);
  });
  return t;
}

ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// -> y, u, z, dw_mean, dw_var, pw_mean, pw_var. A mean and variance that are given are used as they are (frozen BatchNorm).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ds_conv_train_cpu(
    const Tensor& input, const Tensor& dw_weight, Optional dw_bias, Optional dw_mean, Optional dw_var, Optional dw_gamma,
    Optional dw_beta, double dw_eps, const Tensor& pw_weight, Optional pw_bias, Optional pw_mean, Optional pw_var,
    Optional pw_gamma, Optional pw_beta, double pw_eps, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
    IntHeaderOnlyArrayRef dilation, int64_t dw_act, int64_t act) {
  train_counter.add();
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, true);
  const Geometry g = geometry(x, dw_weight, pw_weight.size(0), Ints(stride.begin(), stride.end()),
                              Ints(padding.begin(), padding.end()), Ints(dilation.begin(), dilation.end()));
  const auto dtype = x.scalar_type(), statistics = statistics_dtype(x);
  const Tensor u = empty({g.n, g.c, g.oh, g.ow}, dtype, x, true), z = empty({g.n, g.k, g.oh, g.ow}, dtype, x, true);
  const Tensor y = empty({g.n, g.k, g.oh, g.ow}, dtype, x, true);
  const bool own1 = !dw_mean, own2 = !pw_mean;
  std::vector<double> mean1 = read(dw_mean, g.c, 0), var1 = read(dw_var, g.c, 0), mean2 = read(pw_mean, g.k, 0),
                      var2 = read(pw_var, g.k, 0);
  with_types(x, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    DsConv<T, A> o{};
    o.g = g, o.cp = padded(g.c), o.kp = padded(g.k), o.act1 = dw_act, o.act2 = act;
    o.tile = tile_pixels(o.cp * sizeof(A));
    o.x = data<T>(x), o.u = o.u_out = data<T>(u), o.z = o.z_out = data<T>(z), o.y = data<T>(y);
    const int64_t pixels = g.pixels();

    const Buffer<A> dw = depthwise_weight<A>(dw_weight, g, nullptr), bias1(o.cp), bias2(o.kp), panels(o.kp * g.c, false);
    const auto b1 = read(dw_bias, g.c, 0), b2 = read(pw_bias, g.k, 0);
    std::copy(b1.begin(), b1.end(), bias1.p), std::copy(b2.begin(), b2.end(), bias2.p);
    o.dw = dw.p, o.dw_shift = bias1.p;
    const Chunks by_rows(pixels, g.ow), by_blocks(pixels, 12);
    const Buffer<double> moments1(own1 ? by_rows.number * 2 * o.cp : 0);
    by_rows.each([&](int64_t chunk, int64_t begin, int64_t end) {
      DS_CONV_CALL(train_depthwise<T, A>)(o, begin, end, own1 ? moments1.p + chunk * 2 * o.cp : nullptr);
    });
    if (own1) combine(moments1, by_rows, g.c, o.cp, mean1, var1);

    const Fold<A> first(vector_tensor(mean1, x, ScalarType::Double), vector_tensor(var1, x, ScalarType::Double), dw_gamma,
                        dw_beta, dw_eps, g.c);
    const Tensor w = torch::stable::contiguous(pw_weight);
    DS_CONV_CALL(pack<T, A>)(data<T>(w), g.k, g.c, g.c, 1, static_cast<const A*>(nullptr), panels.p);
    o.scale1 = first.scale.p, o.shift1 = first.shift.p, o.pw = panels.p, o.pw_shift = bias2.p;
    const Buffer<double> moments2(own2 ? by_blocks.number * 2 * o.kp : 0);
    by_blocks.each([&](int64_t chunk, int64_t begin, int64_t end) {
      const Buffer<A> scratch(o.tile * o.cp, false);
      DS_CONV_CALL(train_pointwise<T, A>)(o, begin, end, scratch.p, own2 ? moments2.p + chunk * 2 * o.kp : nullptr);
    });
    if (own2) combine(moments2, by_blocks, g.k, o.kp, mean2, var2);

    const Fold<A> second(vector_tensor(mean2, x, ScalarType::Double), vector_tensor(var2, x, ScalarType::Double), pw_gamma,
                         pw_beta, pw_eps, g.k);
    o.scale2 = second.scale.p, o.shift2 = second.shift.p;
    parallel_for(0, pixels, 256, [&](int64_t begin, int64_t end) { DS_CONV_CALL(train_output<T, A>)(o, begin, end); });
  });
  return {contiguous_as(y, channels_last),
          u,
          z,
          vector_tensor(mean1, x, statistics),
          vector_tensor(var1, x, statistics),
          vector_tensor(mean2, x, statistics),
          vector_tensor(var2, x, statistics)};
}

// The sums of partials [chunk][2][cp], in order, as the BatchNorm backward wants them.
template <class A>
struct NormGradients {
  std::vector<double> beta, gamma, bias;
  Buffer<A> center, slope;
  NormGradients(const Buffer<double>& sums, int64_t chunks, const Fold<A>& fold, int64_t c, int64_t cp, double count,
                bool batch_statistics)
      : beta(c), gamma(c), bias(c), center(cp), slope(cp) {
    for (int64_t i = 0; i < c; ++i) {
      double product = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        beta[i] += sums.p[chunk * 2 * cp + i];
        product += sums.p[chunk * 2 * cp + cp + i];
      }
      const double inverse = fold.inverse[i];
      gamma[i] = product * inverse;
      bias[i] = batch_statistics ? 0 : beta[i] * fold.gamma[i] * inverse;
      if (batch_statistics) {
        center.p[i] = static_cast<A>(beta[i] / count);
        slope.p[i] = static_cast<A>(product * inverse * inverse / count);
      }
    }
  }
};

// -> the gradients of x, dw_weight, dw_bias, dw_gamma, dw_beta, pw_weight, pw_bias, pw_gamma, pw_beta.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ds_conv_backward_cpu(
    const Tensor& grad, const Tensor& input, const Tensor& u, const Tensor& z, const Tensor& dw_weight, const Tensor& dw_mean,
    const Tensor& dw_var, Optional dw_gamma, Optional dw_beta, double dw_eps, bool dw_batch, const Tensor& pw_weight,
    const Tensor& pw_mean, const Tensor& pw_var, Optional pw_gamma, Optional pw_beta, double pw_eps, bool pw_batch,
    IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation, int64_t dw_act, int64_t act,
    bool need_input) {
  backward_counter.add();
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, true), gy = contiguous_as(grad, true);
  const Geometry g = geometry(x, dw_weight, pw_weight.size(0), Ints(stride.begin(), stride.end()),
                              Ints(padding.begin(), padding.end()), Ints(dilation.begin(), dilation.end()));
  const auto dtype = x.scalar_type(), statistics = statistics_dtype(x);
  const Tensor grad_x = empty({need_input ? g.n : 0, g.c, g.h, g.w}, dtype, x, true),
               grad_u = empty({g.n, g.c, g.oh, g.ow}, dtype, x, true);
  const Tensor grad_dw = empty({g.c, 1, g.kh, g.kw}, dtype, x), grad_pw = empty({g.k, g.c, 1, 1}, dtype, x);
  std::vector<double> dw_g[3], pw_g[3];
  with_types(x, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    DsConv<T, A> o{};
    o.g = g, o.cp = padded(g.c), o.kp = padded(g.k), o.act1 = dw_act, o.act2 = act;
    o.tile =
        tile_pixels((2 * o.cp + o.kp) * sizeof(A), 196608, 192);  // deep, for the weight gradient: the sum over a tile's pixels
    o.x = data<T>(x), o.u = data<T>(u), o.z = data<T>(z), o.grad_y = data<T>(gy), o.grad_u = data<T>(grad_u);
    o.grad_x = need_input ? data<T>(grad_x) : nullptr;
    const Buffer<A> zeros(o.cp);
    o.zeros = zeros.p;
    const int64_t pixels = g.pixels(), taps = g.kh * g.kw;
    const double count = static_cast<double>(pixels);
    const Fold<A> first(dw_mean, dw_var, dw_gamma, dw_beta, dw_eps, g.c), second(pw_mean, pw_var, pw_gamma, pw_beta, pw_eps, g.k);
    o.scale1 = first.scale.p, o.shift1 = first.shift.p, o.mean1 = first.mean.p;
    o.scale2 = second.scale.p, o.shift2 = second.shift.p, o.mean2 = second.mean.p;

    const Chunks by_rows(pixels, g.ow), by_blocks(pixels, 12);
    const Buffer<double> sums2(by_blocks.number * 2 * o.kp);
    by_blocks.each([&](int64_t chunk, int64_t begin, int64_t end) {
      DS_CONV_CALL(backward_sums<T, A>)(o, begin, end, sums2.p + chunk * 2 * o.kp);
    });
    const NormGradients<A> norm2(sums2, by_blocks.number, second, g.k, o.kp, count, pw_batch);
    o.center2 = norm2.center.p, o.slope2 = norm2.slope.p;

    const Tensor w = torch::stable::contiguous(pw_weight);
    const Buffer<A> panels(o.cp * g.k, false), partial_pw(by_blocks.number * g.k * o.cp, false);
    DS_CONV_CALL(pack<T, A>)(data<T>(w), g.c, g.k, 1, g.c, static_cast<const A*>(nullptr), panels.p);
    o.pw_back = panels.p;
    const Buffer<double> sums1(by_blocks.number * 2 * o.cp);
    by_blocks.each([&](int64_t chunk, int64_t begin, int64_t end) {
      const Buffer<A> scratch(o.tile * (2 * o.cp + o.kp), false);
      A* partial = partial_pw.p + chunk * g.k * o.cp;
      std::fill(partial, partial + g.k * o.cp, A(0));
      DS_CONV_CALL(backward_pointwise<T, A>)(o, begin, end, scratch.p, partial, sums1.p + chunk * 2 * o.cp);
    });
    parallel_for(0, g.k, 8, [&](int64_t begin, int64_t end) {
      std::vector<double> total(g.c);
      for (int64_t k = begin; k < end; ++k) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t chunk = 0; chunk < by_blocks.number; ++chunk) {
          const A* from = partial_pw.p + (chunk * g.k + k) * o.cp;
          for (int64_t c = 0; c < g.c; ++c) total[c] += from[c];
        }
        for (int64_t c = 0; c < g.c; ++c) data<T>(grad_pw)[k * g.c + c] = static_cast<T>(total[c]);
      }
    });
    const NormGradients<A> norm1(sums1, by_blocks.number, first, g.c, o.cp, count, dw_batch);
    o.center1 = norm1.center.p, o.slope1 = norm1.slope.p;

    const Buffer<A> partial_dw(by_rows.number * taps * o.cp);
    by_rows.each([&](int64_t chunk, int64_t begin, int64_t end) {
      DS_CONV_CALL(backward_depthwise_weight<T, A>)(o, begin, end, partial_dw.p + chunk * taps * o.cp);
    });
    for (int64_t c = 0; c < g.c; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        double total = 0;
        for (int64_t chunk = 0; chunk < by_rows.number; ++chunk) total += partial_dw.p[(chunk * taps + tap) * o.cp + c];
        data<T>(grad_dw)[c * taps + tap] = static_cast<T>(total);
      }
    }
    if (need_input) {
      const Buffer<A> dw = depthwise_weight<A>(dw_weight, g, nullptr), flipped = depthwise_weight<A>(dw_weight, g, nullptr, true);
      o.dw = dw.p, o.dw_flipped = flipped.p;
      parallel_for(0, g.n * g.h, 1, [&](int64_t begin, int64_t end) { DS_CONV_CALL(backward_input<T, A>)(o, begin, end); });
    }
    dw_g[0] = norm1.bias, dw_g[1] = norm1.gamma, dw_g[2] = norm1.beta;
    pw_g[0] = norm2.bias, pw_g[1] = norm2.gamma, pw_g[2] = norm2.beta;
  });
  return {need_input ? contiguous_as(grad_x, channels_last) : grad_x,
          grad_dw,
          vector_tensor(dw_g[0], x, dtype),
          vector_tensor(dw_g[1], x, statistics),
          vector_tensor(dw_g[2], x, statistics),
          grad_pw,
          vector_tensor(pw_g[0], x, dtype),
          vector_tensor(pw_g[1], x, statistics),
          vector_tensor(pw_g[2], x, statistics)};
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("ds_conv", TORCH_BOX(&segfast::ds_conv_cpu));
  m.impl("ds_conv_train", TORCH_BOX(&segfast::ds_conv_train_cpu));
  m.impl("ds_conv_backward", TORCH_BOX(&segfast::ds_conv_backward_cpu));
}
#endif
