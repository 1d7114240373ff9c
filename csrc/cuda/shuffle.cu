#include <algorithm>
#include <vector>

#include "shuffle.cuh"
#include "stream.h"

namespace segfast {
namespace {

Counter counter("channel_shuffle");
Counter counter_concat("concat_shuffle");
Counter counter_backward("concat_shuffle_backward");

Tensor channel_shuffle_cuda(const Tensor& input, int64_t groups) {
  counter.add();
  const cuda::OnDevice device(input);
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, channels_last);
  const Tensor y = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x, channels_last);
  if (x.numel() == 0) return y;
  cuda::channel_shuffle(x.data_ptr(), y.data_ptr(), x.element_size(), x.size(0), x.size(1), x.size(2) * x.size(3), groups,
                        channels_last, device.stream());
  cuda::check_launch("channel_shuffle");
  return y;
}

void launch(const std::vector<Tensor>& parts, const Tensor& whole, int64_t groups, cuda::Way way, bool channels_last,
            cudaStream_t stream) {
  if (whole.numel() == 0) return;
  std::vector<cuda::Part> filled;
  for (const Tensor& part : parts) {
    if (part.size(1) > 0) filled.push_back({part.data_ptr(), part.size(1)});
  }
  cuda::shuffle({filled.data(), static_cast<int>(filled.size()), whole.data_ptr(), static_cast<int64_t>(whole.element_size()),
                 whole.size(0), whole.size(1), whole.size(2) * whole.size(3), groups, stream},
                way, channels_last);
  cuda::check_launch("concat_shuffle");
}

Tensor like(const Tensor& x, int64_t channels, bool channels_last) {
  return empty({x.size(0), channels, x.size(2), x.size(3)}, x.scalar_type(), x, channels_last);
}

// More parts than a launch takes: runs of them are concatenated first (shuffled with one group, which is no shuffle).
Tensor concat_shuffle(const std::vector<Tensor>& tensors, int64_t groups, bool channels_last, cudaStream_t stream) {
  int64_t channels = 0;
  for (const Tensor& t : tensors) channels += t.size(1);
  const Tensor y = like(tensors[0], channels, channels_last);
  if (tensors.size() <= cuda::kMostParts) {
    launch(tensors, y, groups, cuda::Way::parts_to_whole, channels_last, stream);
    return y;
  }
  std::vector<Tensor> merged;
  for (size_t from = 0; from < tensors.size(); from += cuda::kMostParts) {
    const auto first = tensors.begin() + static_cast<int64_t>(from);
    const auto last = tensors.begin() + static_cast<int64_t>(std::min(from + cuda::kMostParts, tensors.size()));
    merged.push_back(concat_shuffle({first, last}, 1, channels_last, stream));
  }
  return concat_shuffle(merged, groups, channels_last, stream);
}

std::vector<Tensor> split_shuffle(const Tensor& whole, const std::vector<int64_t>& channels, int64_t groups, bool channels_last,
                                  cudaStream_t stream) {
  std::vector<Tensor> parts;
  if (channels.size() <= cuda::kMostParts) {
    for (const int64_t c : channels) parts.push_back(like(whole, c, channels_last));
    launch(parts, whole, groups, cuda::Way::whole_to_parts, channels_last, stream);
    return parts;
  }
  std::vector<std::vector<int64_t>> runs;
  std::vector<int64_t> widths;
  for (size_t from = 0; from < channels.size(); from += cuda::kMostParts) {
    runs.emplace_back(channels.begin() + static_cast<int64_t>(from),
                      channels.begin() + static_cast<int64_t>(std::min(from + cuda::kMostParts, channels.size())));
    widths.push_back(0);
    for (const int64_t c : runs.back()) widths.back() += c;
  }
  const std::vector<Tensor> merged = split_shuffle(whole, widths, groups, channels_last, stream);
  for (size_t r = 0; r < runs.size(); ++r) {
    for (const Tensor& part : split_shuffle(merged[r], runs[r], 1, channels_last, stream)) parts.push_back(part);
  }
  return parts;
}

Tensor concat_shuffle_cuda(std::vector<Tensor> tensors, int64_t groups) {
  counter_concat.add();
  const cuda::OnDevice device(tensors[0]);
  const bool channels_last = concat_channels_last(tensors);
  for (Tensor& t : tensors) t = contiguous_as(t, channels_last);
  return concat_shuffle(tensors, groups, channels_last, device.stream());
}

std::vector<Tensor> concat_shuffle_backward_cuda(const Tensor& grad, std::vector<int64_t> channels, int64_t groups) {
  counter_backward.add();
  const cuda::OnDevice device(grad);
  const bool channels_last = is_channels_last(grad);
  return split_shuffle(contiguous_as(grad, channels_last), channels, groups, channels_last, device.stream());
}

}  // namespace
}  // namespace segfast

SEGFAST_CUDA_LIBRARY(m) {
  m.impl("channel_shuffle", TORCH_BOX(&segfast::channel_shuffle_cuda));
  m.impl("concat_shuffle", TORCH_BOX(&segfast::concat_shuffle_cuda));
  m.impl("concat_shuffle_backward", TORCH_BOX(&segfast::concat_shuffle_backward_cuda));
}
