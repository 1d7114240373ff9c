// The dialect of the CUDA kernels, free of torch. A kernel reaches global memory only through load() and store(), shared memory
// through the two macros, and is launched through SEGFAST_LAUNCH: so the same source compiles on a host (tests/simt/simt.h),
// where every access is checked and counted.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef SEGFAST_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace segfast {

// K elements moved by one access.
template <class T, int K>
struct alignas(sizeof(T) * K) Pack {
  T value[K];
};

struct alignas(16) Bytes16 {
  uint64_t low, high;
};

#ifdef SEGFAST_SIMT
template <class T>
using Global = simt::Global<T>;
template <class T>
using Shared = simt::Shared<T>;
using simt::atomic_add;
using simt::kBlocks;
using simt::kThreads;
using simt::load;
using simt::store;
template <int K, class T>
Pack<T, K> load_pack(Global<T> from, int64_t at) {
  return simt::load_as<Pack<T, K>>(from, at);
}
template <int K, class T>
void store_pack(Global<T> to, int64_t at, const Pack<T, K>& pack) {
  simt::store_as(to, at, pack);
}
#define SEGFAST_SHARED(type, name, count) const ::segfast::Shared<type> name = ::simt::shared<type>(count)
#define SEGFAST_DYNAMIC_SHARED(type, name, count) const ::segfast::Shared<type> name = ::simt::dynamic_shared<type>(count)
#define SEGFAST_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  (static_cast<void>(stream), ::simt::launch(blocks, threads, bytes, [=] { (kernel)(__VA_ARGS__); }))
#else
template <class T>
using Global = T* __restrict__;
template <class T>
using Shared = T*;

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1 << 16;  // of kernels that stride over the grid, so that no size overflows it

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class T>
__device__ __forceinline__ T load(const T* from, int64_t at) {
  return from[at];
}

template <class T>
__device__ __forceinline__ void store(T* to, int64_t at, T value) {
  to[at] = value;
}

// Through the built-in vector of that width: of a struct of many elements the compiler would make many accesses.
template <int K, class T>
__device__ __forceinline__ Pack<T, K> load_pack(const T* from, int64_t at) {
  using W = typename Word<sizeof(T) * K>::type;
  const W word = *reinterpret_cast<const W*>(from + at);
  Pack<T, K> pack;
  memcpy(&pack, &word, sizeof(pack));
  return pack;
}

template <int K, class T>
__device__ __forceinline__ void store_pack(T* to, int64_t at, const Pack<T, K>& pack) {
  using W = typename Word<sizeof(T) * K>::type;
  W word;
  memcpy(&word, &pack, sizeof(pack));
  *reinterpret_cast<W*>(to + at) = word;
}

template <class T>
__device__ __forceinline__ T atomic_add(T* to, int64_t at, T value) {
  return atomicAdd(to + at, value);
}

#define SEGFAST_SHARED(type, name, count) __shared__ type name[count]
#define SEGFAST_DYNAMIC_SHARED(type, name, count)                  \
  extern __shared__ __align__(16) unsigned char segfast_dynamic[]; \
  type* const name = reinterpret_cast<type*>(segfast_dynamic)
// The kernel stands in parentheses, since its template arguments hold commas.
#define SEGFAST_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  (kernel)<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), bytes, stream>>>(__VA_ARGS__)
#endif

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t blocks_for(int64_t work) { return std::min<int64_t>(ceil_div(work, kThreads), kBlocks); }

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What values are computed in: half precision in float.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__host__ __device__ inline float widen(float x) { return x; }
__host__ __device__ inline double widen(double x) { return x; }
__host__ __device__ inline float widen(__half x) { return __half2float(x); }
__host__ __device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class A>
__host__ __device__ inline T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__host__ __device__ inline __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// The dtypes of a kernel that reads several.
enum class Dtype : int { float32, float64, float16, bfloat16 };

// Sum over the block, always in the same order: in A within a warp, in B over the warps. Every thread must call; thread 0 gets
// it.
template <class B, class A>
__device__ B block_sum(A value, Shared<B> scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(kFullMask, value, offset);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = static_cast<B>(value);
  __syncthreads();
  B total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) total += scratch[warp];
  }
  return total;
}

}  // namespace segfast
