// Channel shuffle on CUDA: bits are moved, so the width of an element is all that matters. No torch headers here.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"

namespace segfast::cuda {

struct alignas(16) Bytes16 {
  uint64_t low, high;
};

// Contiguous: plane n * C + i * groups + g of y is plane n * C + g * per_group + i of x. A plane is `units` units of T.
// Index is 32 bits wide where all of y fits, since a 64-bit division costs more than the copy; else 64 bits.
template <class T, class Index>
__global__ void channel_shuffle_planes(const T* __restrict__ x, T* __restrict__ y, int64_t total, Index units, Index groups,
                                       Index per_group) {
  const Index channels = groups * per_group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const Index to = static_cast<Index>(at);
    const Index plane = to / units, n = plane / channels, c = plane - n * channels, i = c / groups, g = c - i * groups;
    const Index from = (n * channels + g * per_group + i) * units + (to - plane * units);
    y[to] = x[from];
  }
}

// Channels last: y[row][i * groups + g] = x[row][g * per_group + i]. A thread gathers K neighbours of a row of y and stores them
// at once; what it reads lies in the same row, so that the other threads of the warp use up the sectors it touched.
template <class T, int K, class Index>
__global__ void channel_shuffle_rows(const T* __restrict__ x, T* __restrict__ y, int64_t total, Index groups, Index per_group) {
  const Index channels = groups * per_group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const Index to = static_cast<Index>(at) * K, row = to / channels, c = to - row * channels;
    Index i = c / groups, g = c - i * groups;
    const T* from = x + row * channels;
    Pack<T, K> pack;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      pack.value[k] = from[g * per_group + i];
      if (++g == groups) {
        g = 0;
        ++i;
      }
    }
    *reinterpret_cast<Pack<T, K>*>(y + to) = pack;
  }
}

template <class T, class Index>
void channel_shuffle_launch(const T* x, T* y, int64_t images, int64_t channels, int64_t area, int64_t groups, bool channels_last,
                            cudaStream_t stream) {
  const Index groups_ = static_cast<Index>(groups), per_group = static_cast<Index>(channels / groups);
  constexpr int K = 16 / sizeof(T);
  const int64_t elements = images * channels * area;
  if (channels_last) {
    if (K > 1 && channels % K == 0 && is_aligned(y, 16)) {
      SEGFAST_LAUNCH((channel_shuffle_rows<T, K, Index>), elements / K, stream, x, y, elements / K, groups_, per_group);
    } else {
      SEGFAST_LAUNCH((channel_shuffle_rows<T, 1, Index>), elements, stream, x, y, elements, groups_, per_group);
    }
  } else if (K > 1 && area % K == 0 && is_aligned(x, 16) && is_aligned(y, 16)) {
    SEGFAST_LAUNCH((channel_shuffle_planes<Bytes16, Index>), elements / K, stream, reinterpret_cast<const Bytes16*>(x),
                   reinterpret_cast<Bytes16*>(y), elements / K, static_cast<Index>(area / K), groups_, per_group);
  } else {
    SEGFAST_LAUNCH((channel_shuffle_planes<T, Index>), elements, stream, x, y, elements, static_cast<Index>(area), groups_,
                   per_group);
  }
}

// `width`: bytes of an element, 1, 2, 4, 8 or 16. x and y hold images * channels * area elements, in the same format.
inline void channel_shuffle(const void* x, void* y, int width, int64_t images, int64_t channels, int64_t area, int64_t groups,
                            bool channels_last, cudaStream_t stream) {
  const bool narrow = images * channels * area < (int64_t{1} << 31);
  const auto launch = [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    if (narrow) {
      channel_shuffle_launch<T, uint32_t>(from, to, images, channels, area, groups, channels_last, stream);
    } else {
      channel_shuffle_launch<T, int64_t>(from, to, images, channels, area, groups, channels_last, stream);
    }
  };
  switch (width) {
    case 1:
      return launch(uint8_t{});
    case 2:
      return launch(uint16_t{});
    case 4:
      return launch(uint32_t{});
    case 8:
      return launch(uint64_t{});
    default:
      return launch(Bytes16{});
  }
}

}  // namespace segfast::cuda
