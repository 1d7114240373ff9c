// Concatenation over channels of channels_last maps, with what often follows it in the same pass, for inference:
//   y = act(scale (cat(xs) + add) + shift),
// a BatchNorm of fixed statistics and ReLU or PReLU, each of them optional. float32 and bfloat16.
#define SEGFAST_FILE "concat_affine.cpp"
#include "each_isa.h"

#ifndef SEGFAST_CONCAT_AFFINE_TYPES
#define SEGFAST_CONCAT_AFFINE_TYPES
namespace segfast {

// Pixels of one map among those of the result, from channel `at` on; the vectors begin at that channel too.
template <class T>
struct Part {
  const T* x;
  int64_t channels, at, all;
  const T* add;  // of the result's channels
  const float *scale, *shift, *slope;
};

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

enum class After { kNothing, kRelu, kPrelu };

template <class T, bool ADD, bool AFFINE, After AFTER>
SEGFAST_INLINE void part_pixels(const Part<T>& o, int64_t begin, int64_t end, T* y) {
  constexpr int L = lanes<float>;
  const auto vector = [&](int64_t p, int64_t c, auto read, auto write) {
    Vec<float> v = read(o.x + p * o.channels + c);
    if constexpr (ADD) v += read(o.add + p * o.all + o.at + c);
    if constexpr (AFFINE) v = v * read(o.scale + c) + read(o.shift + c);
    if constexpr (AFTER == After::kRelu) v = v < Vec<float>{} ? Vec<float>{} : v;
    if constexpr (AFTER == After::kPrelu) v = v < Vec<float>{} ? v * read(o.slope + c) : v;
    write(y + p * o.all + o.at + c, v);
  };
  const int64_t whole = o.channels / L * L;
  const int left = static_cast<int>(o.channels - whole);
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t c = 0; c < whole; c += L) {
      vector(p, c, [](const auto* from) { return load(from); }, [](T* to, Vec<float> v) { store(to, v); });
    }
    if (left > 0) {
      vector(
          p, whole, [left](const auto* from) { return load_n(from, left); },
          [left](T* to, Vec<float> v) { store_n(to, v, left); });
    }
  }
}

template <class T, bool ADD, bool AFFINE>
SEGFAST_INLINE void with_after(const Part<T>& o, bool relu, int64_t begin, int64_t end, T* y) {
  if (o.slope != nullptr) return part_pixels<T, ADD, AFFINE, After::kPrelu>(o, begin, end, y);
  if (relu) return part_pixels<T, ADD, AFFINE, After::kRelu>(o, begin, end, y);
  part_pixels<T, ADD, AFFINE, After::kNothing>(o, begin, end, y);
}

template <class T>
void concat_part(const Part<T>& o, bool relu, int64_t begin, int64_t end, T* y) {
  if (o.add != nullptr && o.scale != nullptr) return with_after<T, true, true>(o, relu, begin, end, y);
  if (o.add != nullptr) return with_after<T, true, false>(o, relu, begin, end, y);
  if (o.scale != nullptr) return with_after<T, false, true>(o, relu, begin, end, y);
  with_after<T, false, false>(o, relu, begin, end, y);
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>

namespace segfast {
namespace {

Counter counter("concat_affine");

template <class T>
void concat_affine(const std::vector<Tensor>& xs, const std::optional<Tensor>& add, const float* scale, const float* shift,
                   const float* slope, bool relu, const Tensor& y) {
  const int64_t all = y.size(1), pixels = y.numel() / all;
  std::vector<Part<T> > parts;
  int64_t at = 0;
  for (const Tensor& x : xs) {
    const auto from = [&](const float* p) { return p == nullptr ? p : p + at; };
    parts.push_back({data<T>(x), x.size(1), at, all, add ? data<T>(*add) : nullptr, from(scale), from(shift), from(slope)});
    at += x.size(1);
  }
  const int64_t block = std::clamp<int64_t>(32768 / (all * static_cast<int64_t>(sizeof(T))), 8, 512);
  parallel_for(0, (pixels + block - 1) / block, 1, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      for (const Part<T>& part : parts) {
        SEGFAST_CALL(concat_part<T>)(part, relu, b * block, std::min((b + 1) * block, pixels), data<T>(y));
      }
    }
  });
}

Tensor concat_affine_cpu(const std::vector<Tensor>& maps, const std::optional<Tensor>& add, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, const std::optional<Tensor>& slope, bool relu) {
  counter.add();
  STD_TORCH_CHECK(!maps.empty() && maps[0].dim() == 4, "concat_affine: want maps (N, C, H, W)");
  const Tensor& first = maps[0];
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "concat_affine: want float32 or bfloat16");
  std::vector<Tensor> xs;
  int64_t channels = 0;
  for (const Tensor& x : maps) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.dim() == 4 && x.size(0) == first.size(0) &&
                        x.size(2) == first.size(2) && x.size(3) == first.size(3),
                    "concat_affine: want maps on the CPU of one dtype, one batch and one size");
    xs.push_back(contiguous_as(x, true));
    channels += x.size(1);
  }
  const Tensor y = empty({first.size(0), channels, first.size(2), first.size(3)}, dtype, first, true);
  std::optional<Tensor> more;
  if (add) {
    STD_TORCH_CHECK(add->scalar_type() == dtype && add->dim() == 4 && add->size(0) == y.size(0) && add->size(1) == channels &&
                        add->size(2) == y.size(2) && add->size(3) == y.size(3),
                    "concat_affine: want add of the shape and dtype of the result");
    more = contiguous_as(*add, true);
  }
  STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "concat_affine: want scale and shift, or neither");
  const auto vector = [&](const std::optional<Tensor>& v) -> const float* {
    if (!v) return nullptr;
    STD_TORCH_CHECK(v->scalar_type() == ScalarType::Float && v->is_contiguous() && v->numel() == channels,
                    "concat_affine: want scale, shift and slope in float32, one for each channel");
    return data<float>(*v);
  };
  if (y.numel() == 0) return y;
  const auto kernel = dtype == ScalarType::Float ? concat_affine<float> : concat_affine<BFloat16>;
  kernel(xs, more, vector(scale), vector(shift), vector(slope), relu, y);
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("concat_affine", TORCH_BOX(&segfast::concat_affine_cpu)); }
#endif
