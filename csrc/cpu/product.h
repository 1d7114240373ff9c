// The products over panels of words that the packed kernels share, and the depthwise rows over a ring; included once per
// instruction set, after fused_conv.h.
//
// A word is 4 bytes of a row's depth: a float, two bfloat16 or four bytes; a panel has the weights of 32 columns (the last may be
// of 16) for one word after the other.
#ifndef SEGFAST_PACKED_WORDS
#define SEGFAST_PACKED_WORDS
namespace segfast {

template <class T>
constexpr int64_t kPerWord = 4 / sizeof(T);
template <class T>
constexpr int64_t words(int64_t n) {
  return (n + kPerWord<T> - 1) / kPerWord<T>;
}
// Words of the depth of a 1 x 1 convolution's panel: whole steps of the matrix tiles, which floats have none of.
constexpr int64_t kTileWords = 16;
template <class T>
constexpr int64_t deep_words(int64_t n) {
  return sizeof(T) == 4 ? n : (words<T>(n) + kTileWords - 1) / kTileWords * kTileWords;
}
// Rows of the panel of a dense convolution: whole steps too where pixels are no whole number of words, as those of images.
template <class T>
constexpr int64_t panel_rows(int64_t c, int64_t taps) {
  if (taps == 1) return deep_words<T>(c);
  return c % kPerWord<T> == 0 ? taps * words<T>(c) : deep_words<T>(taps * words<T>(c) * kPerWord<T>);
}

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// One step of a product: a word of a row, broadcast, times a vector of words of a panel. The shift comes last where sums round:
// every step after it would round to its size.
template <class T>
struct Dot;
template <>
struct Dot<float> {
  using Sum = Vec<float>;
  using Left = float;
  using Right = Vec<float>;
  static SEGFAST_INLINE Sum start(const float*) { return Sum{}; }
  static SEGFAST_INLINE Sum finish(Sum sum, const float* shift) { return sum + load(shift); }
  static SEGFAST_INLINE Left left(const float* p) { return *p; }
  static SEGFAST_INLINE Right right(const float* p) { return load(p); }
  static SEGFAST_INLINE Vec<float> add(Vec<float> sum, Left a, Right b) { return sum + b * a; }
};
#if SEGFAST_DOT
template <>
struct Dot<BFloat16> {
  using Sum = Vec<float>;
  using Left = __m512bh;
  using Right = __m512bh;
  static SEGFAST_INLINE Sum start(const float*) { return Sum{}; }
  static SEGFAST_INLINE Sum finish(Sum sum, const float* shift) { return sum + load(shift); }
  static SEGFAST_INLINE Left left(const BFloat16* p) {
    int word;
    memcpy(&word, p, sizeof word);
    return (__m512bh)_mm512_set1_epi32(word);
  }
  static SEGFAST_INLINE Right right(const float* p) { return (__m512bh)_mm512_loadu_ps(p); }
  static SEGFAST_INLINE Vec<float> add(Vec<float> sum, Left a, Right b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#else
template <>
struct Dot<BFloat16> {
  using Sum = Vec<float>;
  struct Left {
    float low, high;
  };
  struct Right {
    Vec<float> low, high;
  };
  static SEGFAST_INLINE Sum start(const float*) { return Sum{}; }
  static SEGFAST_INLINE Sum finish(Sum sum, const float* shift) { return sum + load(shift); }
  static SEGFAST_INLINE Left left(const BFloat16* p) { return {widen(p[0]), widen(p[1])}; }
#ifdef __GNUC__
  static SEGFAST_INLINE Right right(const float* p) {
    const U32 bits = (U32)load(p);
    return {(Vec<float>)(bits << 16), (Vec<float>)(bits & 0xffff0000u)};
  }
#else
  static SEGFAST_INLINE Right right(const float* p) {
    BFloat16 two[2];
    memcpy(two, p, sizeof two);
    return {widen(two[0]), widen(two[1])};
  }
#endif
  static SEGFAST_INLINE Vec<float> add(Vec<float> sum, Left a, Right b) { return sum + b.low * a.low + b.high * a.high; }
};
#endif

// Four unsigned bytes of a map times four signed ones of the weights, exact in 32 bits (modulo 2^32 on the way).
template <>
struct Dot<uint8_t> {
  using Sum = I32;
  static SEGFAST_INLINE Sum start(const int32_t* p) {
    I32 v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static SEGFAST_INLINE Sum finish(Sum sum, const int32_t*) { return sum; }
#if SEGFAST_DOT
  using Left = __m512i;
  using Right = __m512i;
  static SEGFAST_INLINE Left left(const uint8_t* p) {
    int word;
    memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static SEGFAST_INLINE Right right(const float* p) { return _mm512_loadu_si512(p); }
  static SEGFAST_INLINE Sum add(Sum sum, Left a, Right b) { return (Sum)_mm512_dpbusd_epi32((__m512i)sum, a, b); }
#elif SEGFAST_BYTES > 16
  // Bytes as words of 16 bits, whose products two and two do not saturate as those of vpmaddubsw do.
#if SEGFAST_BYTES == 64
#define SEGFAST_I(name) _mm512_##name
  using Whole = __m512i;
#else
#define SEGFAST_I(name) _mm256_##name
  using Whole = __m256i;
#endif
  struct Left {
    Whole even, odd;
  };
  using Right = Left;
  static SEGFAST_INLINE Left left(const uint8_t* p) {
    int word;
    memcpy(&word, p, sizeof word);
    return {SEGFAST_I(set1_epi32)(word & 0x00ff00ff),
            SEGFAST_I(set1_epi32)(static_cast<int>(static_cast<unsigned>(word) >> 8 & 0x00ff00ff))};
  }
  static SEGFAST_INLINE Right right(const float* p) {
    Whole b;
    memcpy(&b, p, sizeof b);
    return {SEGFAST_I(srai_epi16)(SEGFAST_I(slli_epi16)(b, 8), 8), SEGFAST_I(srai_epi16)(b, 8)};
  }
  static SEGFAST_INLINE Sum add(Sum sum, Left a, Right b) {
    const Whole two = SEGFAST_I(add_epi32)(SEGFAST_I(madd_epi16)(a.even, b.even), SEGFAST_I(madd_epi16)(a.odd, b.odd));
    return (Sum)SEGFAST_I(add_epi32)((Whole)sum, two);
  }
#undef SEGFAST_I
#else
  struct Left {
    int32_t byte[4];
  };
  struct Right {
    I32 byte[4];
  };
  static SEGFAST_INLINE Left left(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static SEGFAST_INLINE Right right(const float* p) {
    U32 b;
    memcpy(&b, p, sizeof b);
    return {{(I32)(b << 24) >> 24, (I32)(b << 16) >> 24, (I32)(b << 8) >> 24, (I32)b >> 24}};
  }
  static SEGFAST_INLINE Sum add(Sum sum, Left a, Right b) {
    const I32 four = b.byte[0] * a.byte[0] + b.byte[1] * a.byte[1] + b.byte[2] * a.byte[2] + b.byte[3] * a.byte[3];
    return (I32)((U32)sum + (U32)four);
  }
#endif
};

// Rows whose sums stay in registers; two vectors of a panel are two registers more where words are taken apart.
template <class T>
constexpr int kDotRows = SEGFAST_BYTES == 64 ? 8 : (sizeof(T) == 4 ? 6 : 4);

// Floats that are summed one after the other: of thousands in one go the rounding errors would be three times eager's, of 180 in
// a transposed convolution still twice.
constexpr int64_t kDotDepth = 128;

// Where the rows of a product's left side come from: `parts` runs of `depth` words each, a row's run p at a[p] (in elements);
// the panel's rows for it from b[p] on.
struct Runs {
  int64_t parts, depth;
  const int64_t *a, *b;
};

// Deep: of more than kDotDepth words.
template <class T, int M, int V, bool Deep, class P>
SEGFAST_NOINLINE void micro_runs(const Runs& runs, const T* __restrict a, int64_t row, const float* __restrict b, int64_t width,
                                 int64_t first, int64_t col, const P put) {
  constexpr int L = lanes<float>;
  using Sum = typename Dot<T>::Sum;
  Sum acc[M][V];
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) acc[0][j] = Dot<T>::start(put.shift + col + j * L);
#pragma GCC unroll 16
  for (int i = 1; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = acc[0][j];
  }
  all_soon<M, V, float>(put, first, col);
  const int64_t step = V * L == 32 ? 32 : width;
  const auto sum = [&](const T* from, const float* panel, int64_t depth) {
#pragma GCC unroll 4
    for (int64_t d = 0; d < depth; ++d) {
      typename Dot<T>::Right bv[V];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) bv[j] = Dot<T>::right(panel + d * step + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const auto s = Dot<T>::left(from + i * row + d * kPerWord<T>);
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) acc[i][j] = Dot<T>::add(acc[i][j], s, bv[j]);
      }
    }
  };
  if constexpr (Deep) {
    Sum whole[M * V];
    for (int i = 0; i < M * V; ++i) whole[i] = Sum{};
    int64_t summed = 0;  // since the sums so far went to `whole`
    for (int64_t part = 0; part < runs.parts; ++part) {
      for (int64_t d = 0; d < runs.depth; d += kDotDepth) {
        if (summed >= kDotDepth) {
#pragma GCC unroll 16
          for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
              whole[i * V + j] += acc[i][j];
              acc[i][j] = Sum{};
            }
          }
          summed = 0;
        }
        const int64_t depth = runs.depth - d < kDotDepth ? runs.depth - d : kDotDepth;
        sum(a + runs.a[part] + d * kPerWord<T>, b + (runs.b[part] + d) * step, depth);
        summed += depth;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += whole[i * V + j];
    }
  } else {
    for (int64_t part = 0; part < runs.parts; ++part) sum(a + runs.a[part], b + runs.b[part] * step, runs.depth);
  }
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) {
    const auto* shift = put.shift + col + j * L;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) acc[i][j] = Dot<T>::finish(acc[i][j], shift);
  }
  if constexpr (P::clamps) {
    if (col + V * L <= put.cols) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        if constexpr (V == 2) {
          put.put_pair(first + i, col, acc[i][0], acc[i][1]);
        } else {
          put.put(first + i, col, acc[i][0]);
        }
      }
      return;
    }
  }
  // Through memory: unrolled, the activations would be as much code as all else.
  typename Dot<T>::Sum kept[M * V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) kept[i * V + j] = acc[i][j];
  }
