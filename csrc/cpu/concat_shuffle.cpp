#include <cstring>

#include "shuffle.h"

namespace segfast {
namespace {

Counter counter("concat_shuffle");
Counter counter_backward("concat_shuffle_backward");

Tensor concat_shuffle_cpu(std::vector<Tensor> tensors, int64_t groups) {
  counter.add();
  const bool channels_last = concat_channels_last(tensors);
  int64_t channels = 0;
  for (Tensor& t : tensors) {
    t = contiguous_as(t, channels_last);
    channels += t.size(1);
  }
  const Tensor& x = tensors[0];
  const Tensor y = empty({x.size(0), channels, x.size(2), x.size(3)}, x.scalar_type(), x, channels_last);
  shuffle_copy(tensors, y, groups, Way::parts_to_whole, channels_last);
  return y;
}

std::vector<Tensor> concat_shuffle_backward_cpu(const Tensor& grad, std::vector<int64_t> channels, int64_t groups) {
  counter_backward.add();
  const bool channels_last = is_channels_last(grad);
  const Tensor whole = contiguous_as(grad, channels_last);
  std::vector<Tensor> grads;
  for (const int64_t c : channels) {
    grads.push_back(empty({grad.size(0), c, grad.size(2), grad.size(3)}, grad.scalar_type(), grad, channels_last));
  }
  shuffle_copy(grads, whole, groups, Way::whole_to_parts, channels_last);
  return grads;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("concat_shuffle", TORCH_BOX(&segfast::concat_shuffle_cpu));
  m.impl("concat_shuffle_backward", TORCH_BOX(&segfast::concat_shuffle_backward_cpu));
}
