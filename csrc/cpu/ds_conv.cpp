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

// Elements from a row of a tile to the next where its columns are read: a power of two would put all of a column in a few sets of
// the cache.
inline int64_t tile_row(int64_t padded) { return padded + 16; }

// The mean of `before` values and the sum of their squares about it become those of `n` more values too.
inline void merge_moments(double before, double n, double own_mean, double own_squares, double& mean, double& squares) {
  const double delta = own_mean - mean;
  squares += own_squares + delta * delta * before * n / (before + n);
  mean += delta * n / (before + n);
}

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
  bool past_u, past_x, past_g;  // u, grad_x and g1 are written past the caches

  // Rows of output pixels before its last one that a row of grad_x is gathered from; a few of them are kept, each of so many
  // elements.
  int64_t reach() const { return (g.kh - 1) * g.dh / g.sh; }
  bool ringed() const { return reach() <= 4; }
  int64_t ring_row() const { return (g.ow + 2 * (g.kw - 1)) * g.c; }
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

// put's matrix[r][c]: sum over pixels p of a[p * lda + r] * b[p * ldb + c], for `cols` columns, whole vectors: the weight
// gradient of the pointwise half.
template <class A, class P, class F>
SEGFAST_INLINE void product_transposed(int64_t pixels, const A* a, int64_t lda, int64_t rows, const A* b, int64_t ldb,
                                       int64_t cols, const P& put, const F& ahead) {
  constexpr int V = kVectors<A>, L = lanes<A>;
  const int64_t count = (cols + V * L - 1) / (V * L);
  int64_t col = 0;
  for (; col + V * L <= cols; col += V * L) {
    rows_of<V, A>(rows, pixels, a, 1, lda, b + col, ldb, col, put, ahead, col / (V * L), count);
  }
  for (; col < cols; col += L) rows_of<1, A>(rows, pixels, a, 1, lda, b + col, ldb, col, put, ahead, col / (V * L), count);
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
    int64_t packed = 0;  // of the depth, in blocks of vectors
    if constexpr (std::is_same_v<A, float>) {
      for (; d_step == 1 && inside == width && packed + L <= depth; packed += L) {
        for (int64_t j = 0; j < width; j += L) {
          Vec<A> block[L];
          for (int i = 0; i < L; ++i) block[i] = load(w + (col + j + i) * col_step + packed);
          transpose<A>(block);
          const Vec<A> factor = scale ? load(scale + col + j) : splat<A>(1);
          for (int i = 0; i < L; ++i) store(panel + (packed + i) * width + j, block[i] * factor);
        }
      }
    }
    for (int64_t d = packed; d < depth; ++d) {
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

// Rows to memory, and their moments: their sums, and the sums of their squares about `center`, the mean of the first block. A
// block adds what it sums about its own mean; nothing cancels but in what blocks differ by, and that by no more than their
// number.
template <class T, class A>
struct PutMoments : Put<T, A> {
  static constexpr bool once = true;
  bool past;
  A *center, *square;  // [cols], padded to vectors; row 0 sets them
  double* sum;
  PutMoments(T* to, int64_t ld, const A* shift, bool past, double* scratch, int64_t padded)
      : Put<T, A>{to, ld, ld, shift, kIdentity},
        past(past),
        center(reinterpret_cast<A*>(scratch)),
        square(reinterpret_cast<A*>(scratch + padded)),
        sum(scratch + 2 * padded) {}
  template <int N>
  SEGFAST_INLINE void block(int64_t first, int64_t col, const Vec<A> (&v)[N]) const {
    const int left = static_cast<int>(this->cols - col < lanes<A> ? this->cols - col : lanes<A>);
    if (left <= 0) return;
    Vec<A> stored[N], total{}, rest{}, squares{};
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      T* to = this->to + (first + i) * this->ld + col;
      stored[i] = v[i] + load(this->shift + col);
      if (!past) prefetch_to(to + 2 * N * this->ld);
      store_past(to, stored[i], left, past);
      if constexpr (!std::is_same_v<T, A>) stored[i] = load_n(to, left);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) total += stored[i];
    const Vec<A> mean = total * (A(1) / N);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Vec<A> off = stored[i] - mean;
      rest += off;  // what rounding took from the mean
      squares += off * off;
    }
    if (first == 0) {
      store(center + col, mean), store(square + col, Vec<A>{});
      for (int i = 0; i < lanes<A>; ++i) sum[col + i] = 0;
    }
    const Vec<A> off = mean - load(center + col);
    store(square + col, load(square + col) + (squares + off * off * A(N)));
    add_wide(sum + col, mean * A(N));
    if constexpr (N > 1) add_wide(sum + col, rest);
  }
  SEGFAST_INLINE void operator()(int64_t i, int64_t col, Vec<A> v) const { block<1>(i, col, {v}); }
  SEGFAST_INLINE void part(int64_t i, int64_t col, Vec<A> v) const { block<1>(i, col, {v}); }

  // Adds the moments of the `rows` rows to those of the `before` that are there.
  void add_to(double before, double rows, double* mean, double* squares) const {
    for (int64_t i = 0; i < this->cols; ++i) {
      const double own = sum[i] / rows, off = own - center[i];
      merge_moments(before, rows, own, square[i] - off * off * rows, mean[i], squares[i]);
    }
  }
};

