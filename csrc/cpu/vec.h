// The small vector type of the CPU kernels; included once per instruction set by each_isa.h, so it has no include guard.
//
// Vec<A> holds SEGFAST_BYTES of the compute type A (float or double) and has the operators of a scalar; lanes<A> says how
// many. Storage types T (float, double, BFloat16, Half) are converted by load and store; compute<T> is the type to
// accumulate in. Without GCC's vector extension (MSVC) a vector has one lane.
namespace segfast::SEGFAST_ISA {

#ifdef __GNUC__
#define SEGFAST_INLINE inline __attribute__((always_inline))
#define SEGFAST_NOINLINE __attribute__((noinline))
#else
#define SEGFAST_INLINE inline
#define SEGFAST_NOINLINE
#endif

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using compute = typename ComputeOf<T>::type;

#ifdef __GNUC__
template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(SEGFAST_BYTES)));
  typedef A unaligned __attribute__((vector_size(SEGFAST_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
constexpr int lanes = SEGFAST_BYTES / sizeof(A);
#else
template <class A>
struct VecOf {
  using type = A;
  using unaligned = A;
};
template <class A>
constexpr int lanes = 1;
#endif
template <class A>
using Vec = typename VecOf<A>::type;

template <class A>
SEGFAST_INLINE Vec<A> splat(A a) {
  return a - Vec<A>{};  // nothing to compute: + would make 0 of -0
}

// NaN stays NaN, which x86's own maximum gives if v is its second operand.
template <class A>
SEGFAST_INLINE Vec<A> no_less(Vec<A> v, Vec<A> low) {
#if SEGFAST_BYTES == 64
  if constexpr (std::is_same_v<A, float>) return (Vec<float>)_mm512_max_ps((__m512)low, (__m512)v);
#elif SEGFAST_BYTES == 32
  if constexpr (std::is_same_v<A, float>) return (Vec<float>)_mm256_max_ps((__m256)low, (__m256)v);
#endif
  return v < low ? low : v;
}
template <class A>
SEGFAST_INLINE Vec<A> no_more(Vec<A> v, Vec<A> high) {
#if SEGFAST_BYTES == 64
  if constexpr (std::is_same_v<A, float>) return (Vec<float>)_mm512_min_ps((__m512)high, (__m512)v);
#elif SEGFAST_BYTES == 32
  if constexpr (std::is_same_v<A, float>) return (Vec<float>)_mm256_min_ps((__m256)high, (__m256)v);
#endif
  return v > high ? high : v;
}

template <class A>
SEGFAST_INLINE A& lane(Vec<A>& v, int i) {
  return reinterpret_cast<A*>(&v)[i];
}

SEGFAST_INLINE float widen(float x) { return x; }
SEGFAST_INLINE double widen(double x) { return x; }
SEGFAST_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
SEGFAST_INLINE float widen(uint8_t x) { return x; }
SEGFAST_INLINE float widen(Half x) { return static_cast<float>(x); }

template <class T>
SEGFAST_INLINE T narrow_to(compute<T> x) {
  return static_cast<T>(x);
}

// Loads lanes<A> elements.
SEGFAST_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const VecOf<float>::unaligned*>(p); }
SEGFAST_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const VecOf<double>::unaligned*>(p); }
SEGFAST_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<VecOf<float>::unaligned*>(p) = v; }
SEGFAST_INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<VecOf<double>::unaligned*>(p) = v; }

