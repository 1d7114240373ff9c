// What the convolution kernels share: activations, the register-blocked product, depthwise rows; and, for the launchers,
// padded scratch. Included once per instruction set and once more by the launchers, after each_isa.h.
#ifndef SEGFAST_CONV_TYPES
#define SEGFAST_CONV_TYPES
namespace segfast {

struct Geometry {
  int64_t n, c, h, w, k, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t pixels() const { return n * oh * ow; }
};

struct Range {
  int64_t begin, end;
};

// Those of `taps`, `step` apart from `at` on, that lie inside [0, size).
inline Range taps_inside(int64_t at, int64_t taps, int64_t step, int64_t size) {
  const int64_t begin = std::min(at < 0 ? (step - 1 - at) / step : 0, taps);
  const int64_t end = at + (taps - 1) * step < size ? taps : (size - at + step - 1) / step;
  return {begin, std::max(begin, end)};
}

// Pixels a tile: the buffers of one tile stay in L2, and most of them in L1.
inline int64_t tile_pixels(int64_t bytes_a_pixel, int64_t bytes = 49152, int64_t most = 96) {
  return std::clamp<int64_t>(bytes / bytes_a_pixel / 12 * 12, 12, most);
}

// The last one, of slope 0.01, is for the packed kernels alone.
enum Act : int64_t { kIdentity, kRelu, kRelu6, kSilu, kHardswish, kLeakyRelu };

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

template <int N>
struct Int {
  static constexpr int value = N;
  constexpr operator int64_t() const { return N; }
};

template <class A>
constexpr int kVectors = 2;  // vectors a panel
template <class A>
constexpr int kRows = SEGFAST_BYTES == 64 ? 8 : 6;

// NaN stays NaN, as in ATen.
template <class A>
SEGFAST_INLINE Vec<A> activate(Vec<A> v, int64_t act) {
  const Vec<A> zero{}, three = splat<A>(3), six = splat<A>(6);
  switch (act) {
    case kRelu:
      return v < zero ? zero : v;
    case kRelu6:
      return v < zero ? zero : (v > six ? six : v);
    case kSilu:
      return v / (exp(-v) + 1);
    case kHardswish: {
      const Vec<A> r = v + three;
      return v * (r < zero ? zero : (r > six ? six : r)) / six;
    }
    case kLeakyRelu:
      return v > zero ? v : v * splat<A>(0.01);
    default:
      return v;
  }
}

// The activations that are a clamp to [low, high]; NaN stays NaN.
SEGFAST_INLINE bool is_clamp(int64_t act) { return act == kIdentity || act == kRelu || act == kRelu6; }
template <class A>
SEGFAST_INLINE A low_of(int64_t act) {
  return act == kIdentity ? -static_cast<A>(__builtin_inff()) : A(0);
}
template <class A>
SEGFAST_INLINE A high_of(int64_t act) {
  return act == kRelu6 ? A(6) : static_cast<A>(__builtin_inff());
}
template <class A>
SEGFAST_INLINE Vec<A> clamp(Vec<A> v, Vec<A> low, Vec<A> high) {
  return no_more<A>(no_less<A>(v, low), high);
}

// Where a product goes: row i, columns from col on, of a matrix with `cols` columns, `ld` apart.
//   to = act(value + shift) when Clamp or not, = value when there is no shift, += value when Add.
template <class T, class A, bool Clamp = true>
struct Put {
  T* to;
  int64_t ld, cols;
  const A* shift;
  int64_t act;
  A low = low_of<A>(act), high = high_of<A>(act);
  SEGFAST_INLINE Vec<A> value(int64_t col, Vec<A> v) const {
    v += load(shift + col);
    if constexpr (Clamp) return clamp<A>(v, splat(low), splat(high));
    return activate<A>(v, act);
  }
  SEGFAST_INLINE void soon(int64_t i, int64_t col) const { prefetch_to(to + i * ld + col); }
  SEGFAST_INLINE void operator()(int64_t i, int64_t col, Vec<A> v) const { store(to + i * ld + col, value(col, v)); }
  SEGFAST_INLINE void part(int64_t i, int64_t col, Vec<A> v) const {
    if (col < cols) store_n(to + i * ld + col, value(col, v), static_cast<int>(cols - col));
  }
};

// Rows that go to memory and not to a buffer in cache: past the caches, or asked for before they are written.
template <class T, class A>
struct PutFar : Put<T, A> {
  bool past;
  template <int N>
  SEGFAST_INLINE void block(int64_t first, int64_t col, const Vec<A> (&v)[N]) const {
    const int64_t left = this->cols - col;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (!past) this->soon(first + 2 * N + i, col);
      store_past(this->to + (first + i) * this->ld + col, this->value(col, v[i]), static_cast<int>(left), past);
    }
  }
};

