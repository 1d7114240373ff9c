// 3 x 3 convolutions of stride 1 by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray, CVPR 2016): a tile of 4 x 4
// inputs becomes 16 numbers a channel, each of which takes part in a product over the channels of its own, and 16 sums become
// 2 x 2 outputs: 16 multiplications where the direct form has 36. Included by packed.cpp once per instruction set.
//
// The taps and outputs of a dilated convolution lie `dilation` apart; a tile is one of the interleaved images that this makes.
// A value that is not finite reaches all outputs of its tiles, as infinities of both signs are added.
#ifndef SEGFAST_WINOGRAD_TYPES
#define SEGFAST_WINOGRAD_TYPES
namespace segfast {

constexpr int64_t kMostTiles = 96;  // at a time

// The image and the first output of a tile.
struct WinogradTile {
  int64_t n, y, x;
};
// How many tiles cover `size` outputs: every 2 x dilation of them take `dilation`.
inline int64_t winograd_count(int64_t size, int64_t dilation) {
  const int64_t rest = size % (2 * dilation);
  return size / (2 * dilation) * dilation + (rest < dilation ? rest : dilation);
}
inline int64_t winograd_count(const Geometry& g) { return g.n * winograd_count(g.oh, g.dh) * winograd_count(g.ow, g.dw); }
inline WinogradTile winograd_tile(const Geometry& g, int64_t i) {
  const int64_t columns = winograd_count(g.ow, g.dw), rows = winograd_count(g.oh, g.dh);
  const int64_t x = i % columns, y = i / columns % rows;
  return {i / columns / rows, y / g.dh * 2 * g.dh + y % g.dh, x / g.dw * 2 * g.dw + x % g.dw};
}

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// Four inputs, along either direction, to the four numbers of a tile.
SEGFAST_INLINE void winograd_in(Vec<float>& a, Vec<float>& b, Vec<float>& c, Vec<float>& d) {
  const Vec<float> second = b;
  a = a - c;
  b = second + c;
  d = second - d;
  c = c - second;
}

// A part of the image's channels: `c` of them, [h][w][c], each pixel standing for fy x fx; they begin at `to` of a tile's
// numbers.
struct WinogradSource {
  const float* x;
  int64_t c, fy, fx, to;
};

// 16 maps [tiles][cp], one after the other; `zero` stands for what is outside the image.
SEGFAST_INLINE void winograd_inputs(const PackedArgs<float>& o, const WinogradSource& source, const WinogradTile* tile,
                                    int64_t tiles, const float* zero, float* to) {
  const Geometry& g = o.g;
  const int64_t c = source.c, width = g.w / source.fx, height = g.h / source.fy;
  constexpr int L = lanes<float>;
  for (int64_t i = 0; i < tiles; ++i) {
    const auto [n, y0, x0] = tile[i];
    const float* from[16];
    int64_t column[4];
    for (int kx = 0; kx < 4; ++kx) {
      const int64_t x = x0 - g.pw + kx * g.dw;
      column[kx] = x >= 0 && x < g.w ? x / source.fx * c : -1;
    }
    for (int ky = 0; ky < 4; ++ky) {
      const int64_t y = y0 - g.ph + ky * g.dh;
      const bool inside = y >= 0 && y < g.h;
      const float* row = source.x + (n * height + (inside ? y / source.fy : 0)) * width * c;
      for (int kx = 0; kx < 4; ++kx) from[ky * 4 + kx] = inside && column[kx] >= 0 ? row + column[kx] : zero;
    }
    float* out = to + i * o.cp + source.to;
    const int64_t map = tiles * o.cp;
    const auto channels = [&](int64_t c0, auto read, auto write) {
      Vec<float> v[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) v[k] = read(from[k] + c0);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) winograd_in(v[k], v[k + 4], v[k + 8], v[k + 12]);
#pragma GCC unroll 4
      for (int k = 0; k < 16; k += 4) winograd_in(v[k], v[k + 1], v[k + 2], v[k + 3]);
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) write(out + k * map + c0, v[k]);
    };
    int64_t c0 = 0;
    for (; c0 + L <= c; c0 += L) {
      channels(c0, [](const float* p) { return load(p); }, [](float* p, Vec<float> v) { store(p, v); });
    }
    const int left = static_cast<int>(c - c0);
    if (left > 0) {
      channels(c0, [left](const float* p) { return load_n(p, left); }, [left](float* p, Vec<float> v) { store_n(p, v, left); });
    }
  }
}

