// What the CUDA kernels of all ops share, free of torch: 16-byte packs, the launch, the error check.
#pragma once

#include <cstdint>

namespace segfast {

// K elements moved by one access: nvcc turns the copy of a Pack of 16 bytes into one 128-bit load or store.
template <class T, int K>
struct alignas(sizeof(T) * K) Pack {
  T value[K];
};

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1 << 16;  // kernels stride over the grid, so that no size overflows it

constexpr int64_t blocks(int64_t work) {
  const int64_t wanted = (work + kThreads - 1) / kThreads;
  return wanted < kBlocks ? wanted : kBlocks;
}

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace segfast

// The kernel stands in parentheses, since its template arguments hold commas: SEGFAST_LAUNCH((shuffle<T, 4>), work, stream, x,
// y);
#define SEGFAST_LAUNCH(kernel, work, stream, ...) \
  kernel<<<static_cast<unsigned>(::segfast::blocks(work)), ::segfast::kThreads, 0, stream>>>(__VA_ARGS__)
