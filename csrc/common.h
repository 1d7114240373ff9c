// What every op's C++ shares: stable-ABI headers, dtype dispatch, layout, the choice of kernel set, call counters.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace segfast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// How often each op's kernels ran: the tests read it through segfast._C to know that a kernel, not the reference, answered.
struct Counter {
  const char* const name;
  std::atomic<int64_t> calls{0};
  Counter* const next;
  static Counter*& head() {
    static Counter* first = nullptr;
    return first;
  }
  explicit Counter(const char* op) : name(op), next(head()) { head() = this; }
  void add() { calls.fetch_add(1, std::memory_order_relaxed); }
};

// Kernel sets, weakest first. `isa()` is the best that the processor has unless a test forced a weaker one.
// avx512bf16 (with AVX512-VNNI) is avx512 but for the kernels that call SEGFAST_CALL_LOW, amx (of bfloat16 and bytes) is
// avx512bf16 but for those that call SEGFAST_TILES_OR.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };
Isa isa();

// Calls `kernel` of the chosen set: SEGFAST_CALL(shuffle<float>)(args...). The sets are namespaces made by cpu/each_isa.h.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SEGFAST_HAS_AMX 1
#else
#define SEGFAST_HAS_AMX 0
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define SEGFAST_CALL(...)                     \
  (::segfast::isa() >= ::segfast::Isa::avx512 \
       ? ::segfast::avx512::__VA_ARGS__       \
       : (::segfast::isa() == ::segfast::Isa::avx2 ? ::segfast::avx2::__VA_ARGS__ : ::segfast::portable::__VA_ARGS__))
#define SEGFAST_CALL_LOW(...) \
  (::segfast::isa() >= ::segfast::Isa::avx512bf16 ? ::segfast::avx512bf16::__VA_ARGS__ : SEGFAST_CALL(__VA_ARGS__))
#else
#define SEGFAST_CALL(...) (::segfast::portable::__VA_ARGS__)
#define SEGFAST_CALL_LOW(...) SEGFAST_CALL(__VA_ARGS__)
#endif
#if SEGFAST_HAS_AMX
#define SEGFAST_TILES_OR(otherwise, ...) \
  (::segfast::isa() == ::segfast::Isa::amx ? ::segfast::amx::__VA_ARGS__ : otherwise(__VA_ARGS__))
#else
#define SEGFAST_TILES_OR(otherwise, ...) otherwise(__VA_ARGS__)
#endif

// f(T{}) for the float dtype of a tensor.
template <class F>
void dispatch_float(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": want float32, float64, float16 or bfloat16");
  }
}

// Dense in the order N, H, W, C; it may be contiguous too.
inline bool fits_channels_last(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (size[d] != 1 && stride[d] != expected) return false;
    expected *= size[d];
  }
  return true;
}

// Twin of segfast._backend.layout: channels_last (and not also contiguous) stays, anything else becomes contiguous.
inline bool is_channels_last(const Tensor& x) { return x.dim() == 4 && !x.is_contiguous() && fits_channels_last(x); }

// Twin of concat_layout in segfast/ops/concat_shuffle.py: tensors that are contiguous too follow the others.
inline bool concat_channels_last(const std::vector<Tensor>& tensors) {
  bool any = false;
  for (const Tensor& t : tensors) {
    if (!fits_channels_last(t)) return false;
    any = any || !t.is_contiguous();
  }
  return any;
}

