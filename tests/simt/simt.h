// CUDA's execution model on a host, for the dialect of csrc/cuda/launch.cuh. Default: one fibre per CUDA thread, switched at
// barriers in a forward, reverse or shuffled order, so that what is read before it is written shows (shared memory starts as
// NaN). SEGFAST_SIMT_THREADS: one std::thread per CUDA thread, for ThreadSanitizer. Every global access is checked and counted.
#pragma once

#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#ifdef SEGFAST_SIMT_THREADS
#define SIMT_LOCAL thread_local
#else
#define SIMT_LOCAL
#endif

using std::exp;  // of float too, as CUDA has it: the C library's alone takes doubles
using std::log;

struct SimtIndex {
  unsigned x = 0;
};
inline SIMT_LOCAL SimtIndex threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
inline void cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { memset(to, value, bytes); }

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace simt {

// What the device has as constants, and tests vary.
inline int kThreads = 256;
inline int64_t kBlocks = 1 << 16;
enum class Schedule : int { forward, reverse, shuffled };
inline Schedule schedule = Schedule::forward;
inline int64_t edge_blocks =
    0;  // where > 0, only so many first and last blocks of a grid run: for tensors of billions of elements
inline bool skipped(int64_t block, int64_t blocks) {
  return edge_blocks > 0 && block >= edge_blocks && block < blocks - edge_blocks;
}

struct Counts {
  int64_t launches = 0, loaded = 0, stored = 0, accesses = 0, shared = 0;  // shared: accesses
};
inline Counts counts;
inline std::string launched;    // the types of the last launch's kernel, as the compiler spells them
inline size_t shared_bytes_of;  // and the shared memory that a block of it took
inline std::vector<std::pair<const char*, const char*>> memory;  // where not empty: the only bytes that kernels may touch

[[noreturn]] void fail(const std::string& what);

inline void touch(const void* pointer, size_t bytes, size_t alignment, bool stores) {
  const char* from = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(from) % alignment != 0) fail("a misaligned access");
  bool inside = memory.empty();
  for (const auto& [begin, end] : memory) inside = inside || (from >= begin && from + bytes <= end);
  if (!inside) fail(stores ? "a store out of bounds" : "a load out of bounds");
#ifndef SEGFAST_SIMT_THREADS
  (stores ? counts.stored : counts.loaded) += static_cast<int64_t>(bytes);
  ++counts.accesses;
#endif
}

template <class T>
struct Global {
  Global() = default;
  Global(T* pointer) : at_(pointer) {}
  explicit operator bool() const { return at_ != nullptr; }
  T* at_ = nullptr;
};

template <class T>
std::remove_const_t<T> load(Global<T> from, int64_t at) {
  touch(from.at_ + at, sizeof(T), sizeof(T), false);
  return from.at_[at];
}
template <class T>
void store(Global<T> to, int64_t at, T value) {
  touch(to.at_ + at, sizeof(T), sizeof(T), true);
  to.at_[at] = value;
}
template <class P, class T>
P load_as(Global<T> from, int64_t at) {
  touch(from.at_ + at, sizeof(P), sizeof(P), false);
  P pack;
  memcpy(&pack, from.at_ + at, sizeof(P));
  return pack;
}
template <class P, class T>
void store_as(Global<T> to, int64_t at, const P& pack) {
  touch(to.at_ + at, sizeof(P), sizeof(P), true);
  memcpy(to.at_ + at, &pack, sizeof(P));
}
template <class T>
T atomic_add(Global<T> to, int64_t at, T value) {
  touch(to.at_ + at, sizeof(T), sizeof(T), true);
  return __atomic_fetch_add(to.at_ + at, value, __ATOMIC_RELAXED);
}

template <class T>
class Shared {
 public:
  Shared(T* first, int64_t count) : first_(first), count_(count) {}
  T& operator[](int64_t at) const {
    if (at < 0 || at >= count_) fail("shared memory out of bounds");
#ifndef SEGFAST_SIMT_THREADS
    ++counts.shared;
#endif
    return first_[at];
  }

 private:
  T* first_;
  int64_t count_;
};

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kSharedBytes = 48 << 10;  // what a block may have without asking
alignas(64) inline char arena[kSharedBytes];
inline SIMT_LOCAL size_t cursor;  // every thread declares the same arrays in the same order, and so finds the same addresses

template <class T>
Shared<T> shared(int64_t count) {
  const size_t from = (cursor + 15) / 16 * 16;
  cursor = from + count * sizeof(T);
#ifndef SEGFAST_SIMT_THREADS
  shared_bytes_of = cursor;
#endif
  if (cursor > kSharedBytes) fail("more shared memory than a block has");
  return {reinterpret_cast<T*>(arena + from), count};
}

inline int64_t dynamic_bytes;  // what the launch asked for
inline SIMT_LOCAL int64_t dynamic_used;

template <class T>
Shared<T> dynamic_shared(int64_t count) {
  dynamic_used = count * static_cast<int64_t>(sizeof(T));
  if (dynamic_used != dynamic_bytes) fail("another size of dynamic shared memory than the launch asked for");
  return shared<T>(count);
}

union Slot {
  double wide;
  char bytes[8];
};
inline Slot slots[2][kMostThreads];
inline SIMT_LOCAL int phase;  // a lane is never more than one shuffle ahead: two sets of slots do

void wait(bool block, int line);