// Whether a row may be put but once: where it is added to what may be in its place, or counted.
template <class P>
constexpr bool once() {
  if constexpr (requires { P::once; }) return P::once;
  return false;
}

// N rows from `first` on of one whole vector of columns, to a put that has a `block` for them or one by one.
template <int N, class A, class P>
SEGFAST_INLINE void put_block(const P& put, int64_t first, int64_t col, const Vec<A> (&v)[N]) {
  if constexpr (requires { put.block(first, col, v); }) {
    put.block(first, col, v);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) put(first + i, col, v[i]);
  }
}

// What comes after a product reads memory that no hardware fetches ahead, for another step lies between. ahead(i, count) asks for
// the part of it that belongs to so many of the product's rows; the product calls it with its blocks, whose arithmetic hides the
// wait, a few rows with each panel: requests that come all at once would wait for each other.
struct NothingAhead {
  SEGFAST_INLINE void operator()(int64_t, int64_t) const {}
};
template <class T>
SEGFAST_INLINE void prefetch_run(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch_l2(from + i);
}
// Rows of `row` elements.
template <class T>
struct RowsAhead {
  const T* from;
  int64_t row;
  SEGFAST_INLINE void operator()(int64_t i, int64_t count) const { prefetch_run(from + i * row, count * row); }
};
// The rows of x that a depthwise convolution reads first for its output pixels from `pixel` on.
template <class T>
struct DepthwiseAhead {
  const T *rows, *end;  // the lowest row under the kernel of the first pixel
  int64_t column, width, pixel, row, sh;
  DepthwiseAhead(const Geometry& g, const T* x, int64_t first)
      : end(x + g.n * g.h * g.w * g.c), column(first % g.ow), width(g.ow), pixel(g.sw * g.c), row(g.w * g.c), sh(g.sh) {
    const int64_t oy = first / g.ow % g.oh, n = first / g.ow / g.oh;
    rows = x + (n * g.h + oy * g.sh - g.ph + (g.kh - 1) * g.dh) * row;
  }
  SEGFAST_INLINE void operator()(int64_t i, int64_t count) const {
    int64_t at = column + i;
    const T* from = rows;
    for (; at >= width; at -= width) from += sh * row;
    from += at * pixel;
    for (int64_t y = 0; y < sh && from < end; ++y) prefetch_run(from - y * row, count * pixel);
  }
};
// The memory that a block of M rows and V vectors goes to.
template <int M, int V, class A, class P>
SEGFAST_INLINE void all_soon(const P& put, int64_t first, int64_t col) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) put.soon(first + i, col + j * lanes<A>);
  }
}
// Of a block of N rows, the part for one panel of `panels`.
template <int N, class F>
SEGFAST_INLINE void part_ahead(const F& ahead, int64_t i, int64_t panel, int64_t panels) {
  if constexpr (!std::is_same_v<F, NothingAhead>) {
    const int64_t from = N * panel / panels, to = N * (panel + 1) / panels;
    if (from < to) ahead(i + from, to - from);
  }
}

// M rows, V vectors of columns from `col` on: sum over depth of a[i * row + d * step] * b[d * b_step + j * lanes].
// A function of its own: in a large one GCC keeps the accumulators in memory. For the same reason `put` calls nothing.
template <int M, int V, class A, class P>
SEGFAST_NOINLINE void micro(int64_t depth, const A* __restrict a, int64_t row, int64_t step, const A* __restrict b,
                            int64_t b_step, int64_t first, int64_t col, const P put) {
  constexpr int L = lanes<A>;
  Vec<A> acc[M][V] = {};
  all_soon<M, V, A>(put, first + M, col);  // the next block's, which come while this one is computed
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    Vec<A> bv[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) bv[j] = load(b + d * b_step + j * L);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const A s = a[i * row + d * step];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += bv[j] * s;
    }
  }
  if constexpr (requires { put.block(first, col, acc[0]); }) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      Vec<A> rows[M];
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) rows[i] = acc[i][j];
      put.block(first, col + j * L, rows);
    }
  } else if (col + V * L <= put.cols) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) put(first + i, col + j * L, acc[i][j]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) put.part(first + i, col + j * L, acc[i][j]);
    }
  }
}