// The first touch of fresh memory, one fault per 4 KB, costs a large output more than writing it: ask for 2 MB pages.
inline void advise_huge_pages([[maybe_unused]] uintptr_t begin, [[maybe_unused]] uintptr_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHuge = 1 << 21;
  if (bytes < 2 * kHuge) return;
  const uintptr_t from = (begin + kHuge - 1) / kHuge * kHuge, to = (begin + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

inline void advise_huge_pages(const Tensor& x) {
  if (x.is_cpu()) advise_huge_pages(reinterpret_cast<uintptr_t>(x.data_ptr()), x.numel() * x.element_size());
}

// A map between NCHW and NHWC, of a type as large as its numbers: 64 pixels at a time, a line of the result at a time.
template <class E>
void turn(const E* from, E* to, int64_t images, int64_t channels, int64_t pixels, bool channels_last) {
  constexpr int64_t kLine = 64 / sizeof(E), kPixels = 64;
  const int64_t blocks = (pixels + kPixels - 1) / kPixels;
  parallel_for(0, images * blocks, std::max<int64_t>(1, 1024 / channels), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks * channels * pixels, first = block % blocks * kPixels;
      const int64_t last = std::min(first + kPixels, pixels);
      // Of the result's rows (channels_last: pixels) [a, b), the numbers [c, d): read down a column of the source.
      const auto tile = [&](int64_t a, int64_t b, int64_t c, int64_t d) {
        const int64_t row = channels_last ? channels : pixels, column = channels_last ? pixels : channels;
        for (int64_t i = a; i < b; ++i) {
          E line[kLine];
          const E* source = from + image + c * column + i;
          if (d - c == kLine) {
            for (int64_t j = 0; j < kLine; ++j) line[j] = source[j * column];
            std::memcpy(to + image + i * row + c, line, sizeof line);
          } else {
            for (int64_t j = 0; j < d - c; ++j) to[image + i * row + c + j] = source[j * column];
          }
        }
      };
      for (int64_t c = 0; c < channels; c += kLine) {
        const int64_t d = std::min(c + kLine, channels);
        for (int64_t p = first; p < last; p += kLine) {
          const int64_t q = std::min(p + kLine, last);
          channels_last ? tile(p, q, c, d) : tile(c, d, p, q);
        }
      }
    }
  });
}

// Dense and in the order asked for. PyTorch's own copy from NHWC to NCHW is several times slower than the kernels around it.
inline Tensor contiguous_as(const Tensor& x, bool channels_last) {
  if (!channels_last && x.is_contiguous()) return x;
  if (channels_last && x.dim() == 4 && fits_channels_last(x)) return x;
  const auto bytes = x.element_size();
  const bool turns = x.is_cpu() && x.dim() == 4 && x.numel() > 0 && (channels_last ? x.is_contiguous() : is_channels_last(x));
  if (!turns || (bytes != 2 && bytes != 4 && bytes != 8)) {
    return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  const Tensor y = torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  advise_huge_pages(y);
  const auto go = [&](auto e) {
    using E = decltype(e);
    turn(static_cast<const E*>(x.data_ptr()), static_cast<E*>(y.data_ptr()), x.size(0), x.size(1), x.size(2) * x.size(3),
         channels_last);
  };
  bytes == 2 ? go(uint16_t{}) : bytes == 4 ? go(uint32_t{}) : go(uint64_t{});
  return y;
}

// Where this thread's next result of so many bytes goes, and one after it of as many as the second says: memory that a caller
// keeps, who promises that nobody reads the result once the memory serves another (segfast.optimize, whose maps between its steps
// nobody else sees).
struct Place {
  void* memory = nullptr;
  int64_t bytes = 0;
};
inline std::array<Place, 2>& next_places() {
  thread_local std::array<Place, 2> places;
  return places;
}

// Bytes of one number; 0 of a dtype that no kernel makes, whose results get no place.
inline int64_t dtype_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    default:
      return 0;
  }
}

// The result at the thread's place; it owns nothing.
inline Tensor placed(const std::vector<int64_t>& size, ScalarType dtype, bool channels_last, void* memory) {
  std::vector<int64_t> strides(size.size(), 1);
  int64_t next = 1;
  const auto dense = [&](size_t d) { strides[d] = next, next *= size[d]; };
  if (channels_last) {
    for (const size_t d : {1, 3, 2, 0}) dense(d);
  } else {
    for (size_t d = size.size(); d-- > 0;) dense(d);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob_v2(memory, static_cast<int64_t>(size.size()), size.data(), strides.data(), 0,
                                            torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                            aoti_torch_device_type_cpu(), 0, &handle, aoti_torch_layout_strided(), nullptr, 0));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype, const Tensor& like, bool channels_last = false) {
  const std::vector<int64_t> sizes(size);
  int64_t bytes = dtype_bytes(dtype);
  for (const int64_t n : sizes) bytes *= n;
  for (Place& place : next_places()) {
    if (place.bytes > 0 && bytes == place.bytes && like.is_cpu()) {
      void* const memory = place.memory;
      place = {};
      return placed(sizes, dtype, channels_last, memory);
    }
  }
  const Tensor x = torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                                        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  advise_huge_pages(x);
  return x;
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

}  // namespace segfast
