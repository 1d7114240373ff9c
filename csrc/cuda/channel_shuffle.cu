#include "channel_shuffle.cuh"
#include "stream.h"

namespace segfast {
namespace {

Counter counter("channel_shuffle");

Tensor channel_shuffle_cuda(const Tensor& input, int64_t groups) {
  counter.add();
  const cuda::OnDevice device(input);
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, channels_last);
  const Tensor y = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x, channels_last);
  if (x.numel() == 0) return y;
  cuda::channel_shuffle(x.data_ptr(), y.data_ptr(), static_cast<int>(x.element_size()), x.size(0), x.size(1),
                        x.size(2) * x.size(3), groups, channels_last, device.stream());
  cuda::check_launch("channel_shuffle");
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CUDA, m) { m.impl("channel_shuffle", TORCH_BOX(&segfast::channel_shuffle_cuda)); }