// Of a depthwise convolution whose next rows of x are asked for.
template <class T, class A>
struct PutDepthwise : PutMoments<T, A> {
  int64_t row;
};

// u = depthwise(x) + bias and its moments.
template <class T, class A>
void train_depthwise(const DsConv<T, A>& o, int64_t begin, int64_t end, double* scratch, double* moments) {
  double count = 0;
  each_row(o.g, begin, end, [&](int64_t n, int64_t oy, int64_t ox0, int64_t ox1, int64_t offset) {
    T* u = o.u_out + (begin + offset) * o.g.c;
    const PutDepthwise<T, A> put{{u, o.g.c, o.dw_shift, o.past_u, scratch, o.cp}, o.g.w * o.g.c};
    depthwise_row(o.g, o.x, o.dw, o.cp, n, oy, ox0, ox1, 0, put);
    if (moments) put.add_to(count, static_cast<double>(ox1 - ox0), moments, moments + o.cp);
    count += static_cast<double>(ox1 - ox0);
  });
  fence();
}

// f(act): ReLU as a constant, which leaves no branch in the loop; the others as they come.
template <class F>
SEGFAST_INLINE void with_act(int64_t act, F f) {
  if (act == kRelu) return f(Int<kRelu>{});
  f(act);
}

// f(Int<vectors>, c0, left) over the channels: groups of vectors, whose loads make runs that the hardware prefetches and whose
// sums make chains that hide each other's latency, then what is left of one vector, `left` lanes.
template <class A, class F>
SEGFAST_INLINE void each_group(int64_t c, F f) {
  constexpr int L = lanes<A>, G = SEGFAST_BYTES == 64 ? 4 : 2;
  int64_t c0 = 0;
  for (; c0 + G * L <= c; c0 += G * L) f(Int<G>{}, c0, L);
  const auto rest = [&](auto group) {
    constexpr int N = decltype(group)::value;
    if (N < G && c0 + N * L <= c) f(group, c0, L), c0 += N * L;
  };
  rest(Int<3>{}), rest(Int<2>{}), rest(Int<1>{});
  if (c0 < c) f(Int<1>{}, c0, static_cast<int>(c - c0));
}

// The same over blocks of pixels [p0, p1): what belongs to the channels is loaded once a block.
template <class A, class F>
SEGFAST_INLINE void each_block(int64_t pixels, int64_t c, F f) {
  for (int64_t p0 = 0; p0 < pixels; p0 += 32) {
    const int64_t p1 = p0 + 32 < pixels ? p0 + 32 : pixels;
    each_group<A>(c, [&](auto group, int64_t c0, int left) { f(group, p0, p1, c0, left); });
  }
}

