#define SEGFAST_FILE "channel_shuffle.cpp"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "each_isa.h"
#include "shuffle.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// A plain copy that leaves the cache alone: what exceeds it would only be fetched to be overwritten.
inline void stream_copy(char* to, const char* from, int64_t bytes) {
#ifdef __SSE2__
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  if (bytes < 256 + head) {
    memcpy(to, from, bytes);
    return;
  }
  memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const __m128i* source = reinterpret_cast<const __m128i*>(from + i);
    __m128i* target = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  memcpy(to + i, from + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

// memcpy takes its time to start on the few bytes of a late stage's plane.
inline void copy_plane(char* to, const char* from, int64_t bytes, bool stream) {
  if (stream) return stream_copy(to, from, bytes);
#ifdef __GNUC__
  typedef char Bytes __attribute__((vector_size(SEGFAST_BYTES), aligned(1), may_alias));
  constexpr int64_t step = SEGFAST_BYTES;
  if (bytes >= step && bytes <= 2048) {
    int64_t i = 0;
    for (; i + 4 * step <= bytes; i += 4 * step) {
      const Bytes* source = reinterpret_cast<const Bytes*>(from + i);
      Bytes* target = reinterpret_cast<Bytes*>(to + i);
      const auto a = source[0], b = source[1], c = source[2], d = source[3];
      target[0] = a, target[1] = b, target[2] = c, target[3] = d;
    }
    for (; i + step <= bytes; i += step) *reinterpret_cast<Bytes*>(to + i) = *reinterpret_cast<const Bytes*>(from + i);
    if (i < bytes) *reinterpret_cast<Bytes*>(to + bytes - step) = *reinterpret_cast<const Bytes*>(from + bytes - step);
    return;
  }
#endif
  memcpy(to, from, bytes);
}

inline void stream_end() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

#ifdef __GNUC__
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <class T, int Bytes>
struct Lanes {
  typedef T type __attribute__((vector_size(Bytes)));
  typedef T unaligned __attribute__((vector_size(Bytes), aligned(sizeof(T)), may_alias));
  static constexpr int count = Bytes / sizeof(T);
  using Each = typename MakeIndices<count>::type;

  template <int... I>
  static SEGFAST_INLINE void interleave(const T* a, const T* b, T* y, Indices<I...>) {
    const type va = *reinterpret_cast<const unaligned*>(a), vb = *reinterpret_cast<const unaligned*>(b);
    *reinterpret_cast<unaligned*>(y) = __builtin_shufflevector(va, vb, (I % 2 * count + I / 2)...);
    *reinterpret_cast<unaligned*>(y + count) = __builtin_shufflevector(va, vb, (I % 2 * count + (count + I) / 2)...);
  }
  template <int... I>
  static SEGFAST_INLINE void separate(T* a, T* b, const T* y, Indices<I...>) {
    const type low = *reinterpret_cast<const unaligned*>(y), high = *reinterpret_cast<const unaligned*>(y + count);
    *reinterpret_cast<unaligned*>(a) = __builtin_shufflevector(low, high, (2 * I)...);
    *reinterpret_cast<unaligned*>(b) = __builtin_shufflevector(low, high, (2 * I + 1)...);
  }
};

// a0 b0 a1 b1 ... for n >= Lanes::count elements each; the last vector overlaps the one before it.
template <class T, int Bytes, bool ToWhole>
SEGFAST_INLINE void pair_vectors(T* a, T* b, T* y, int64_t n) {
  using L = Lanes<T, Bytes>;
  for (int64_t i = 0;;) {
    if constexpr (ToWhole) {
      L::interleave(a + i, b + i, y + 2 * i, typename L::Each{});
    } else {
      L::separate(a + i, b + i, y + 2 * i, typename L::Each{});
    }
    if (i == n - L::count) return;
    i = i + L::count < n - L::count ? i + L::count : n - L::count;
  }
}
#endif

template <class T, bool ToWhole>
SEGFAST_INLINE void pair(T* a, T* b, T* y, int64_t n) {
#ifdef __GNUC__
  if constexpr (sizeof(T) <= 8) {
    if (n >= SEGFAST_BYTES / static_cast<int64_t>(sizeof(T))) return pair_vectors<T, SEGFAST_BYTES, ToWhole>(a, b, y, n);
    if (n >= 16 / static_cast<int64_t>(sizeof(T))) return pair_vectors<T, 16, ToWhole>(a, b, y, n);
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (ToWhole) {
      y[2 * i] = a[i];
      y[2 * i + 1] = b[i];
    } else {
      a[i] = y[2 * i];
      b[i] = y[2 * i + 1];
    }
  }
}

// Channels last, `rows` pixels: parts[p] and whole point at the first of them.
template <class T, bool ToWhole>
void shuffle_block(T* const* parts, const Part* shapes, const Segment* segments, int64_t number, T* whole, int64_t channels,
                   int64_t groups, int64_t rows) {
  const bool even = groups == 2 && number == 2;
  // Shuffling k times with two groups is shuffling with 2^k: channel j goes to 2 j, 4 j, 8 j modulo C - 1.
  constexpr int64_t most = 1024;
  const bool power = !even && groups == number && (groups & (groups - 1)) == 0 && groups > 1 && channels <= most &&
                     segments[0].part == segments[number - 1].part;
  for (int64_t row = 0; row < rows; ++row) {
    T* y = whole + row * channels;
    if (even) {
      T* a = parts[segments[0].part] + row * shapes[segments[0].part].channels + segments[0].offset;
      T* b = parts[segments[1].part] + row * shapes[segments[1].part].channels + segments[1].offset;
      pair<T, ToWhole>(a, b, y, segments[0].length);
      continue;
    }
    if (power) {
      T spare[2][most];
      T* x = parts[segments[0].part] + row * channels;
      T* from = ToWhole ? x : y;
      const int64_t half = channels / 2;
      for (int64_t g = 2, turn = 0; g <= groups; g *= 2, turn ^= 1) {
        T* to = g < groups ? spare[turn] : (ToWhole ? y : x);
        if constexpr (ToWhole) {
          pair<T, true>(from, from + half, to, half);
        } else {
          pair<T, false>(to, to + half, from, half);
        }
        from = to;
      }
      continue;
    }
    for (int64_t s = 0; s < number; ++s) {
      const Segment segment = segments[s];
      T* x = parts[segment.part] + row * shapes[segment.part].channels + segment.offset;
      T* to = y + segment.first;
      for (int64_t i = 0; i < segment.length; ++i) {
        if constexpr (ToWhole) {
          to[i * groups] = x[i];
        } else {
          x[i] = to[i * groups];
        }
      }
    }
  }
}

// Pixels [begin, end). `buffer` holds `rows` pixels of the whole, or is null: then results are written where they belong.
template <class T, bool ToWhole>
void shuffle_rows(const Part* shapes, int64_t number_of_parts, const Segment* segments, int64_t number, char* whole,
                  int64_t channels, int64_t groups, int64_t begin, int64_t end, T** pointers, char* buffer, int64_t rows) {
  if (buffer == nullptr) rows = end - begin;
  for (int64_t row = begin; row < end; row += rows) {
    const int64_t here = rows < end - row ? rows : end - row;
    T* y = reinterpret_cast<T*>(whole) + row * channels;
    T* free = reinterpret_cast<T*>(buffer);
    for (int64_t p = 0; p < number_of_parts; ++p) {
      pointers[p] = reinterpret_cast<T*>(shapes[p].data) + row * shapes[p].channels;
      if (!ToWhole && buffer != nullptr) {
        pointers[p] = free;
        free += here * shapes[p].channels;
      }
    }
    T* target = ToWhole && buffer != nullptr ? free : y;
    shuffle_block<T, ToWhole>(pointers, shapes, segments, number, target, channels, groups, here);
    if (buffer == nullptr) continue;
    if (ToWhole) {
      stream_copy(reinterpret_cast<char*>(y), buffer, here * channels * sizeof(T));
      continue;
    }
    for (int64_t p = 0; p < number_of_parts; ++p) {
      stream_copy(shapes[p].data + row * shapes[p].channels * sizeof(T), reinterpret_cast<char*>(pointers[p]),
                  here * shapes[p].channels * sizeof(T));
    }
  }
  if (buffer != nullptr) stream_end();
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("channel_shuffle");

// A thread's streaming buffer: half of a first-level cache.
constexpr int64_t kBufferBytes = 16384;

// Above this an output no longer stays in a core's share of the cache.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

std::vector<Segment> segments_of(const std::vector<Part>& parts, int64_t groups, int64_t per_group) {
  std::vector<Segment> segments;
  int64_t channel = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    for (int64_t offset = 0; offset < parts[p].channels;) {
      const int64_t group = channel / per_group, within = channel % per_group;
      const int64_t length = std::min(per_group - within, parts[p].channels - offset);
      segments.push_back({static_cast<int64_t>(p), offset, length, within * groups + group});
      offset += length;
      channel += length;
    }
  }
  return segments;
}

template <class T, bool ToWhole>
void copy_rows(const std::vector<Part>& parts, char* whole, int64_t channels, int64_t groups, int64_t pixels) {
  const std::vector<Segment> segments = segments_of(parts, groups, channels / groups);
  const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
  const bool stream = pixels * row_bytes >= kStreamBytes && row_bytes * 4 <= kBufferBytes;
  parallel_for(0, pixels, 32768 / (channels + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<T*> pointers(parts.size());
    alignas(64) char buffer[kBufferBytes];
    SEGFAST_CALL(shuffle_rows<T, ToWhole>)
    (parts.data(), parts.size(), segments.data(), segments.size(), whole, channels, groups, begin, end, pointers.data(),
     stream ? buffer : nullptr, kBufferBytes / row_bytes);
  });
}

template <class T>
void copy_rows(const std::vector<Part>& parts, char* whole, int64_t channels, int64_t groups, int64_t pixels, Way way) {
  if (way == Way::parts_to_whole) return copy_rows<T, true>(parts, whole, channels, groups, pixels);
  copy_rows<T, false>(parts, whole, channels, groups, pixels);
}

void copy_planes(const std::vector<Part>& parts, char* whole, int64_t batch, int64_t channels, int64_t groups, int64_t bytes,
                 Way way) {
  std::vector<char*> first(channels);     // of the planes of the whole, where the first image's twin lies
  std::vector<int64_t> stride(channels);  // and how far it is to the next image's
  for (const Segment& s : segments_of(parts, groups, channels / groups)) {
    for (int64_t i = 0; i < s.length; ++i) {
      first[s.first + i * groups] = parts[s.part].data + (s.offset + i) * bytes;
      stride[s.first + i * groups] = parts[s.part].channels * bytes;
    }
  }
  const bool stream = batch * channels * bytes >= kStreamBytes;
  parallel_for(0, batch * channels, 131072 / (bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    int64_t n = begin / channels, c = begin % channels;
    for (int64_t plane = begin; plane < end; ++plane) {
      char* part = first[c] + n * stride[c];
      char* to = way == Way::parts_to_whole ? whole + plane * bytes : part;
      const char* from = way == Way::parts_to_whole ? part : whole + plane * bytes;
      SEGFAST_CALL(copy_plane)(to, from, bytes, stream);
      if (++c == channels) {
        c = 0;
        ++n;
      }
    }
    if (stream) SEGFAST_CALL(stream_end)();
  });
}

}  // namespace

void shuffle_copy(const std::vector<Tensor>& tensors, const Tensor& whole, int64_t groups, Way way, bool channels_last) {
  if (whole.numel() == 0) return;
  std::vector<Part> parts;
  for (const Tensor& t : tensors) {
    if (t.size(1) > 0) parts.push_back({data<char>(t), t.size(1)});
  }
  const int64_t channels = whole.size(1), area = whole.size(2) * whole.size(3), width = whole.element_size();
  char* to = data<char>(whole);
  if (!channels_last) return copy_planes(parts, to, whole.size(0), channels, groups, area * width, way);
  const int64_t pixels = whole.size(0) * area;
  struct Wide {
    uint64_t a, b;
  };
  switch (width) {  // a shuffle moves bits: the width is all that matters
    case 1:
      return copy_rows<uint8_t>(parts, to, channels, groups, pixels, way);
    case 2:
      return copy_rows<uint16_t>(parts, to, channels, groups, pixels, way);
    case 4:
      return copy_rows<uint32_t>(parts, to, channels, groups, pixels, way);
    case 8:
      return copy_rows<uint64_t>(parts, to, channels, groups, pixels, way);
    default:
      return copy_rows<Wide>(parts, to, channels, groups, pixels, way);
  }
}

namespace {

Tensor channel_shuffle_cpu(const Tensor& input, int64_t groups) {
  counter.add();
  const bool channels_last = is_channels_last(input);
  const Tensor x = contiguous_as(input, channels_last);
  const Tensor y = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), x, channels_last);
  const int64_t per_group = groups > 0 ? x.size(1) / groups : 0;
  if (x.numel() == 0) return y;
  // Shuffling with C / groups undoes shuffling with groups: the copy with fewer, longer runs of channels is the faster one.
  if (groups <= per_group) {
    shuffle_copy({x}, y, groups, Way::parts_to_whole, channels_last);
  } else {
    shuffle_copy({y}, x, per_group, Way::whole_to_parts, channels_last);
  }
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("channel_shuffle", TORCH_BOX(&segfast::channel_shuffle_cpu)); }
#endif