#ifdef __GNUC__
typedef uint32_t U32 __attribute__((vector_size(SEGFAST_BYTES)));
typedef int32_t I32 __attribute__((vector_size(SEGFAST_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(SEGFAST_BYTES / 2)));
typedef uint8_t U8 __attribute__((vector_size(SEGFAST_BYTES / 4)));

SEGFAST_INLINE Vec<float> to_float(I32 v) { return __builtin_convertvector(v, Vec<float>); }
SEGFAST_INLINE I32 to_int(Vec<float> v) { return __builtin_convertvector(v, I32); }
SEGFAST_INLINE Vec<float> load(const uint8_t* p) {
#if SEGFAST_BYTES == 64
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif SEGFAST_BYTES == 32
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  U8 bytes;
  memcpy(&bytes, p, sizeof bytes);
  return to_float(__builtin_convertvector(bytes, I32));
#endif
}
// Values from 0 to 255.
SEGFAST_INLINE void store(uint8_t* p, I32 v) {
#if SEGFAST_BYTES == 64
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#elif SEGFAST_BYTES == 32
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  const U8 bytes = __builtin_convertvector(v, U8);
  memcpy(p, &bytes, sizeof bytes);
#endif
}
// To the nearest integer, halves to the even one; for values within 2^22 of zero.
SEGFAST_INLINE I32 round_to_int(Vec<float> v) { return (I32)(v + 12582912.0f) - 0x4b400000; }
// A value of its own: the compiler fuses neither the load that it comes from with each of its uses, nor a product with a sum.
template <class V>
SEGFAST_INLINE V in_register(V v) {
#if defined(__x86_64__) && SEGFAST_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// GCC's own conversions between words of different widths go by halves or lane by lane.
SEGFAST_INLINE Vec<float> load(const BFloat16* p) {
#if SEGFAST_BYTES == 64
  return (Vec<float>)((U32)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#elif SEGFAST_BYTES == 32
  return (Vec<float>)((U32)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  U16 half;
  memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, U32) << 16);
#endif
}
// Round to nearest even; NaN stays NaN.
SEGFAST_INLINE void store(BFloat16* p, Vec<float> v) {
#if SEGFAST_DOT
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &half, sizeof half);
#else
  const U32 bits = (U32)v;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = (bits >> 16) | 0x40u;
  const U32 words = (U32)(v == v ? (I32)rounded : (I32)nan);
#if SEGFAST_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)words));
#else
  const U16 half = __builtin_convertvector(words, U16);
  memcpy(p, &half, sizeof half);
#endif
#endif
}
#else
using I32 = int32_t;
using U32 = uint32_t;
SEGFAST_INLINE Vec<float> to_float(I32 v) { return static_cast<float>(v); }
SEGFAST_INLINE I32 to_int(Vec<float> v) { return static_cast<int32_t>(v); }
SEGFAST_INLINE Vec<float> load(const uint8_t* p) { return *p; }
SEGFAST_INLINE void store(uint8_t* p, I32 v) { *p = static_cast<uint8_t>(v); }
SEGFAST_INLINE I32 round_to_int(Vec<float> v) { return static_cast<int32_t>(::nearbyintf(v)); }
template <class V>
SEGFAST_INLINE V in_register(V v) {
  return v;
}
SEGFAST_INLINE Vec<float> load(const BFloat16* p) { return widen(*p); }
SEGFAST_INLINE void store(BFloat16* p, Vec<float> v) { *p = BFloat16(v); }
#endif
SEGFAST_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < lanes<float>; ++i) lane<float>(v, i) = widen(p[i]);
  return v;
}
SEGFAST_INLINE void store(Half* p, Vec<float> v) {
  for (int i = 0; i < lanes<float>; ++i) p[i] = Half(lane<float>(v, i));
}

// The first n lanes only; the others read as `fill` and are not written.
template <class T>
SEGFAST_INLINE Vec<compute<T>> load_n(const T* p, int n, compute<T> fill = 0) {
  using A = compute<T>;
  if (n >= lanes<A>) return load(p);
#if SEGFAST_BYTES == 64
  if constexpr (sizeof(T) == sizeof(A) && sizeof(A) == 4) {
    return (Vec<A>)_mm512_mask_loadu_ps((__m512)splat<A>(fill), static_cast<__mmask16>((1u << n) - 1), p);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    const U32 bits = (U32)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)) << 16;
    return (Vec<float>)_mm512_mask_mov_ps((__m512)splat<A>(fill), mask, (__m512)bits);
  }
#endif
  Vec<A> v = splat<A>(fill);
  for (int i = 0; i < n; ++i) lane<A>(v, i) = widen(p[i]);
  return v;
}
template <class T>
SEGFAST_INLINE void store_n(T* p, Vec<compute<T>> v, int n) {
  using A = compute<T>;
  if (n >= lanes<A>) return store(p, v);
#if SEGFAST_BYTES == 64
  if constexpr (sizeof(T) == sizeof(A) && sizeof(A) == 4) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    BFloat16 all[16];
    store(all, v);
    __m256i half;
    memcpy(&half, all, sizeof half);
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), half);
  }
#endif
  for (int i = 0; i < n; ++i) p[i] = narrow_to<T>(lane<A>(v, i));
}

// Two vectors, one after the other.
template <class T>
SEGFAST_INLINE void store_pair(T* p, Vec<compute<T>> v, Vec<compute<T>> w) {
#if SEGFAST_DOT
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)w, (__m512)v);
    memcpy(p, &both, sizeof both);
    return;
  }
#endif
  store(p, v);
  store(p + lanes<compute<T>>, w);
}

// exp within 2 ulp: 0 below 2^-126 (AVX-512: denormal there), infinity above 2^127, NaN kept. Round to n = x / ln 2 by adding
// 1.5 * 2^23, whose low bits then hold n; a polynomial for the rest. Below: of an x below 88, as a number less the greatest.
#ifdef __GNUC__
template <bool Below = false>
SEGFAST_INLINE Vec<float> exp(Vec<float> x) {
#if SEGFAST_BYTES == 64
  // Beyond these bounds the result is 0 or infinity. Of two operands that are not ordered, max and min give the second.
  x = (Vec<float>)_mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x);
  if constexpr (!Below) x = (Vec<float>)_mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x);
#endif
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec<float> r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vec<float> p = splat(1.98756915e-4f);
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345191e-3f;
  p = p * r + 4.16657959e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
#if SEGFAST_BYTES == 64
  return (Vec<float>)_mm512_scalef_ps((__m512)(p * (r * r) + (r + 1.0f)), (__m512)n);
#else
  p = p * r * r + r + 1.0f;
  const Vec<float> y = p * (Vec<float>)(((I32)shifted << 23) + 0x3f800000);  // NaN if x is: p is NaN
  const Vec<float> low = x < -87.3365f ? Vec<float>{} : y;
  if constexpr (Below) return low;
  return x > 88.0296f ? splat(__builtin_inff()) : low;