// N vectors from p on.
template <int N, class A>
struct Vectors {
  Vec<A> v[N];
  SEGFAST_INLINE explicit Vectors(const A* p) {
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) v[j] = load(p + j * lanes<A>);
  }
  SEGFAST_INLINE Vec<A> operator[](int j) const { return v[j]; }
};

// put(p, channel, act(scale * x + shift), left) for x [pixels][c]: pixel by pixel, as memory lies
template <class T, class A, class P>
SEGFAST_INLINE void normalise(const T* x, int64_t pixels, int64_t c, const A* scale, const A* shift, int64_t act, P put) {
  constexpr int L = lanes<A>;
  with_act(act, [&](auto act) {
    for (int64_t p = 0; p < pixels; ++p, x += c) {
      int64_t c0 = 0;
      for (; c0 + L <= c; c0 += L) put(p, c0, activate<A>(load(x + c0) * load(scale + c0) + load(shift + c0), act), L);
      const int left = static_cast<int>(c - c0);
      if (left > 0) put(p, c0, activate<A>(load_n(x + c0, left) * load(scale + c0) + load(shift + c0), act), left);
    }
  });
}
// v[p][c], rows of cp: one tile
template <class T, class A>
SEGFAST_INLINE void normalise_tile(const T* u, int64_t pixels, int64_t c, int64_t cp, const A* scale, const A* shift, int64_t act,
                                   A* v) {
  normalise(u, pixels, c, scale, shift, act, [&](int64_t p, int64_t at, Vec<A> x, int) { store(v + p * cp + at, x); });
}

// z = pointwise(act(bn(u))) + bias and its moments.
template <class T, class A>
void train_pointwise(const DsConv<T, A>& o, int64_t begin, int64_t end, A* buffer, double* scratch, double* moments) {
  double count = 0;
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    normalise_tile(o.u + t0 * o.g.c, t1 - t0, o.g.c, o.cp, o.scale1, o.shift1, o.act1, buffer);
    const PutMoments<T, A> put(o.z_out + t0 * o.g.k, o.g.k, o.pw_shift, false, scratch, o.kp);
    product<A>(t1 - t0, o.g.c, buffer, o.cp, o.pw, o.kp, put, RowsAhead<T>{o.u + t1 * o.g.c, o.g.c});
    if (moments) put.add_to(count, static_cast<double>(t1 - t0), moments, moments + o.kp);
    count += static_cast<double>(t1 - t0);
  }
}

template <class T, class A>
void train_output(const DsConv<T, A>& o, int64_t begin, int64_t end) {
  const int64_t k = o.g.k;
  T* y = o.y + begin * k;
  normalise(o.z + begin * k, end - begin, k, o.scale2, o.shift2, o.act2,
            [&](int64_t p, int64_t at, Vec<A> v, int left) { store_n(y + p * k + at, v, left); });
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
        add_wide(sums + c0 + j * L, sum[j]);
        add_wide(sums + stride + c0 + j * L, product[j]);
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
  const int64_t ldc = tile_row(o.cp), ldk = tile_row(o.kp);
  A* v = buffer;              // [tile][ldc]
  A* gz = v + o.tile * ldc;   // [tile][ldk]
  A* gv = gz + o.tile * ldk;  // [tile][ldc]
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end, pixels = t1 - t0;
    normalise_tile(o.u + t0 * c, pixels, c, ldc, o.scale1, o.shift1, o.act1, v);
    with_act(o.act2, [&](auto act) {
      const T *z = o.z + t0 * k, *grad = o.grad_y + t0 * k;
      each_block<A>(pixels, k, [&](auto group, int64_t p0, int64_t p1, int64_t c0, int left) {
        constexpr int N = decltype(group)::value;
        const Vectors<N, A> scale(o.scale2 + c0), shift(o.shift2 + c0), center(o.center2 + c0), slope(o.slope2 + c0),
            mean(o.mean2 + c0);
        for (int64_t p = p0; p < p1; ++p) {
#pragma GCC unroll 4
          for (int j = 0; j < N; ++j) {
            const int64_t at = c0 + j * L;
            const Vec<A> v = load_n(z + p * k + at, left);
            const Vec<A> g = activate_grad<A>(v * scale[j] + shift[j], load_n(grad + p * k + at, left), act);
            store(gz + p * ldk + at, scale[j] * (g - center[j] - slope[j] * (v - mean[j])));
          }
        }
      });
    });
    // The next tile's: a share of z and of grad_y to each row of the weight's gradient, u to each pixel.
    const auto outputs = [&](int64_t i, int64_t count) {
      const int64_t from = t1 * k + i * pixels;
      prefetch_run(o.z + from, count * pixels), prefetch_run(o.grad_y + from, count * pixels);
    };
    product_transposed<A>(pixels, gz, ldk, k, v, ldc, o.cp, Add<A>{grad_pw, o.cp, o.cp}, outputs);
    product<A>(pixels, k, gz, ldk, o.pw_back, o.cp, Put<A, A>{gv, ldc, o.cp, o.zeros, kIdentity}, RowsAhead<T>{o.u + t1 * c, c});
    with_act(o.act1, [&](auto act) {
      T* grad_u = o.grad_u + t0 * c;
      add_sums<T, A>(o.u + t0 * c, pixels, c, o.mean1, sums, o.cp, [&](int64_t p, int64_t c0, Vec<A> u, int left) {
        const Vec<A> g = activate_grad<A>(u * load(o.scale1 + c0) + load(o.shift1 + c0), load(gv + p * ldc + c0), act);
        store_past(grad_u + p * c + c0, g, left, o.past_g);
        return g;
      });
    });
  }
  fence();
}

