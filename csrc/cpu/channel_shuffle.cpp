#define SEGFAST_FILE "channel_shuffle.cpp"
#include "each_isa.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// Channels last: rows [begin, end) of C elements each; y[row][i * groups + g] = x[row][g * per_group + i].
template <class T>
void channel_shuffle_rows(const T* x, T* y, int64_t begin, int64_t end, int64_t groups, int64_t per_group) {
  const int64_t channels = groups * per_group;
  for (int64_t row = begin; row < end; ++row) {
    const T* from = x + row * channels;
    T* to = y + row * channels;
    if (groups == 2) {
      for (int64_t i = 0; i < per_group; ++i) {
        to[2 * i] = from[i];
        to[2 * i + 1] = from[per_group + i];
      }
      continue;
    }
    for (int64_t i = 0; i < per_group; ++i) {
      for (int64_t g = 0; g < groups; ++g) to[i * groups + g] = from[g * per_group + i];
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("channel_shuffle");

template <class T>
void channel_shuffle_typed(const Tensor& x, const Tensor& y, int64_t groups, bool channels_last) {
  const int64_t channels = x.size(1), per_group = channels / groups, area = x.size(2) * x.size(3);
  const T* from = data<T>(x);
  T* to = data<T>(y);
  if (channels_last) {
    const int64_t rows = x.size(0) * area;
    parallel_for(0, rows, 32768 / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
      SEGFAST_CALL(channel_shuffle_rows<T>)(from, to, begin, end, groups, per_group);
    });
    return;
  }
  parallel_for(0, x.size(0) * channels, 32768 / (area + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {  // plane = n * C + i * groups + g
      const int64_t n = plane / channels, c = plane % channels;
      const int64_t source = n * channels + (c % groups) * per_group + c / groups;
      std::memcpy(to + plane * area, from + source * area, area * sizeof(T));
    }
  });
}

Tensor channel_shuffle_cpu(const Tensor& input, int64_t groups) {
  counter.add();
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, channels_last);
  const Tensor y = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x, channels_last);
  if (x.numel() == 0) return y;
  struct Pair {
    uint64_t a, b;
  };
  switch (x.element_size()) {  // a shuffle moves bits: the width is all that matters
    case 1:
      channel_shuffle_typed<uint8_t>(x, y, groups, channels_last);
      break;
    case 2:
      channel_shuffle_typed<uint16_t>(x, y, groups, channels_last);
      break;
    case 4:
      channel_shuffle_typed<uint32_t>(x, y, groups, channels_last);
      break;
    case 8:
      channel_shuffle_typed<uint64_t>(x, y, groups, channels_last);
      break;
    default:
      channel_shuffle_typed<Pair>(x, y, groups, channels_last);
  }
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("channel_shuffle", TORCH_BOX(&segfast::channel_shuffle_cpu)); }
#endif