template <class T>
T shuffle(T value, int lane, int line) {
  static_assert(sizeof(T) <= sizeof(Slot));
  if (blockDim.x % kWarp != 0) fail("a full-mask shuffle in a partial warp");
  const unsigned me = threadIdx.x, now = phase++ & 1;
  memcpy(slots[now][me].bytes, &value, sizeof(T));
  wait(false, line);
  if (lane >= 0 && lane < kWarp) memcpy(&value, slots[now][me / kWarp * kWarp + lane].bytes, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads(int line = __builtin_LINE()) { simt::wait(true, line); }
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int line = __builtin_LINE()) {
  if (mask != 0xffffffffu) simt::fail("a shuffle without the full mask");
  return simt::shuffle(value, static_cast<int>(threadIdx.x % simt::kWarp) + delta, line);
}

#ifdef SEGFAST_SIMT_THREADS

namespace simt {

inline pthread_barrier_t block_barrier, warp_barriers[kMostThreads / kWarp];

inline void fail(const std::string& what) {
  fprintf(stderr, "simt: %s\n", what.c_str());
  abort();
}

inline void wait(bool block, int) { pthread_barrier_wait(block ? &block_barrier : &warp_barriers[threadIdx.x / kWarp]); }

template <class F>
void launch(int64_t blocks, int threads, int64_t bytes, F kernel) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMostThreads) throw std::runtime_error("simt: no such grid");
  dynamic_bytes = bytes;
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (int w = 0; w < threads / kWarp; ++w) pthread_barrier_init(&warp_barriers[w], nullptr, kWarp);
  std::vector<std::thread> all;
  for (int64_t b = 0; b < blocks; ++b) {
    if (skipped(b, blocks)) continue;
    memset(arena, 0xff, kSharedBytes);
    for (int t = 0; t < threads; ++t) {
      all.emplace_back([=] {
        threadIdx.x = t, blockIdx.x = b, blockDim.x = threads, gridDim.x = blocks, cursor = 0, phase = 0;
        kernel();
      });
    }
    for (std::thread& thread : all) thread.join();
    all.clear();
  }
  ++counts.launches;
}

}  // namespace simt

#else

namespace simt {

enum class State { ready, at_block_barrier, at_shuffle, done };
struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  int line, phase;
  size_t cursor;
};
constexpr size_t kStack = 128 << 10;
inline std::vector<std::unique_ptr<Fibre>> fibres;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::string failure;
inline std::mutex one_launch;  // autograd launches from threads of its own

inline void leave() {
  Fibre& me = *fibres[threadIdx.x];
  me.phase = phase, me.cursor = cursor;
  swapcontext(&me.context, &scheduler);
}

inline void fail(const std::string& what) {
  failure = what;
  leave();
  abort();
}

inline void wait(bool block, int line) {
  Fibre& me = *fibres[threadIdx.x];
  me.state = block ? State::at_block_barrier : State::at_shuffle, me.line = line;
  leave();
}

inline void live() {
  for (;;) {
    body();
    fibres[threadIdx.x]->state = State::done;
    leave();
  }
}

// Ready again if all of [from, to) wait for the same thing at the same line.
inline bool release(int from, int to, State state) {
  for (int t = from; t < to; ++t) {
    if (fibres[t]->state != state || fibres[t]->line != fibres[from]->line) return false;
  }
  for (int t = from; t < to; ++t) fibres[t]->state = State::ready;
  return true;
}

inline void run_block(int threads, std::mt19937& random) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  for (int t = 0; t < threads; ++t) fibres[t]->state = State::ready, fibres[t]->cursor = 0, fibres[t]->phase = 0;
  memset(arena, 0xff, kSharedBytes);
  for (;;) {
    if (schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
    for (const int t : order) {
      Fibre& fibre = *fibres[t];
      if (fibre.state != State::ready) continue;
      threadIdx.x = t, phase = fibre.phase, cursor = fibre.cursor;
      swapcontext(&scheduler, &fibre.context);
      if (!failure.empty()) return;
    }
    bool released = release(0, threads, State::at_block_barrier), done = true;
    for (int w = 0; w < threads; w += kWarp) released |= release(w, std::min(w + kWarp, threads), State::at_shuffle);
    for (int t = 0; t < threads; ++t) done = done && fibres[t]->state == State::done;
    if (done) return;
    if (!released) {
      failure = "a divergent barrier or shuffle";
      return;
    }
  }
}

template <class F>
void launch(int64_t blocks, int threads, int64_t bytes, F kernel) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMostThreads) throw std::runtime_error("simt: no such grid");
  dynamic_bytes = bytes;
  const std::lock_guard lock(one_launch);
  while (static_cast<int>(fibres.size()) < threads) {
    fibres.push_back(std::make_unique<Fibre>());
    Fibre& fibre = *fibres.back();
    fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    makecontext(&fibre.context, live, 0);
  }
  body = kernel;
  launched = __PRETTY_FUNCTION__;
  shared_bytes_of = 0;
  dynamic_used = 0;
  blockDim.x = threads, gridDim.x = blocks;
  std::mt19937 random(1);
  for (int64_t b = 0; b < blocks && failure.empty(); ++b) {
    if (skipped(b, blocks)) continue;
    blockIdx.x = b;
    run_block(threads, random);
  }
  ++counts.launches;
  if (failure.empty() && dynamic_used != bytes) failure = "dynamic shared memory that no kernel wants";
  if (failure.empty()) return;
  const std::string what = "simt: " + failure;
  failure.clear();
  fibres.clear();  // some stopped in the middle
  throw std::runtime_error(what);
}

}  // namespace simt

#endif