// grad_u = scale * (g1 - center - slope * (u - mean)) of one vector's channels.
template <class A>
struct NormBack {
  Vec<A> scale, center, slope, mean;
  template <class T>
  SEGFAST_INLINE NormBack(const DsConv<T, A>& o, int64_t c0)
      : scale(load(o.scale1 + c0)), center(load(o.center1 + c0)), slope(load(o.slope1 + c0)), mean(load(o.mean1 + c0)) {}
  SEGFAST_INLINE Vec<A> operator()(Vec<A> g, Vec<A> u) const { return scale * (g - center - slope * (u - mean)); }
};

// The same of `count` pixels.
template <class T, class A>
SEGFAST_INLINE void normalise_back(const DsConv<T, A>& o, int64_t pixel, int64_t count, A* to) {
  constexpr int L = lanes<A>;
  const int64_t c = o.g.c;
  for (int64_t c0 = 0; c0 < c; c0 += L) {
    const int left = static_cast<int>(c - c0 < L ? c - c0 : L);
    const NormBack<A> value(o, c0);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = (pixel + p) * c + c0;
      store_n(to + p * c + c0, value(load_n(o.grad_u + at, left), load_n(o.u + at, left)), left);
    }
  }
}

// grad_u of N pixels from `pixel` on, to v [N][c], and its products with what lies under the kernel, added to grad_dw: K taps
// wide, S columns a pixel, vertical taps [ky0, ky1), of which rows[ky] + x is the first pixel. Asks for the same pixels of the
// next row.
template <int N, int K, int S, class T, class A>
SEGFAST_NOINLINE void weight_block(const DsConv<T, A>& o, int64_t pixel, const T* const* rows, int64_t x, int64_t ky0,
                                   int64_t ky1, A* v, A* grad_dw) {
  constexpr int L = lanes<A>;
  const int64_t c = o.g.c, cp = o.cp, row = o.g.w * c, next = o.g.ow * c;
  const T *g1 = o.grad_u + pixel * c, *u = o.u + pixel * c;
  const auto taps = [&](int64_t c0, auto read, auto write) {
    const NormBack<A> value(o, c0);
    Vec<A> g[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const int64_t at = i * c + c0;
      prefetch_l2(g1 + next + at), prefetch_l2(u + next + at);
      g[i] = value(read(g1 + at), read(u + at));
      write(v + at, g[i]);
    }
    for (int64_t ky = ky0; ky < ky1; ++ky) {
      const T* from = rows[ky] + x + c0;
      if (ky + 1 == ky1) rows_ahead<N, S>(from, row, c);
      Vec<A> acc[K] = {};
#pragma GCC unroll 32
      for (int column = 0; column < (N - 1) * S + K; ++column) {
        const Vec<A> at = in_register(read(from + column * c));
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          if (column >= kx && (column - kx) % S == 0 && (column - kx) / S < N) acc[kx] += g[(column - kx) / S] * at;
        }
      }
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) {
        A* out = grad_dw + (ky * K + kx) * cp + c0;
        store(out, load(out) + acc[kx]);
      }
    }
  };
  int64_t c0 = 0;
  for (; c0 + L <= c; c0 += L) taps(c0, [](const T* p) { return load(p); }, [](A* p, Vec<A> x) { store(p, x); });
  const int left = static_cast<int>(c - c0);
  if (left > 0) taps(c0, [left](const T* p) { return load_n(p, left); }, [left](A* p, Vec<A> x) { store_n(p, x, left); });
}