// Sums of one panel, [16][tiles][32], to outputs in columns from col0 on.
template <class P>
SEGFAST_INLINE void winograd_outputs(const PackedArgs<float>& o, const WinogradTile* tile, int64_t tiles, int64_t col0,
                                     int64_t width, const float* sums, const P& put) {
  const Geometry& g = o.g;
  constexpr int L = lanes<float>;
  for (int64_t i = 0; i < tiles; ++i) {
    const auto [n, y0, x0] = tile[i];
    const bool second = x0 + g.dw < g.ow;
    for (int64_t j = 0; j < width && col0 + j < g.k; j += L) {
      Vec<float> v[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) v[k] = load(sums + (k * tiles + i) * 32 + j);
      Vec<float> r[2][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        r[0][k] = v[k] + v[k + 4] + v[k + 8];
        r[1][k] = v[k + 4] - v[k + 8] - v[k + 12];
      }
      const int64_t col = col0 + j;
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int64_t y = y0 + k * g.dh;
        if (y >= g.oh) break;
        const int64_t pixel = (n * g.oh + y) * g.ow + x0;
        const Vec<float> left = r[k][0] + r[k][1] + r[k][2], right = r[k][1] - r[k][2] - r[k][3];
        if (col + L <= g.k) {
          put(pixel, col, left);
          if (second) put(pixel + g.dw, col, right);
        } else {
          put.part(pixel, col, left);
          if (second) put.part(pixel + g.dw, col, right);
        }
      }
    }
  }
}

// Sums of as many products at a time: of thousands in one go the rounding errors would be three times eager's.
constexpr int64_t kWinogradDepth = 512;

struct WinogradSums {
  float* to;
  bool more;  // after the first kWinogradDepth
  static constexpr int64_t cols = 32;
  SEGFAST_INLINE void soon(int64_t, int64_t) const {}
  SEGFAST_INLINE void operator()(int64_t i, int64_t col, Vec<float> v) const {
    float* at = to + i * 32 + col;
    store(at, more ? v + load(at) : v);
  }
  SEGFAST_INLINE void part(int64_t, int64_t, Vec<float>) const {}
};

// Tiles [begin, end), o.tile at a time; `inputs` has room for 16 x tile x cp, `sums` for 16 x tile x 32, `zero` for c.
template <class T>
void winograd_tiles(const PackedArgs<T>& o, int64_t begin, int64_t end, T* inputs, T* sums, const T* zero) {
  constexpr int L = lanes<float>;
  const int64_t c = o.g.c;
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t tiles = t0 + o.tile < end ? o.tile : end - t0;
    WinogradTile tile[kMostTiles];
    for (int64_t i = 0; i < tiles; ++i) tile[i] = winograd_tile(o.g, t0 + i);
    winograd_inputs(o, {o.x, o.first, o.fy, o.fx, 0}, tile, tiles, zero, inputs);
    if (o.more) winograd_inputs(o, {o.more, c - o.first, 1, 1, o.first}, tile, tiles, zero, inputs);
    with_put(o.y, o.add, 0, o.g.k, o.pw_shift, o.act, [&](const auto& put) {
      for (int64_t col0 = 0; col0 < o.kp; col0 += 32) {
        const int64_t width = o.kp - col0 < 32 ? o.kp - col0 : 32, used = o.g.k - col0 < width ? o.g.k - col0 : width;
        for (int64_t k = 0; k < 16; ++k) {
          const float* panel = o.pw + (col0 * 16 + k * width) * c;
          for (int64_t c0 = 0; c0 < c; c0 += kWinogradDepth) {
            const int64_t depth = c - c0 < kWinogradDepth ? c - c0 : kWinogradDepth;
            const float* a = inputs + k * tiles * o.cp + c0;
            const WinogradSums to{sums + k * tiles * 32, c0 > 0};
            const auto columns = [&](auto vectors, int64_t j) {
              constexpr int V = decltype(vectors)::value;
              rows_of<V, float>(tiles, depth, a, o.cp, 1, panel + c0 * width + j, width, j, to);
            };
            int64_t j = 0;
            for (; j + L < used; j += 2 * L) columns(Int<2>{}, j);
            for (; j < used; j += L) columns(Int<1>{}, j);
          }
        }
        winograd_outputs(o, tile, tiles, col0, width, sums, put);
      }
    });
  }
}

}  // namespace segfast::SEGFAST_ISA
#endif