template <int V, class A, class P, class F = NothingAhead>
SEGFAST_INLINE void rows_of(int64_t rows, int64_t depth, const A* a, int64_t row, int64_t step, const A* b, int64_t b_step,
                            int64_t col, const P& put, const F& ahead = {}, int64_t panel = 0, int64_t panels = 1) {
  constexpr int M = kRows<A>;
  int64_t i = 0;
  const auto blocks = [&](auto m) {
    constexpr int N = decltype(m)::value;
    for (; i + N <= rows; i += N) {
      part_ahead<N>(ahead, i, panel, panels);
      micro<N, V, A>(depth, a + i * row, row, step, b, b_step, i, col, put);
    }
  };
  blocks(Int<M>{});
  blocks(Int<4>{}), blocks(Int<2>{}), blocks(Int<1>{});
}

// [rows, depth] (leading dimension lda) times packed panels [padded / panel][depth][panel].
template <class A, class P, class F = NothingAhead>
SEGFAST_INLINE void product(int64_t rows, int64_t depth, const A* a, int64_t lda, const A* panels, int64_t padded, const P& put,
                            const F& ahead = {}) {
  constexpr int V = kVectors<A>, L = lanes<A>;
  int64_t col = 0;
  const int64_t count = (padded + V * L - 1) / (V * L);
  for (; col + V * L <= padded; col += V * L) {
    rows_of<V, A>(rows, depth, a, lda, 1, panels + col * depth, V * L, col, put, ahead, col / (V * L), count);
  }
  for (; col < padded; col += L) {
    rows_of<1, A>(rows, depth, a, lda, 1, panels + col * depth, L, col, put, ahead, col / (V * L), count);
  }
}

// One output pixel of a depthwise convolution from its list of taps: sources and weights.
template <class T, class A, class P>
SEGFAST_INLINE void depthwise_pixel(int taps, const T* const* from, const A* const* weight, int64_t pixel, const P& put) {
  constexpr int L = lanes<A>;
  for (int64_t c0 = 0; c0 < put.cols; c0 += L) {
    Vec<A> acc{};
    if (c0 + L <= put.cols) {
      for (int t = 0; t < taps; ++t) acc += load(from[t] + c0) * load(weight[t] + c0);
      put(pixel, c0, acc);
    } else {
      for (int t = 0; t < taps; ++t) acc += load_n(from[t] + c0, static_cast<int>(put.cols - c0)) * load(weight[t] + c0);
      put.part(pixel, c0, acc);
    }
  }
}

// Asks for one vector's channels of N * S pixels of the S rows after the one at `from`.
template <int N, int S, class T>
SEGFAST_INLINE void rows_ahead(const T* from, int64_t row, int64_t c) {
#pragma GCC unroll 2
  for (int y = 1; y <= S; ++y) {
#pragma GCC unroll 16
    for (int i = 0; i < N * S; ++i) prefetch_l2(from + y * row + i * c);
  }
}