template <int K, int S, class T, class A>
SEGFAST_INLINE void weight_run(const DsConv<T, A>& o, int64_t pixel, const T* const* rows, int64_t x, int64_t ky0, int64_t ky1,
                               int64_t count, A* v, A* grad_dw) {
  const int64_t c = o.g.c;
  int64_t p = 0;
  const auto blocks = [&](auto n) {
    constexpr int N = decltype(n)::value;
    for (; p + N <= count; p += N) weight_block<N, K, S>(o, pixel + p, rows, x + p * S * c, ky0, ky1, v + p * c, grad_dw);
  };
  blocks(Int<SEGFAST_BYTES == 64 ? 8 : 4>{});
  blocks(Int<1>{});
}

// One row of output pixels: grad_u to v [ow][c], and what it adds to the depthwise weight's gradient [kh * kw][cp].
template <class T, class A>
void weight_row(const DsConv<T, A>& o, int64_t n, int64_t oy, A* v, A* grad_dw) {
  constexpr int L = lanes<A>;
  const Geometry& g = o.g;
  const T* image = o.x + n * g.h * g.w * g.c;
  const int64_t iy = oy * g.sh - g.ph, pixel = (n * g.oh + oy) * g.ow;
  const auto [first, last] = Inside(g, 0, g.ow);
  for (int64_t ox = 0; ox < g.ow; ++ox) {
    A* at = v + ox * g.c;
    if (ox == first && last > first) {
      const auto [ky0, ky1] = taps_inside(iy, g.kh, 1, g.h);
      const T* rows[8];
      for (int64_t ky = ky0; ky < ky1; ++ky) rows[ky] = image + (iy + ky) * g.w * g.c;
      const int64_t from = (ox * g.sw - g.pw) * g.c, count = last - first;
      if (g.kw == 3 && g.sw == 1) weight_run<3, 1>(o, pixel + ox, rows, from, ky0, ky1, count, at, grad_dw);
      if (g.kw == 3 && g.sw == 2) weight_run<3, 2>(o, pixel + ox, rows, from, ky0, ky1, count, at, grad_dw);
      if (g.kw == 5 && g.sw == 1) weight_run<5, 1>(o, pixel + ox, rows, from, ky0, ky1, count, at, grad_dw);
      if (g.kw == 5 && g.sw == 2) weight_run<5, 2>(o, pixel + ox, rows, from, ky0, ky1, count, at, grad_dw);
      ox = last - 1;
      continue;
    }
    normalise_back(o, pixel + ox, 1, at);
    for (int64_t ky = 0; ky < g.kh; ++ky) {
      const int64_t y = iy + ky * g.dh;
      for (int64_t kx = 0; kx < g.kw && y >= 0 && y < g.h; ++kx) {
        const int64_t xx = ox * g.sw - g.pw + kx * g.dw;
        if (xx < 0 || xx >= g.w) continue;
        const T* from = image + (y * g.w + xx) * g.c;
        A* out = grad_dw + (ky * g.kw + kx) * o.cp;
        for (int64_t c0 = 0; c0 < g.c; c0 += L) {
          const int left = static_cast<int>(g.c - c0 < L ? g.c - c0 : L);
          store(out + c0, load(out + c0) + load_n(at + c0, left) * load_n(from + c0, left));
        }
      }
    }
  }
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
    Vec<A> both[2 * N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) both[2 * j] = even[j], both[2 * j + 1] = odd[j];
    put_block<2 * N, A>(put, pixel, c0, both);
  }
}

