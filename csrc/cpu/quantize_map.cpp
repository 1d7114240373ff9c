// Maps to and from uint8, for inference, with the bits of PyTorch's quantized_decomposed operations:
//   q = clamp(round(x (1 / scale)) + zero, 0, 255),  x = (q - zero) scale,  to channels_last.
#define SEGFAST_FILE "quantize_map.cpp"
#include "each_isa.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

SEGFAST_INLINE I32 to_byte(Vec<float> v, float inverse, int32_t zero) {
  const Vec<float> low = splat(static_cast<float>(-zero)), high = splat(static_cast<float>(255 - zero));
  v = in_register(v * inverse);
  v = v > low ? v : low;  // of NaN the least
  v = v < high ? v : high;
  return round_to_int(v) + zero;
}

template <class U>
void quantize_run(const float* x, int64_t count, float inverse, int32_t zero, U* out) {
  constexpr int L = lanes<float>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, to_byte(load(x + i), inverse, zero));
  if (i < count) {
    U last[64];
    const int n = static_cast<int>(count - i);
    store(last, to_byte(load_n(x + i, n), inverse, zero));
    memcpy(out + i, last, n);
  }
}

// A row of an image whose planes are `plane` apart.
template <class U>
void quantize_planes(const float* x, int64_t plane, int64_t channels, int64_t width, float inverse, int32_t zero, U* row,
                     U* out) {
  for (int64_t c = 0; c < channels; ++c) {
    quantize_run(x + c * plane, width, inverse, zero, row);
    for (int64_t i = 0; i < width; ++i) out[i * channels + c] = row[i];
  }
}

template <class U>
void dequantize_run(const U* x, int64_t count, float scale, float zero, float* out) {
  constexpr int L = lanes<float>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(out + i, (load(x + i) - zero) * scale);
  for (; i < count; ++i) out[i] = (static_cast<float>(x[i]) - zero) * scale;
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>

namespace segfast {
namespace {

Counter quantize_counter("quantize_map"), dequantize_counter("dequantize_map");
constexpr int64_t kRun = 16384;  // elements

void want(const char* op, const Tensor& x, ScalarType dtype, double scale, int64_t zero) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == dtype, op,
                  ": want a map (N, C, H, W) on the CPU, of float32 to quantize and of uint8 to dequantize");
  STD_TORCH_CHECK(scale > 0 && zero >= 0 && zero <= 255, op, ": want a scale > 0 and a zero point from 0 to 255");
}

Tensor quantize_map_cpu(const Tensor& input, double scale, int64_t zero) {
  quantize_counter.add();
  want("quantize_map", input, ScalarType::Float, scale, zero);
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  const bool planar = input.is_contiguous() && c > 1;
  const Tensor x = planar ? input : contiguous_as(input, true);
  const Tensor y = empty({n, c, h, w}, ScalarType::Byte, x, true);
  const auto inverse = static_cast<float>(1.0 / scale);
  const auto shift = static_cast<int32_t>(zero);
  if (y.numel() == 0) return y;
  if (planar) {
    parallel_for(0, n * h, 8, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> row(w + 64);
      for (int64_t r = begin; r < end; ++r) {
        const float* from = data<float>(x) + (r / h * c * h + r % h) * w;
        SEGFAST_CALL(quantize_planes<uint8_t>)(from, h * w, c, w, inverse, shift, row.data(), data<uint8_t>(y) + r * w * c);
      }
    });
    return y;
  }
  const int64_t all = y.numel();
  parallel_for(0, (all + kRun - 1) / kRun, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kRun, count = std::min(end * kRun, all) - from;
    SEGFAST_CALL(quantize_run<uint8_t>)(data<float>(x) + from, count, inverse, shift, data<uint8_t>(y) + from);
  });
  return y;
}

Tensor dequantize_map_cpu(const Tensor& input, double scale, int64_t zero) {
  dequantize_counter.add();
  want("dequantize_map", input, ScalarType::Byte, scale, zero);
  const Tensor x = contiguous_as(input, true);
  const Tensor y = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Float, x, true);
  const int64_t all = y.numel();
  parallel_for(0, (all + kRun - 1) / kRun, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kRun, count = std::min(end * kRun, all) - from;
    SEGFAST_CALL(dequantize_run<uint8_t>)
    (data<uint8_t>(x) + from, count, static_cast<float>(scale), static_cast<float>(zero), data<float>(y) + from);
  });
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("quantize_map", TORCH_BOX(&segfast::quantize_map_cpu));
  m.impl("dequantize_map", TORCH_BOX(&segfast::dequantize_map_cpu));
}
#endif