// Blocks of N of the `count` interior pixels of one row from `pixel` on: K taps wide, stride S, no dilation, vertical taps
// [down), of which rows[ky] + x is the first pixel under the kernel. Returns how many pixels it did.
template <int N, int K, int S, class T, class A, class P>
SEGFAST_NOINLINE int64_t depthwise_blocks(const T* const* rows, int64_t x, int64_t c, const A* w, int64_t cp, Range down,
                                          int64_t count, int64_t pixel, const P put) {
  constexpr int L = lanes<A>;
  const auto [ky0, ky1] = down;
  constexpr bool Unrolled = SEGFAST_BYTES > 16 && N == 8 && K == 3;  // else not worth its code
  const bool all = Unrolled && ky0 == 0 && ky1 == K;
  const T* from[K];
  for (int64_t ky = ky0; ky < ky1; ++ky) from[ky] = rows[ky] + x;
  const int64_t whole = c < put.cols ? c : put.cols;
  int64_t p = 0;
  for (; p + N <= count; p += N) {
    const auto row = [&](int64_t ky, int64_t c0, auto read, Vec<A>(&acc)[N]) {
      Vec<A> wv[K];
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) wv[kx] = load(w + (ky * K + kx) * cp + c0);
      const T* at = from[ky] + c0;
#pragma GCC unroll 32
      for (int column = 0; column < (N - 1) * S + K; ++column) {
        const Vec<A> v = in_register(read(at + column * c));
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          if (column >= kx && (column - kx) % S == 0 && (column - kx) / S < N) acc[(column - kx) / S] += v * wv[kx];
        }
      }
    };
    int64_t c0 = 0;
    for (; c0 + L <= whole; c0 += L) {
      Vec<A> acc[N] = {};
      const auto read = [](const T* p) { return load(p); };
      if (all) {
#pragma GCC unroll 8
        for (int ky = 0; ky < (Unrolled ? K : 0); ++ky) row(ky, c0, read, acc);
      } else {
#pragma GCC unroll 1
        for (int64_t ky = ky0; ky < ky1; ++ky) row(ky, c0, read, acc);
      }
      // what is new of the rows, two blocks or a row ahead: the hardware does not follow these strides
      if (ky0 < ky1) {
        const T* last = from[ky1 - 1] + c0;
        if constexpr (requires { put.row; }) {
          rows_ahead<N, S>(last, put.row, c);
        } else if (c0 * sizeof(T) % 64 == 0) {
#pragma GCC unroll 1
          for (int i = 0; i < N * S; ++i) prefetch(last + (2 * N * S + K - S + i) * c);
        }
      }
      put_block<N, A>(put, pixel + p, c0, acc);
    }
    for (; c0 < c; c0 += L) {
      Vec<A> acc[N] = {};
      const int left = static_cast<int>(c - c0);
#pragma GCC unroll 1
      for (int64_t ky = ky0; ky < ky1; ++ky) row(ky, c0, [left](const T* p) { return load_n(p, left); }, acc);
      if constexpr (requires { put.block(pixel, c0, acc); }) {
        put.block(pixel + p, c0, acc);
      } else {
#pragma GCC unroll 1
        for (int i = 0; i < N; ++i) put.part(pixel + p + i, c0, acc[i]);
      }
    }
    for (int64_t ky = ky0; ky < ky1; ++ky) from[ky] += N * S * c;
  }
  return p;
}

// One output pixel from its taps [down) x [across): rows[ky] + x is where tap 0 of row ky lies, the next ones `step` elements on.
template <class T, class A, class P>
SEGFAST_NOINLINE void depthwise_taps(const T* const* rows, int64_t x, int64_t step, const A* w, int64_t cp, int64_t kw,
                                     Range down, Range across, int64_t pixel, const P put) {
  const T* from[64];  // larger kernels are refused by the launcher
  const A* weight[64];
  int taps = 0;
  for (int64_t ky = down.begin; ky < down.end; ++ky) {
    for (int64_t kx = across.begin; kx < across.end; ++kx) {
      from[taps] = rows[ky] + x + kx * step;
      weight[taps++] = w + (ky * kw + kx) * cp;
    }
  }
  depthwise_pixel(taps, from, weight, pixel, put);
}

template <int K, int S, class T, class A, class P>
SEGFAST_INLINE void depthwise_run_of(const T* const* rows, int64_t x, int64_t c, const A* w, int64_t cp, Range down,
                                     int64_t count, int64_t pixel, const P& put) {
  constexpr int N = 8;
  int64_t p = 0;
  const auto blocks = [&](auto n) {
    constexpr int M = decltype(n)::value;
    p += depthwise_blocks<M, K, S>(rows, x + p * S * c, c, w, cp, down, count - p, pixel + p, put);
  };
  blocks(Int<N>{});
  if constexpr (once<P>()) {
    blocks(Int<4>{});
  } else if (p < count && count > N) {  // some pixels again, to end with a whole block
    p = count - N, blocks(Int<N>{});
  }
  for (; p < count; ++p) depthwise_taps(rows, x + p * S * c, c, w, cp, K, down, {0, K}, pixel + p, put);
}