// Row y of image n of grad_x, gathered from the rows of grad_u: at(oy) is the first pixel of row oy. Where `framed` there are
// kw - 1 pixels of zeros before each row and behind it.
template <class T, class A, class F>
SEGFAST_INLINE void input_row(const DsConv<T, A>& o, int64_t n, int64_t y, bool framed, F at) {
  using R = std::remove_cv_t<std::remove_pointer_t<decltype(at(int64_t{0}))>>;
  const Geometry& g = o.g;
  const PutFar<T, A> put{{o.grad_x, g.c, g.c, o.zeros, kIdentity}, o.past_x};
  const int64_t pixel = (n * g.h + y) * g.w;
  int64_t done = 0;
  if (framed && g.kh == g.kw && g.sh == g.sw && g.dh == 1 && g.dw == 1) {
    const R* rows[8];
    if (g.sh == 1 && (g.kw == 3 || g.kw == 5)) {  // a depthwise convolution with the kernel turned round
      const int64_t top = y + g.ph - (g.kh - 1);
      const Range down = taps_inside(top, g.kh, 1, g.oh);
      for (int64_t ky = down.begin; ky < down.end; ++ky) rows[ky] = at(top + ky);
      depthwise_run(g.kw, 1, rows, (g.pw - (g.kw - 1)) * g.c, g.c, o.dw_flipped, o.cp, down, g.w, pixel, put);
      return;
    }
    if (g.kh == 3 && g.sh == 2 && g.ph == 1 && g.pw == 1) {
      const A* weights[2];
      int number = 0;
      for (int64_t ky = (y + 1) % 2; ky < 3; ky += 2) {
        const int64_t oy = (y + 1 - ky) / 2;
        if (oy >= g.oh) continue;
        rows[number] = at(oy);
        weights[number++] = o.dw + ky * 3 * o.cp;
      }
      const auto run = [&](auto size) {
        constexpr int N = decltype(size)::value;
        for (; done + 2 * N <= g.w; done += 2 * N) {
          input_pairs<N>(number, rows, weights, o.cp, g.c, pixel + done, put);
          for (int i = 0; i < number; ++i) rows[i] += N * g.c;
        }
      };
      run(Int<4>{});
      run(Int<1>{});
    }
  }
  for (int64_t xx = done; xx < g.w; ++xx) {
    const R* from[64];
    const A* weight[64];
    int taps = 0;
    for (int64_t ky = 0; ky < g.kh; ++ky) {
      const int64_t up = y + g.ph - ky * g.dh;
      if (up < 0 || up % g.sh || up / g.sh >= g.oh) continue;
      for (int64_t kx = 0; kx < g.kw; ++kx) {
        const int64_t along = xx + g.pw - kx * g.dw;
        if (along < 0 || along % g.sw || along / g.sw >= g.ow) continue;
        from[taps] = at(up / g.sh) + along / g.sw * g.c;
        weight[taps++] = o.dw + (ky * g.kw + kx) * o.cp;
      }
    }
    depthwise_pixel(taps, from, weight, pixel + xx, put);
  }
}

