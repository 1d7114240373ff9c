// The part of a depthwise-separable block that reads a bilinearly enlarged map. Interpolation and both convolutions are linear
// and commute, if nothing comes between them:
//   z[ty, tx, k] = sum_c pw[k, c] dw[c, ty, tx] x[c]                         a 1 x 1 convolution of the small map, by the caller
//   y[oy, ox, k] = sum_{ty, tx} enlarged(z[ty, tx, k])[oy + ty - ph, ox + tx - pw], 0 outside the enlarged map
// A row of y is made in two steps: z's rows together (interpolation down, and ty), then its columns (across, and tx). Included by
// packed.cpp once per instruction set.
#ifndef SEGFAST_TAPS_TYPES
#define SEGFAST_TAPS_TYPES
namespace segfast {

constexpr int64_t kMostTaps = 8;  // along an axis

// Row r of the enlarged map lies between rows y0[r] and y1[r] of z, with the shares down0 and down1; columns likewise.
struct Taps {
  const float* z;   // [n][h][w][kh][kw][k]
  int64_t h, w, k;  // k a multiple of 16
  const int32_t *y0, *y1, *x0, *x1;
  const float *down0, *down1, *across0, *across1;
};

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// to[i] = sum over parts of share * from[i], in their order.
SEGFAST_INLINE void mix_parts(const float* const* from, const float* share, int64_t parts, int64_t offset, int64_t n, float* to) {
  constexpr int L = lanes<float>;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    Vec<float> a{}, b{}, c{}, d{};
    for (int64_t p = 0; p < parts; ++p) {
      const Vec<float> part = splat(share[p]);
      const float* x = from[p] + offset + i;
      a += load(x) * part, b += load(x + L) * part, c += load(x + 2 * L) * part, d += load(x + 3 * L) * part;
    }
    store(to + i, a), store(to + i + L, b), store(to + i + 2 * L, c), store(to + i + 3 * L, d);
  }
  for (; i < n; i += L) {
    Vec<float> sum{};
    for (int64_t p = 0; p < parts; ++p) sum += load(from[p] + offset + i) * splat(share[p]);
    store(to + i, sum);
  }
}

// Row oy of image n: to[ow][k]; `line` [w][kw][k].
template <class T>
void taps_row(const Taps& t, const Geometry& g, int64_t n, int64_t oy, T* line, T* to) {
  const int64_t wide = g.kw * t.k, pixel = g.kh * wide;
  const float* from[2 * kMostTaps];
  float share[2 * kMostTaps];
  int64_t parts = 0;
  for (int64_t ty = 0; ty < g.kh; ++ty) {
    const int64_t row = oy + ty - g.ph;
    if (row < 0 || row >= g.h) continue;
    from[parts] = t.z + (n * t.h + t.y0[row]) * t.w * pixel + ty * wide, share[parts++] = t.down0[row];
    from[parts] = t.z + (n * t.h + t.y1[row]) * t.w * pixel + ty * wide, share[parts++] = t.down1[row];
  }
  for (int64_t x = 0; x < t.w; ++x) mix_parts(from, share, parts, x * pixel, wide, line + x * wide);
  for (int64_t ox = 0; ox < g.ow; ++ox) {
    parts = 0;
    for (int64_t tx = 0; tx < g.kw; ++tx) {
      const int64_t column = ox + tx - g.pw;
      if (column < 0 || column >= g.w) continue;
      from[parts] = line + t.x0[column] * wide + tx * t.k, share[parts++] = t.across0[column];
      from[parts] = line + t.x1[column] * wide + tx * t.k, share[parts++] = t.across1[column];
    }
    mix_parts(from, share, parts, 0, t.k, to + ox * t.k);
  }
}

}  // namespace segfast::SEGFAST_ISA
#endif