#pragma GCC unroll 1
  for (int i = 0; i < M * V; ++i) put.put_part(first + i / V, col + i % V * L, kept[i]);
}

}  // namespace segfast::SEGFAST_ISA
#endif
#include "tiles.h"
#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// rows x (the sum of the runs' depths) times panels of 32 columns, whose rows number `total` words.
template <class T, class P, class F = NothingAhead>
SEGFAST_INLINE void runs_product(int64_t rows, const Runs& runs, const T* a, int64_t row, const float* panels, int64_t total,
                                 int64_t padded, const P& put, const F& ahead = {}) {
  constexpr int L = lanes<float>, M = kDotRows<T>;
  int64_t done = 0;
#if SEGFAST_AMX
  if constexpr (sizeof(T) < 4) {
    if (runs.depth % kTileWords == 0) {
      done = rows / 16 * 16;
      tile_product(done, runs, a, row, panels, total, padded, put, ahead);
      if (done == rows) return;
    }
  }
#endif
  for (int64_t col0 = 0; col0 < padded; col0 += 32) {
    const int64_t width = padded - col0 < 32 ? padded - col0 : 32, used = put.cols - col0 < width ? put.cols - col0 : width;
    const float* panel = panels + col0 * total;
    const auto columns = [&](auto vectors, int64_t j) {
      constexpr int V = decltype(vectors)::value;
      const auto blocks = [&](auto deep) {
        constexpr bool Deep = decltype(deep)::value != 0;
        int64_t i = done;
        const auto of = [&](auto m) {
          constexpr int N = decltype(m)::value;
          for (; i + N <= rows; i += N) {
            part_ahead<N>(ahead, i, col0 / 32, (padded + 31) / 32);
            micro_runs<T, N, V, Deep>(runs, a + i * row, row, panel + j, width, i, col0 + j, put);
          }
        };
        of(Int<M>{}), of(Int<4>{}), of(Int<2>{}), of(Int<1>{});
      };
      if constexpr (std::is_same_v<T, float>) {
        if (runs.parts * runs.depth > kDotDepth) return blocks(Int<1>{});
      }
      blocks(Int<0>{});
    };
    int64_t j = 0;
    for (; j + L < used; j += 2 * L) columns(Int<2>{}, j);
    for (; j < used; j += L) columns(Int<1>{}, j);
  }
}