// Rows of output pixels: grad_u, the depthwise weight's gradient and, from the last rows of grad_u, which stay in `ring`, the
// rows of grad_x that end in them. The rows that a chunk needs of the one before it are made again. Where the kernel reaches too
// far for that, grad_u goes back to memory in place of g1, for `backward_input`.
template <class T, class A>
void backward_depthwise(const DsConv<T, A>& o, int64_t begin, int64_t end, A* ring, A* grad_dw) {
  const Geometry& g = o.g;
  for (int64_t r = begin / g.ow; r < end / g.ow; ++r) {
    const int64_t n = r / g.oh, oy = r % g.oh;
    const int64_t frame = (g.kw - 1) * g.c;
    const auto at = [&](int64_t row) { return ring + row % (o.reach() + 1) * o.ring_row() + frame; };
    if (o.ringed() && r == begin / g.ow) {
      for (int64_t row = 0; row <= o.reach(); ++row) {
        for (int64_t i = 0; i < frame; ++i) at(row)[i - frame] = at(row)[i + g.ow * g.c] = 0;
      }
    }
    if (o.ringed() && o.grad_x && r == begin / g.ow) {
      for (int64_t row = oy > o.reach() ? oy - o.reach() : 0; row < oy; ++row) {
        normalise_back(o, (n * g.oh + row) * g.ow, g.ow, at(row));
      }
    }
    A* const v = o.ringed() ? at(oy) : ring;
    weight_row(o, n, oy, v, grad_dw);
    if (!o.grad_x) continue;
    if (o.ringed()) {
      const int64_t y0 = oy * g.sh - g.ph, y1 = oy + 1 < g.oh && y0 + g.sh < g.h ? y0 + g.sh : g.h;
      for (int64_t y = y0 > 0 ? y0 : 0; y < y1; ++y) input_row(o, n, y, true, [&](int64_t row) -> const A* { return at(row); });
    } else {
      constexpr int L = lanes<A>;
      T* to = o.grad_u + r * g.ow * g.c;
      for (int64_t i = 0; i < g.ow * g.c; i += L) {
        const int64_t left = g.ow * g.c - i;
        store_n(to + i, load(v + i), static_cast<int>(left < L ? left : L));
      }
    }
  }
  fence();
}

