// The copy behind channel_shuffle and concat_shuffle on CUDA: `parts`, concatenated along channels, against `whole`, their
// shuffle:  whole[n, i * groups + g] = concatenated[n, g * (C / groups) + i].  Bits are moved, so that the width of an element is
// all that matters. Index is 32 bits wide where everything fits, since a 64-bit division costs more than the copy; else 64 bits.
#pragma once

#include "launch.cuh"

namespace segfast::cuda {

constexpr int kMostParts = 32;
enum class Way { parts_to_whole, whole_to_parts };

struct Part {
  void* data;
  int64_t channels;
};

// Part p holds the concatenated channels start[p] ... start[p + 1] - 1.
template <class T, class Index>
struct Parts {
  Global<T> data[kMostParts];
  Index start[kMostParts + 1];
};

template <class T, class Index>
__device__ int part_of(const Parts<T, Index>& parts, Index channel) {
  int part = 0;
  while (channel >= parts.start[part + 1]) ++part;
  return part;
}

// Contiguous: a plane of `units` units of T moves as it is.
template <class T, class Index, Way way>
__global__ void shuffle_planes(Parts<T, Index> parts, Global<T> whole, int64_t total, Index units, Index groups,
                               Index per_group) {
  const Index channels = groups * per_group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const Index unit = static_cast<Index>(at), plane = unit / units, n = plane / channels, c = plane - n * channels;
    const Index i = c / groups, g = c - i * groups, from = g * per_group + i;
    const int part = part_of(parts, from);
    const Index width = parts.start[part + 1] - parts.start[part];
    const Index other = (n * width + from - parts.start[part]) * units + (unit - plane * units);
    if (way == Way::parts_to_whole) {
      store(whole, unit, load(parts.data[part], other));
    } else {
      store(parts.data[part], other, load(whole, unit));
    }
  }
}

// Channels last: a thread moves K neighbours of a row of `whole` by one access; their places in the parts lie within one row
// each, so that the other threads of the warp use up the sectors it touched.
template <class T, int K, class Index, Way way>
__global__ void shuffle_rows(Parts<T, Index> parts, Global<T> whole, int64_t total, Index groups, Index per_group) {
  const Index channels = groups * per_group;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const Index first = static_cast<Index>(at) * K, row = first / channels, c = first - row * channels;
    Index i = c / groups, g = c - i * groups;
    Pack<T, K> pack;
    if (way == Way::whole_to_parts) pack = load_pack<K>(whole, first);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Index from = g * per_group + i;
      const int part = part_of(parts, from);
      const Index other = row * (parts.start[part + 1] - parts.start[part]) + from - parts.start[part];
      if (way == Way::parts_to_whole) {
        pack.value[k] = load(parts.data[part], other);
      } else {
        store(parts.data[part], other, pack.value[k]);
      }
      if (++g == groups) {
        g = 0;
        ++i;
      }
    }
    if (way == Way::parts_to_whole) store_pack(whole, first, pack);
  }
}

// Channels last, two groups, parts whose widths are multiples of K: K elements of each group by one access, and 2 K of `whole` by
// two.
template <class T, int K, class Index, Way way>
__global__ void shuffle_pairs(Parts<T, Index> parts, Global<T> whole, int64_t total, Index per_group) {
  const Index runs = per_group / K;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total; at += step) {
    const Index row = static_cast<Index>(at) / runs, i = (static_cast<Index>(at) - row * runs) * K;
    const int one = part_of(parts, i), two = part_of(parts, per_group + i);
    const Index at_one = row * (parts.start[one + 1] - parts.start[one]) + i - parts.start[one];
    const Index at_two = row * (parts.start[two + 1] - parts.start[two]) + per_group + i - parts.start[two];
    const Index low = (row * per_group + i) * 2;
    Pack<T, K> a, b, c, d;
    if (way == Way::parts_to_whole) {
      a = load_pack<K>(parts.data[one], at_one);
      b = load_pack<K>(parts.data[two], at_two);
#pragma unroll
      for (int k = 0; k < K / 2; ++k) {
        c.value[2 * k] = a.value[k], c.value[2 * k + 1] = b.value[k];
        d.value[2 * k] = a.value[K / 2 + k], d.value[2 * k + 1] = b.value[K / 2 + k];
      }
      store_pack(whole, low, c);
      store_pack(whole, low + K, d);
    } else {
      c = load_pack<K>(whole, low);
      d = load_pack<K>(whole, low + K);
#pragma unroll
      for (int k = 0; k < K / 2; ++k) {
        a.value[k] = c.value[2 * k], b.value[k] = c.value[2 * k + 1];
        a.value[K / 2 + k] = d.value[2 * k], b.value[K / 2 + k] = d.value[2 * k + 1];
      }
      store_pack(parts.data[one], at_one, a);
      store_pack(parts.data[two], at_two, b);
    }
  }
}

// A copy between parts and whole, before its types are chosen.
struct ShuffleCall {
  const Part* parts;
  int count;
  void* whole;
  int64_t width, images, channels, area, groups;  // width: bytes of an element
  cudaStream_t stream;