// `count` pixels of one row whose taps lie inside, horizontally, from that at rows[ky] + x on; false where no kernel is for them.
template <class T, class A, class P>
SEGFAST_INLINE bool depthwise_run(int64_t k, int64_t s, const T* const* rows, int64_t x, int64_t c, const A* w, int64_t cp,
                                  Range down, int64_t count, int64_t pixel, const P& put) {
  if (k == 3 && s == 1) return depthwise_run_of<3, 1>(rows, x, c, w, cp, down, count, pixel, put), true;
  if (k == 3 && s == 2) return depthwise_run_of<3, 2>(rows, x, c, w, cp, down, count, pixel, put), true;
  if (k == 5 && s == 1) return depthwise_run_of<5, 1>(rows, x, c, w, cp, down, count, pixel, put), true;
  if (k == 5 && s == 2) return depthwise_run_of<5, 2>(rows, x, c, w, cp, down, count, pixel, put), true;
  return false;
}

// Of the output pixels [ox0, ox1) of a row those whose taps all lie inside, horizontally; none where no kernel is for them.
struct Inside {
  int64_t first, last;
  SEGFAST_INLINE Inside(const Geometry& g, int64_t ox0, int64_t ox1) : first(ox1), last(ox1) {
    if (g.dh != 1 || g.dw != 1 || g.kh != g.kw || g.sh != g.sw || (g.kw != 3 && g.kw != 5) || (g.sw != 1 && g.sw != 2)) return;
    first = (g.pw + g.sw - 1) / g.sw;
    last = g.w - g.kw + g.pw < 0 ? 0 : (g.w - g.kw + g.pw) / g.sw + 1;
    first = first < ox0 ? ox0 : (first > ox1 ? ox1 : first);
    last = last < first ? first : (last > ox1 ? ox1 : last);
  }
};

// Outputs [ox0, ox1) of row oy of image n of a depthwise convolution of x [n][h][w][c], put at rows `at`, `at` + 1, ...
template <class T, class A, class P>
SEGFAST_INLINE void depthwise_row(const Geometry& g, const T* x, const A* w, int64_t cp, int64_t n, int64_t oy, int64_t ox0,
                                  int64_t ox1, int64_t at, const P& put) {
  const int64_t row = g.w * g.c, iy = oy * g.sh - g.ph;
  const Range down = taps_inside(iy, g.kh, g.dh, g.h);
  const T* rows[64];
  for (int64_t ky = down.begin; ky < down.end; ++ky) rows[ky] = x + (n * g.h + iy + ky * g.dh) * row;
  const auto [first, last] = Inside(g, ox0, ox1);
  for (int64_t ox = ox0; ox < ox1; ++ox) {
    const int64_t ix = ox * g.sw - g.pw, pixel = at + ox - ox0;
    if (ox == first && last > first) {
      depthwise_run(g.kw, g.sw, rows, ix * g.c, g.c, w, cp, down, last - first, pixel, put);
      ox = last - 1;
      continue;
    }
    depthwise_taps(rows, ix * g.c, g.dw * g.c, w, cp, g.kw, down, taps_inside(ix, g.kw, g.dw, g.w), pixel, put);
  }
}

// f(n, oy, ox0, ox1, offset) for each row segment of output pixels [begin, end); offset counts from begin.
template <class F>
SEGFAST_INLINE void each_row(const Geometry& g, int64_t begin, int64_t end, F f) {
  for (int64_t p = begin; p < end;) {
    const int64_t ox = p % g.ow, oy = p / g.ow % g.oh, n = p / g.ow / g.oh;
    const int64_t stop = p + (g.ow - ox < end - p ? g.ow - ox : end - p);
    f(n, oy, ox, ox + (stop - p), p - begin);
    p = stop;
  }
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>
#include <new>

namespace segfast {
namespace {

constexpr int64_t kPad = 16;  // every row is padded to whole vectors of the widest set

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// 64-byte aligned scratch, zeroed on request.
template <class A>
struct Buffer {
  A* p;
  explicit Buffer(int64_t n, bool zero = true)
      : p(static_cast<A*>(::operator new(sizeof(A) * (n + kPad), std::align_val_t(64)))) {
    if (zero) std::fill(p, p + n + kPad, A(0));
  }
  Buffer(Buffer&& other) noexcept : p(other.p) { other.p = nullptr; }
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(p, std::align_val_t(64)); }
};

}  // namespace
}  // namespace segfast
#endif