// Rows [begin, end) of all images of grad_x.
template <class T, class A>
void backward_input(const DsConv<T, A>& o, int64_t begin, int64_t end) {
  const Geometry& g = o.g;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.h;
    input_row(o, n, r % g.h, false, [&](int64_t row) -> const T* { return o.grad_u + (n * g.oh + row) * g.ow * g.c; });
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
  const Tensor c = contiguous_as(*t, false);
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
  Fold(const std::vector<double>& m, const std::vector<double>& var, const Optional& weight, const Optional& bias, double eps,
       int64_t c)
      : scale(padded(c)), shift(padded(c)), mean(padded(c)), gamma(read(weight, c, 1)), inverse(c) {
    const auto beta = read(bias, c, 0);
    for (int64_t i = 0; i < c; ++i) {
      inverse[i] = 1 / std::sqrt(var[i] + eps);
      scale.p[i] = static_cast<A>(gamma[i] * inverse[i]);
      shift.p[i] = static_cast<A>(beta[i] - m[i] * gamma[i] * inverse[i]);
      mean.p[i] = static_cast<A>(m[i]);
    }
  }
  Fold(const Optional& m, const Optional& var, const Optional& weight, const Optional& bias, double eps, int64_t c)
      : Fold(read(m, c, 0), read(var, c, 1 - eps), weight, bias, eps, c) {}
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

// Whether a map [pixels][channels] of T is written past the caches: where it is larger than what they keep until it is read
// again, and consists of whole vectors.
template <class T>
bool written_past(const T* p, int64_t pixels, int64_t channels) {
  constexpr int64_t enough = 4 << 20;
  return std::is_same_v<T, float> && channels % 16 == 0 && reinterpret_cast<uintptr_t>(p) % 64 == 0 &&
         pixels * channels * static_cast<int64_t>(sizeof(T)) >= enough;
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
      const Tensor w = contiguous_as(pw_weight, false);
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
    for (int64_t i = 0; i < c; ++i) merge_moments(before, n, own[i], own[cp + i], mean[i], var[i]);
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
    o.past_u = written_past(o.u, g.pixels(), g.c);
    const int64_t pixels = g.pixels();

    const Buffer<A> dw = depthwise_weight<A>(dw_weight, g, nullptr), bias1(o.cp), bias2(o.kp), panels(o.kp * g.c, false);
    const auto b1 = read(dw_bias, g.c, 0), b2 = read(pw_bias, g.k, 0);
    std::copy(b1.begin(), b1.end(), bias1.p), std::copy(b2.begin(), b2.end(), bias2.p);
    o.dw = dw.p, o.dw_shift = bias1.p;
    const Chunks by_rows(pixels, g.ow), by_blocks(pixels, 12);
    const Buffer<double> moments1(own1 ? by_rows.number * 2 * o.cp : 0);
    by_rows.each([&](int64_t chunk, int64_t begin, int64_t end) {
      const Buffer<double> scratch(3 * o.cp, false);
      DS_CONV_CALL(train_depthwise<T, A>)(o, begin, end, scratch.p, own1 ? moments1.p + chunk * 2 * o.cp : nullptr);
    });
    if (own1) combine(moments1, by_rows, g.c, o.cp, mean1, var1);

    const Fold<A> first(mean1, var1, dw_gamma, dw_beta, dw_eps, g.c);
    const Tensor w = contiguous_as(pw_weight, false);
    DS_CONV_CALL(pack<T, A>)(data<T>(w), g.k, g.c, g.c, 1, static_cast<const A*>(nullptr), panels.p);
    o.scale1 = first.scale.p, o.shift1 = first.shift.p, o.pw = panels.p, o.pw_shift = bias2.p;
    const Buffer<double> moments2(own2 ? by_blocks.number * 2 * o.kp : 0);
    by_blocks.each([&](int64_t chunk, int64_t begin, int64_t end) {
      const Buffer<A> tile(o.tile * o.cp, false);
      const Buffer<double> scratch(3 * o.kp, false);
      DS_CONV_CALL(train_pointwise<T, A>)(o, begin, end, tile.p, scratch.p, own2 ? moments2.p + chunk * 2 * o.kp : nullptr);
    });
    if (own2) combine(moments2, by_blocks, g.k, o.kp, mean2, var2);

    const Fold<A> second(mean2, var2, pw_gamma, pw_beta, pw_eps, g.k);
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
    o.past_x = o.grad_x && written_past(o.grad_x, g.n * g.h * g.w, g.c), o.past_g = written_past(o.grad_u, g.pixels(), g.c);
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

    const Tensor w = contiguous_as(pw_weight, false);
    const Buffer<A> panels(o.cp * g.k, false), partial_pw(by_blocks.number * g.k * o.cp, false);
    DS_CONV_CALL(pack<T, A>)(data<T>(w), g.c, g.k, 1, g.c, static_cast<const A*>(nullptr), panels.p);
    o.pw_back = panels.p;
    const Buffer<double> sums1(by_blocks.number * 2 * o.cp);
    by_blocks.each([&](int64_t chunk, int64_t begin, int64_t end) {
      const Buffer<A> scratch(o.tile * (2 * tile_row(o.cp) + tile_row(o.kp)), false);
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

    const Buffer<A> dw = depthwise_weight<A>(dw_weight, g, nullptr), flipped = depthwise_weight<A>(dw_weight, g, nullptr, true);
    o.dw = dw.p, o.dw_flipped = flipped.p;
    const Buffer<A> partial_dw(by_rows.number * taps * o.cp);
    by_rows.each([&](int64_t chunk, int64_t begin, int64_t end) {
      const Buffer<A> ring((o.ringed() ? o.reach() + 1 : 1) * o.ring_row(), false);
      DS_CONV_CALL(backward_depthwise<T, A>)(o, begin, end, ring.p, partial_dw.p + chunk * taps * o.cp);
    });
    for (int64_t c = 0; c < g.c; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        double total = 0;
        for (int64_t chunk = 0; chunk < by_rows.number; ++chunk) total += partial_dw.p[(chunk * taps + tap) * o.cp + c];
        data<T>(grad_dw)[c * taps + tap] = static_cast<T>(total);
      }
    }
    if (need_input && !o.ringed()) {
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