#endif
}
// Natural logarithm of a normal number > 0 within 2 ulp; NaN and infinity kept.
SEGFAST_INLINE Vec<float> log(Vec<float> x) {
  const I32 bits = (I32)x - 0x3f3504f3;  // sqrt(1/2): the mantissa comes out within [sqrt(1/2), sqrt(2))
  const Vec<float> exponent = __builtin_convertvector(bits >> 23, Vec<float>);
  const Vec<float> f = (Vec<float>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec<float> p = splat(7.0376836292e-2f);
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> z = f * f;
  const Vec<float> y = (f + (p * f * z + exponent * -2.12194440e-4f - z * 0.5f)) + exponent * 0.693359375f;
  return x < __builtin_inff() ? y : x;
}
#else
template <bool Below = false>
SEGFAST_INLINE Vec<float> exp(Vec<float> x) {
  return ::expf(x);
}
SEGFAST_INLINE Vec<float> log(Vec<float> x) { return ::logf(x); }
#endif
template <bool Below = false>
SEGFAST_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) lane<double>(x, i) = ::exp(lane<double>(x, i));
  return x;
}
SEGFAST_INLINE Vec<double> log(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) lane<double>(x, i) = ::log(lane<double>(x, i));
  return x;
}

// Past the caches, to an address that is a multiple of the vector; `fence` before another thread reads it.
SEGFAST_INLINE void stream(float* p, Vec<float> v) {
#if SEGFAST_BYTES == 64
  _mm512_stream_ps(p, (__m512)v);
#elif SEGFAST_BYTES == 32
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
SEGFAST_INLINE void fence() {
#if SEGFAST_BYTES > 16
  _mm_sfence();
#endif
}

// The first n lanes only; where `past`, which is for whole vectors of floats alone, as `stream`.
template <class T>
SEGFAST_INLINE void store_past(T* p, Vec<compute<T>> v, int n, [[maybe_unused]] bool past) {
  if constexpr (std::is_same_v<T, float>) {
    if (past) return stream(p, v);
  }
  store_n(p, v, n);
}

// May name any address.
SEGFAST_INLINE void prefetch([[maybe_unused]] const void* p) {
#ifdef __GNUC__
  __builtin_prefetch(p);
#endif
}

// What will be written.
SEGFAST_INLINE void prefetch_to([[maybe_unused]] const void* p) {
#ifdef __GNUC__
  __builtin_prefetch(p, 1);
#endif
}

SEGFAST_INLINE void prefetch_l2([[maybe_unused]] const void* p) {
#ifdef __GNUC__
  __builtin_prefetch(p, 0, 2);
#endif
}

// to[i] += v[i]
SEGFAST_INLINE void add_wide(double* to, Vec<float> v) {
#if SEGFAST_BYTES == 64
  _mm512_storeu_pd(to, _mm512_loadu_pd(to) + _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)));
  _mm512_storeu_pd(to + 8, _mm512_loadu_pd(to + 8) + _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)));
#elif SEGFAST_BYTES == 32
  _mm256_storeu_pd(to, _mm256_loadu_pd(to) + _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)));
  _mm256_storeu_pd(to + 4, _mm256_loadu_pd(to + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)));
#else
  for (int i = 0; i < lanes<float>; ++i) to[i] += lane<float>(v, i);
#endif
}
SEGFAST_INLINE void add_wide(double* to, Vec<double> v) { store(to, load(to) + v); }

template <class A>
SEGFAST_INLINE A sum_lanes(Vec<A> v) {
  A total = 0;
  for (int i = 0; i < lanes<A>; ++i) total += lane<A>(v, i);
  return total;
}

template <class A>
using Mask = decltype(Vec<A>{} < Vec<A>{});

// A block of a vector's lanes squared, transposed in registers.
#if defined(__GNUC__) && !defined(__clang__)
template <class A, int H, int... L>
SEGFAST_INLINE void swap_blocks(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, L...>) {
  const Vec<A> upper = __builtin_shuffle(a, b, Mask<A>{((L & H) ? lanes<A> + L - H : L)...});
  b = __builtin_shuffle(a, b, Mask<A>{((L & H) ? lanes<A> + L : L + H)...});
  a = upper;
}
template <class A, int H = 1>
SEGFAST_INLINE void transpose(Vec<A>* rows) {
  if constexpr (H < lanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<A>; ++i) {
      if ((i & H) == 0) swap_blocks<A, H>(rows[i], rows[i + H], std::make_integer_sequence<int, lanes<A>>{});
    }
    transpose<A, 2 * H>(rows);
  }
}
#else
template <class A>
SEGFAST_INLINE void transpose(Vec<A>* rows) {
  for (int i = 0; i < lanes<A>; ++i) {
    for (int j = 0; j < i; ++j) {
      const A kept = lane<A>(rows[i], j);
      lane<A>(rows[i], j) = lane<A>(rows[j], i);
      lane<A>(rows[j], i) = kept;
    }
  }
}
#endif

}  // namespace segfast::SEGFAST_ISA
