// The best class of every pixel of a map, in either memory format: torch.argmax(x, 1), whose search over channels takes several
// times as long. The first of equal ones; NaN wins, as in PyTorch.
#define SEGFAST_FILE "argmax.cpp"
#include "each_isa.h"
#include "upsample.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

template <class A>
struct Best {
  Vec<A> value, at, number;
  SEGFAST_INLINE void next(Vec<A> v) {
    const Mask<A> better = (v > value) | ((v != v) & (value == value));
    value = better ? v : value;
    at = better ? number : at;
    number += splat<A>(1);
  }
};

// Of the `count` pixels from x on; nothing is read from `end` on.
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

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("argmax");
constexpr int64_t kPixels = 2048;  // at a time

template <class T>
void argmax(const Source& source, const Tensor& classes, int64_t bytes) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t pixels = source.height * source.width, pieces = (pixels + kPixels - 1) / kPixels;
  const T* const x = data<const T>(source.x);
  parallel_for(0, source.images * pieces, 1, [&](int64_t from, int64_t to) {
    Scratch<A> scratch(kPixels);
    A* const index = scratch.take(kPixels);
    for (int64_t task = from; task < to; ++task) {
      const int64_t image = task / pieces, first = task % pieces * kPixels, count = std::min(kPixels, pixels - first);
      SEGFAST_CALL(argmax_pixels<T, A>)
      (x + image * source.classes * pixels + first * source.pixel_stride, x + source.x.numel(), source.class_stride,
       source.pixel_stride, source.classes, count, index);
      store_line(index, count, classes, image * pixels + first, bytes);
    }
  });
}

Tensor argmax_cpu(const Tensor& x, int64_t bytes) {
  counter.add();
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(1) > 0 && (bytes == 1 || bytes == 4 || bytes == 8),
                  "argmax: want a map (N, C, H, W) of some classes on the CPU, and classes of 1, 4 or 8 bytes");
  const Source source(x);
  const Tensor classes = empty({source.images, source.height, source.width}, integer_of(bytes), source.x);
  if (classes.numel() == 0) return classes;
  dispatch_float("argmax", x.scalar_type(), [&](auto type) { argmax<decltype(type)>(source, classes, bytes); });
  return classes;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("argmax", TORCH_BOX(&segfast::argmax_cpu)); }
#endif
