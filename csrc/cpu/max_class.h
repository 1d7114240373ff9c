// The class of the largest value: the first of equal ones, and NaN wins, as in torch.argmax. It is carried as a number of the
// compute type. No include guard, as vec.h.
#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

template <class A>
SEGFAST_INLINE Mask<A> is_better(Vec<A> v, Vec<A> best) {
  return (v > best) | ((v != v) & (best == best));
}

template <class A>
struct Best {
  Vec<A> value, at, number;
  SEGFAST_INLINE void next(Vec<A> v) {
    const Mask<A> better = is_better<A>(v, value);
    value = better ? v : value;
    at = better ? number : at;
    number += splat<A>(1);
  }
};

// The best class of each of the `count` pixels from x on; nothing is read from `end` on, a vector is written past the last one.
template <class T, class A>
void argmax_pixels(const T* x, const T* end, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count,
                   A* index) {
  constexpr int L = lanes<A>;
  for (int64_t p = 0; p < count; p += L) {
    const int n = static_cast<int>(count - p < L ? count - p : L);
    const T* const from = x + p * pixel_stride;
    Best<A> best{splat(-static_cast<A>(__builtin_inff())), Vec<A>{}, Vec<A>{}};
    if (pixel_stride == 1) {
      for (int64_t c = 0; c < classes; ++c) best.next(load_n(from + c * class_stride, n));
    } else {
      for (int64_t c = 0; c < classes; c += L) {
        const int m = static_cast<int>(classes - c < L ? classes - c : L);
        Vec<A> rows[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          const T* const pixel = from + (i < n ? i : 0) * pixel_stride + c;
          rows[i] = pixel + L <= end ? load(pixel) : load_n(pixel, m);  // beyond a pixel's classes lie the next one's
        }
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (i < m) best.next(rows[i]);
        }
      }
    }
    store(index + p, best.at);
  }
}

// To element `at` of an array of integers of 1, 4 or 8 bytes.
template <class A>
void store_classes(const A* index, int64_t count, int64_t bytes, void* out, int64_t at) {
  const auto to = [&](auto* numbers) {
    for (int64_t i = 0; i < count; ++i) {
      numbers[at + i] = static_cast<std::remove_reference_t<decltype(*numbers)>>(static_cast<int32_t>(index[i]));
    }
  };
  if (bytes == 1) to(static_cast<uint8_t*>(out));
  if (bytes == 4) to(static_cast<int32_t*>(out));
  if (bytes == 8) to(static_cast<int64_t*>(out));
}

}  // namespace segfast::SEGFAST_ISA
#else
namespace segfast {
namespace {

ScalarType integer_of(const char* op, int64_t bytes) {
  STD_TORCH_CHECK(bytes == 1 || bytes == 4 || bytes == 8, op, ": want classes of 1, 4 or 8 bytes");
  return bytes == 1 ? ScalarType::Byte : bytes == 4 ? ScalarType::Int : ScalarType::Long;
}

}  // namespace
}  // namespace segfast
#endif
