#include "pixelwise_kl.cuh"
#include "stream.h"

namespace segfast {
namespace {

Counter counter("pixelwise_kl");

enum Reduction : int64_t { none, mean, sum, batchmean };

cuda::Logits logits(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return {x.data_ptr(), Dtype::float32};
    case ScalarType::Double:
      return {x.data_ptr(), Dtype::float64};
    case ScalarType::Half:
      return {x.data_ptr(), Dtype::float16};
    case ScalarType::BFloat16:
      return {x.data_ptr(), Dtype::bfloat16};
    default:
      STD_TORCH_CHECK(false, "pixelwise_kl: want float32, float64, float16 or bfloat16");
  }
}

// Both logits are read in the student's format.
std::tuple<Tensor, Tensor, Tensor> pixelwise_kl_cuda(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                                     double temperature, int64_t reduction, bool gradient) {
  counter.add();
  const cuda::OnDevice device(student);
  const bool channels_last = is_channels_last(student);
  const Tensor s = contiguous_as(student, channels_last), t = contiguous_as(teacher, channels_last);
  const bool wide = s.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide == (t.scalar_type() == ScalarType::Double), "pixelwise_kl: want both logits or neither in float64");
  const ScalarType result = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t n = s.size(0), classes = s.size(1), h = s.size(2), w = s.size(3);
  const Tensor valid = mask.has_value() ? torch::stable::contiguous(*mask) : s;
  const Tensor loss = reduction == none ? empty({n, h, w}, result, s) : empty({}, result, s);
  const Tensor saved = gradient ? empty({n, classes, h, w}, s.scalar_type(), s, channels_last) : empty({0}, s.scalar_type(), s);
  const Tensor scale = empty({}, result, s);
  const Tensor partials = empty({cuda::kl_tiles(n, classes, h * w, channels_last)}, ScalarType::Double, s);
  const Tensor count = empty({1}, ScalarType::Long, s);
  const cuda::KlCall call{
      .student = logits(s),
      .teacher = logits(t),
      .valid = mask.has_value() ? data<const bool>(valid) : nullptr,
      .images = n,
      .classes = classes,
      .area = h * w,
      .temperature = temperature,
      .divisor = reduction == mean        ? cuda::Divisor::pixels
                 : reduction == batchmean ? cuda::Divisor::images
                                          : cuda::Divisor::one,
      .saved = gradient ? saved.data_ptr() : nullptr,
      .losses = reduction == none ? loss.data_ptr() : nullptr,
      .loss = reduction == none ? nullptr : loss.data_ptr(),
      .scale = scale.data_ptr(),
      .partials = data<double>(partials),
      .count = data<unsigned long long>(count),
  };
  wide ? cuda::pixelwise_kl<double>(call, channels_last, device.stream())
       : cuda::pixelwise_kl<float>(call, channels_last, device.stream());
  cuda::check_launch("pixelwise_kl");
  return {loss, saved, scale};
}

}  // namespace
}  // namespace segfast

SEGFAST_CUDA_LIBRARY(m) { m.impl("pixelwise_kl", TORCH_BOX(&segfast::pixelwise_kl_cuda)); }
