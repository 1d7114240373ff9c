// Max-pooling of channels_last maps without the indices, which PyTorch's computes and keeps in any case: of float32 twice the
// bytes of the result. For inference; float32 and bfloat16. NaN wins, as in PyTorch.
#define SEGFAST_FILE "max_pool.cpp"
#include "each_isa.h"
#include "max_rows.h"
#ifndef SEGFAST_KERNELS
namespace segfast {
namespace {

using Ints = torch::headeronly::IntHeaderOnlyArrayRef;

Counter counter("max_pool");

template <class T>
void max_pool(const Windows& o, const Tensor& x, const Tensor& y) {
  const int64_t rows = y.size(2), columns = y.size(3);
  parallel_for(0, y.size(0) * rows, 1, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const T* const image = data<T>(x) + r / rows * o.height * o.width * o.channels;
      SEGFAST_CALL(max_row<T>)(o, image, r % rows, columns, data<T>(y) + r * columns * o.channels);
    }
  });
}

Tensor max_pool_cpu(const Tensor& input, Ints size, Ints kernel, Ints stride, Ints padding, Ints dilation) {
  counter.add();
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "max_pool: want a map (N, C, H, W) on the CPU in float32 or bfloat16");
  const Tensor x = contiguous_as(input, true);
  const Windows o = windows("max_pool", x.size(1), x.size(2), x.size(3), {size, kernel, stride, padding, dilation});
  const Tensor y = empty({x.size(0), x.size(1), size[0], size[1]}, dtype, x, true);
  if (y.numel() == 0) return y;
  dtype == ScalarType::Float ? max_pool<float>(o, x, y) : max_pool<BFloat16>(o, x, y);
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("max_pool", TORCH_BOX(&segfast::max_pool_cpu)); }
#endif
