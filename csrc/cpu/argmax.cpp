// The best class of every pixel of a map, in either memory format: torch.argmax(x, 1), whose search over channels takes several
// times as long. The first of equal ones; NaN wins, as in PyTorch.
#define SEGFAST_FILE "argmax.cpp"
#include "each_isa.h"
#include "max_class.h"
#include "upsample.h"

#ifndef SEGFAST_KERNELS

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
      SEGFAST_CALL(store_classes<A>)(index, count, bytes, classes.data_ptr(), image * pixels + first);
    }
  });
}

Tensor argmax_cpu(const Tensor& x, int64_t bytes) {
  counter.add();
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.size(1) > 0, "argmax: want a map (N, C, H, W) of some classes on the CPU");
  const Source source(x);
  const Tensor classes = empty({source.images, source.height, source.width}, integer_of("argmax", bytes), source.x);
  if (classes.numel() == 0) return classes;
  dispatch_float("argmax", x.scalar_type(), [&](auto type) { argmax<decltype(type)>(source, classes, bytes); });
  return classes;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("argmax", TORCH_BOX(&segfast::argmax_cpu)); }
#endif
