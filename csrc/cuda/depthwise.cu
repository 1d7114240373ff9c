#include "depthwise.cuh"
#include "stream.h"

namespace segfast {
namespace {

Counter counter("depthwise");
Counter counter_train("depthwise_train");

using Pair = std::vector<int64_t>;

cuda::DepthwiseShape shape_of(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
                              const Pair& dilation) {
  cuda::DepthwiseShape s{};
  s.images = x.size(0), s.channels = x.size(1);
  s.h = static_cast<int>(x.size(2)), s.w = static_cast<int>(x.size(3));
  s.kernel_h = static_cast<int>(weight.size(2)), s.kernel_w = static_cast<int>(weight.size(3));
  s.stride_h = static_cast<int>(stride[0]), s.stride_w = static_cast<int>(stride[1]);
  s.padding_h = static_cast<int>(padding[0]), s.padding_w = static_cast<int>(padding[1]);
  s.dilation_h = static_cast<int>(dilation[0]), s.dilation_w = static_cast<int>(dilation[1]);
  s.out_h = (s.h + 2 * s.padding_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  s.out_w = (s.w + 2 * s.padding_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  STD_TORCH_CHECK(s.kernel_h * s.kernel_w <= cuda::kMostTaps, "depthwise: want a kernel of at most 64 taps");
  return s;
}

// The per-channel vectors, in what the kernels compute in.
template <class A>
Tensor vector(const Tensor& x) {
  constexpr ScalarType dtype = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

Tensor depthwise_cuda(const Tensor& input, const Tensor& weight, const Tensor& scale, const Tensor& shift, Pair stride,
                      Pair padding, Pair dilation, int64_t act) {
  counter.add();
  const cuda::OnDevice device(input);
  const Tensor x = contiguous_as(input, false), w = contiguous_as(weight, false);
  const cuda::DepthwiseShape s = shape_of(x, w, stride, padding, dilation);
  const Tensor y = empty({s.images, s.channels, s.out_h, s.out_w}, x.scalar_type(), x);
  if (y.numel() == 0) return y;
  cuda::dispatch("depthwise", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = typename Wide<T>::type;
    const Tensor scale_ = vector<A>(scale), shift_ = vector<A>(shift);
    cuda::depthwise<T>(s, data<const T>(x), data<const T>(w), data<const A>(scale_), data<const A>(shift_),
                       static_cast<cuda::Act>(act), data<T>(y), device.stream());
  });
  cuda::check_launch("depthwise");
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_train_cuda(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                                                        Pair stride, Pair padding, Pair dilation) {
  counter_train.add();
  const cuda::OnDevice device(input);
  const Tensor x = contiguous_as(input, false), w = contiguous_as(weight, false);
  const cuda::DepthwiseShape s = shape_of(x, w, stride, padding, dilation);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor u = empty({s.images, s.channels, s.out_h, s.out_w}, x.scalar_type(), x);
  const Tensor mean = empty({s.channels}, wide, x), var = empty({s.channels}, wide, x);
  STD_TORCH_CHECK(u.numel() > 0, "depthwise_train: want values to take the statistics of");
  cuda::dispatch("depthwise_train", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = typename Wide<T>::type;
    const Tensor partials = empty({cuda::depthwise_partials<T>(s)}, ScalarType::Double, x);
    const Tensor bias_ = bias.has_value() ? vector<A>(*bias) : x;
    cuda::depthwise_train<T>(s, data<const T>(x), data<const T>(w), bias.has_value() ? data<const A>(bias_) : nullptr, data<T>(u),
                             data<double>(partials), data<A>(mean), data<A>(var), device.stream());
  });
  cuda::check_launch("depthwise_train");
  return {u, mean, var};
}

}  // namespace
}  // namespace segfast

SEGFAST_CUDA_LIBRARY(m) {
  m.impl("depthwise", TORCH_BOX(&segfast::depthwise_cuda));
  m.impl("depthwise_train", TORCH_BOX(&segfast::depthwise_train_cuda));
}