  template <class T, class Index>
  Parts<T, Index> table() const {
    Parts<T, Index> parts_{};
    for (int p = 0; p < count; ++p) {
      parts_.data[p] = static_cast<T*>(parts[p].data);
      parts_.start[p + 1] = parts_.start[p] + static_cast<Index>(parts[p].channels);
    }
    return parts_;
  }
  // Whether every pointer, and every multiple of `step` bytes from it, allows accesses of `bytes`.
  bool aligned(int64_t bytes, int64_t step) const {
    bool all = step % bytes == 0 && is_aligned(whole, bytes);
    for (int p = 0; p < count; ++p) all = all && is_aligned(parts[p].data, bytes);
    return all;
  }
  // Whether runs of k channels of the concatenation never cross a group or a part.
  bool runs(int64_t k) const {
    bool all = channels / groups % k == 0;
    for (int p = 0; p < count; ++p) all = all && parts[p].channels % k == 0;
    return all;
  }
};

template <class T, class Index, Way way>
void launch_planes(const ShuffleCall& call) {
  const int64_t units = call.area * call.width / static_cast<int64_t>(sizeof(T)), total = call.images * call.channels * units;
  SEGFAST_LAUNCH((shuffle_planes<T, Index, way>), blocks_for(total), kThreads, 0, call.stream, call.table<T, Index>(),
                 static_cast<T*>(call.whole), total, static_cast<Index>(units), static_cast<Index>(call.groups),
                 static_cast<Index>(call.channels / call.groups));
}

template <class T, int K, class Index, Way way>
void launch_rows(const ShuffleCall& call) {
  const int64_t total = call.images * call.area * call.channels / K;
  SEGFAST_LAUNCH((shuffle_rows<T, K, Index, way>), blocks_for(total), kThreads, 0, call.stream, call.table<T, Index>(),
                 static_cast<T*>(call.whole), total, static_cast<Index>(call.groups),
                 static_cast<Index>(call.channels / call.groups));
}

// Tries runs of K, K / 2 ... elements, down to four bytes.
template <class T, int K, class Index, Way way>
bool launch_pairs(const ShuffleCall& call) {
  if constexpr (K < 2 || K * sizeof(T) == 2) {
    return false;
  } else {
    constexpr int64_t bytes = K * sizeof(T);
    if (call.groups != 2 || !call.runs(K) || !call.aligned(bytes, bytes)) return launch_pairs<T, K / 2, Index, way>(call);
    const int64_t total = call.images * call.area * call.channels / 2 / K;
    SEGFAST_LAUNCH((shuffle_pairs<T, K, Index, way>), blocks_for(total), kThreads, 0, call.stream, call.table<T, Index>(),
                   static_cast<T*>(call.whole), total, static_cast<Index>(call.channels / 2));
    return true;
  }
}

// f(T{}) for the unsigned type of `bytes` bytes.
template <class F>
void dispatch_width(int64_t bytes, F&& f) {
  switch (bytes) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    default:
      return f(Bytes16{});
  }
}

template <class Index, Way way>
void launch_shuffle(const ShuffleCall& call, bool channels_last) {
  if (!channels_last) {
    int64_t unit = 16;
    while (!call.aligned(unit, call.area * call.width)) unit /= 2;
    return dispatch_width(unit, [&](auto element) { launch_planes<decltype(element), Index, way>(call); });
  }
  dispatch_width(call.width, [&](auto element) {
    using T = decltype(element);
    constexpr int K = 16 / sizeof(T);
    if (launch_pairs<T, K, Index, way>(call)) return;
    if (call.channels % K == 0 && is_aligned(call.whole, 16)) {
      launch_rows<T, K, Index, way>(call);
    } else {
      launch_rows<T, 1, Index, way>(call);
    }
  });
}

inline bool fits_32_bits(int64_t elements) { return elements < (int64_t{1} << 31); }

// All tensors are (images, channels, area), of one element width of 1, 2, 4, 8 or 16 bytes, dense in one format; at most
// kMostParts parts, none of them empty.
inline void shuffle(const ShuffleCall& call, Way way, bool channels_last) {
  const bool rows = channels_last || call.area == 1;
  const bool small = fits_32_bits(call.images * call.channels * call.area);
  if (way == Way::parts_to_whole) {
    small ? launch_shuffle<uint32_t, Way::parts_to_whole>(call, rows) : launch_shuffle<int64_t, Way::parts_to_whole>(call, rows);
  } else {
    small ? launch_shuffle<uint32_t, Way::whole_to_parts>(call, rows) : launch_shuffle<int64_t, Way::whole_to_parts>(call, rows);
  }
}

// y = x with its channels shuffled. Shuffling with C / groups undoes shuffling with groups: the way with fewer groups is taken.
inline void channel_shuffle(const void* x, void* y, int64_t width, int64_t images, int64_t channels, int64_t area, int64_t groups,
                            bool channels_last, cudaStream_t stream) {
  const int64_t per_group = channels / groups;
  if (groups <= per_group) {
    const Part part{const_cast<void*>(x), channels};
    shuffle({&part, 1, y, width, images, channels, area, groups, stream}, Way::parts_to_whole, channels_last);
  } else {
    const Part part{y, channels};
    shuffle({&part, 1, const_cast<void*>(x), width, images, channels, area, per_group, stream}, Way::whole_to_parts,
            channels_last);
  }
}

}  // namespace segfast::cuda