// The same for runs too short for the matrix tiles, of at most `most` parts: through `patch` [rows][total] words, zero at
// first, or null.
template <class T, class P>
SEGFAST_INLINE void short_runs_product(int64_t rows, const Runs& runs, [[maybe_unused]] int64_t most, const T* a, int64_t row,
                                       const float* panels, int64_t total, int64_t padded, [[maybe_unused]] T* patch,
                                       const P& put) {
#if SEGFAST_AMX
  if constexpr (sizeof(T) < 4) {
    if (patch && runs.depth <= kPatchWords) {
      const int64_t zero = 0;
      if (runs.parts < most) memset(patch, 0, static_cast<size_t>(rows * total * 4));  // of earlier rows
      gather_runs(rows, runs, a, row, total, patch);
      runs_product(rows, Runs{1, total, &zero, &zero}, patch, total * kPerWord<T>, panels, total, padded, put);
      return;
    }
  }
#endif
  runs_product(rows, runs, a, row, panels, total, padded, put);
}

// `depth` elements; rows whose words are whole: lda even, and zero after an odd depth; if `deep`, up to deep_words.
template <class T, class P, class F = NothingAhead>
SEGFAST_INLINE void plain_product(int64_t rows, int64_t depth, const T* a, int64_t lda, const float* panels, int64_t padded,
                                  bool deep, const P& put, const F& ahead = {}) {
  const int64_t zero = 0, total = deep_words<T>(depth);
  runs_product(rows, Runs{1, deep ? total : words<T>(depth), &zero, &zero}, a, lda, panels, total, padded, put, ahead);
}

// Outputs [0, count) of a depthwise convolution whose taps all lie inside: rows[ky] is null where the kernel leaves the image.
template <class T, class P>
SEGFAST_INLINE void depthwise_inside(const Geometry& g, const T* const* rows, const float* w, int64_t cp, int64_t count,
                                     const P& put) {
  Range down{0, g.kh};
  while (down.begin < down.end && !rows[down.begin]) ++down.begin;
  while (down.end > down.begin && !rows[down.end - 1]) --down.end;
  if (g.dw == 1 && depthwise_run(g.kw, g.sw, rows, 0, cp, w, cp, down, count, 0, put)) return;
  for (int64_t p = 0; p < count; ++p) depthwise_taps(rows, p * g.sw * cp, g.dw * cp, w, cp, g.kw, down, {0, g.kw}, p, put);
}

}  // namespace segfast::SEGFAST_ISA
#endif
