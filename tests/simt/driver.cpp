// Checks the kernels of one .cuh against plain loops, in several orders and block shapes, without torch: quick to compile, for
// the mutants and the sanitizers. Buffers are exactly as long as they must be and start as NaN; the kernels may touch nothing
// else.
#include <sys/mman.h>
#include <unistd.h>

#include <array>

#ifdef SIMT_MUTANTS
#include "mutants.h"
#endif
#ifdef SIMT_SHUFFLE
#include "shuffle.cuh"
#endif
#ifdef SIMT_PIXELWISE_KL
#include "pixelwise_kl.cuh"
#endif
#ifdef SIMT_DEPTHWISE
#include "depthwise.cuh"
#endif

namespace {

using namespace segfast;

std::string now;  // what is being checked

void check(bool right, const char* what) {
  if (!right) throw std::runtime_error(now + ": " + what);
}

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int64_t shift = 0) : memory_(new char[(n + shift) * sizeof(T) + 16]), n_(n) {
    char* aligned = memory_.get();
    while (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) ++aligned;
    memset(aligned, 0xff, (n + shift) * sizeof(T));
    first_ = reinterpret_cast<T*>(aligned) + shift;
    simt::memory.emplace_back(reinterpret_cast<char*>(first_), reinterpret_cast<char*>(first_ + n));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    const char* mine = reinterpret_cast<char*>(first_);
    std::erase_if(simt::memory, [&](const auto& range) { return range.first == mine; });
  }
  T* data() { return first_; }
  T& operator[](int64_t at) { return first_[at]; }
  int64_t size() const { return n_; }

 private:
  std::unique_ptr<char[]> memory_;
  T* first_;
  int64_t n_;
};

// Billions of elements, zeros, of which only the pages that are touched exist.
template <class T>
class Huge {
 public:
  explicit Huge(int64_t n) : n_(n) {
    void* memory = mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no address space");
    first_ = static_cast<T*>(memory);
    simt::memory.emplace_back(reinterpret_cast<char*>(first_), reinterpret_cast<char*>(first_ + n));
  }
  Huge(const Huge&) = delete;
  ~Huge() {
    const char* mine = reinterpret_cast<char*>(first_);
    std::erase_if(simt::memory, [&](const auto& range) { return range.first == mine; });
    munmap(first_, n_ * sizeof(T));
  }
  T* data() { return first_; }
  T& operator[](int64_t at) { return first_[at]; }

 private:
  T* first_;
  int64_t n_;
};

uint32_t state = 1;
double random_value() {  // uniform in [-3, 3)
  state = state * 1664525u + 1013904223u;
  return (state >> 8) * (6. / (1 << 24)) - 3;
}

bool close(double a, double b, double tolerance) { return a == b || std::abs(a - b) <= tolerance * (1 + std::abs(b)); }

#ifdef SIMT_SHUFFLE
template <class T>
T nth(uint64_t i) {
  if constexpr (sizeof(T) == 16) {
    return {i, ~i};
  } else {
    return static_cast<T>(i * 2654435761u >> 7);
  }
}

template <class T>
bool same(const T& a, const T& b) {
  return memcmp(&a, &b, sizeof(T)) == 0;
}

// `accesses`: of an element by as wide words as can be, or 0 where nothing is promised.
template <class T>
void shuffle_case(std::vector<int64_t> widths, int64_t images, int64_t area, int64_t groups, bool channels_last, int64_t shift,
                  int64_t expected_accesses, bool wide_index, int64_t shift_of_first = 0) {
  int64_t channels = 0;
  for (const int64_t w : widths) channels += w;
  const int64_t total = images * channels * area;
  now = "shuffle of " + std::to_string(channels) + " in " + std::to_string(groups) + (channels_last ? " last" : " first") +
        " width " + std::to_string(sizeof(T)) + " area " + std::to_string(area);
  for (const auto way : {cuda::Way::parts_to_whole, cuda::Way::whole_to_parts}) {
    const bool forward = way == cuda::Way::parts_to_whole;
    std::vector<std::unique_ptr<Buffer<T>>> parts;
    std::vector<cuda::Part> table;
    for (const int64_t w : widths) {
      parts.push_back(std::make_unique<Buffer<T>>(images * w * area, shift + (parts.empty() ? shift_of_first : 0)));
      table.push_back({parts.back()->data(), w});
    }
    Buffer<T> whole(total, shift);
    const auto at = [&](int64_t n, int64_t c, int64_t p, int64_t width) {
      return channels_last ? (n * area + p) * width + c : (n * width + c) * area + p;
    };
    const auto each = [&](const auto& visit) {
      for (int64_t n = 0; n < images; ++n) {
        for (int64_t c = 0, part = 0, first = 0; c < channels; ++c) {
          while (c >= first + widths[part]) first += widths[part++];
          const int64_t per_group = channels / groups, to = c % per_group * groups + c / per_group;
          for (int64_t p = 0; p < area; ++p) {
            visit((*parts[part])[at(n, c - first, p, widths[part])], whole[at(n, to, p, channels)]);
          }
        }
      }
    };
    uint64_t i = 0;
    each([&](T& a, T& b) { (forward ? a : b) = nth<T>(++i); });
    const cuda::ShuffleCall call{
        table.data(), static_cast<int>(table.size()), whole.data(), sizeof(T), images, channels, area, groups, nullptr};
    simt::counts = {};
    if (!wide_index) {
      cuda::shuffle(call, way, channels_last);
    } else if (forward) {
      cuda::launch_shuffle<int64_t, cuda::Way::parts_to_whole>(call, channels_last);
    } else {
      cuda::launch_shuffle<int64_t, cuda::Way::whole_to_parts>(call, channels_last);
    }
    i = 0;
    each([&](T& a, T& b) { check(same(a, nth<T>(++i)) && same(b, nth<T>(i)), "a wrong element"); });
    check(simt::counts.launches == 1, "launches");
#ifndef SEGFAST_SIMT_THREADS
    check(simt::counts.loaded == total * static_cast<int64_t>(sizeof(T)), "bytes loaded");
    check(simt::counts.stored == total * static_cast<int64_t>(sizeof(T)), "bytes stored");
    if (expected_accesses > 0) check(simt::counts.accesses == expected_accesses, "narrower accesses than can be");
#endif
  }
}

void checks() {
  now = "the width of indices";
  check(cuda::fits_32_bits((int64_t{1} << 31) - 1) && !cuda::fits_32_bits(int64_t{1} << 31), "the wrong one");
  for (const bool wide : {false, true}) {
    shuffle_case<uint32_t>({12}, 2, 35, 3, false, 0, 2 * 12 * 2 * 35, wide);
    shuffle_case<uint32_t>({12}, 2, 36, 3, false, 0, 2 * 12 * 2 * 9, wide);
    shuffle_case<uint32_t>({12}, 1, 36, 4, false, 1, 2 * 12 * 36, wide);
    shuffle_case<uint32_t>({12}, 1, 36, 4, false, 2, 2 * 12 * 18, wide);
    shuffle_case<uint16_t>({3, 6, 9}, 1, 20, 6, false, 0, 2 * 18 * 5, wide);
    shuffle_case<uint32_t>({5, 1, 3}, 2, 7, 3, true, 0, 0, wide);
    shuffle_case<uint32_t>({5, 4, 3}, 2, 7, 3, true, 0, 12 * 2 * 7 + 12 * 2 * 7 / 4, wide);
    shuffle_case<uint32_t>({16}, 2, 7, 4, true, 0, 16 * 2 * 7 + 16 * 2 * 7 / 4, wide);
    shuffle_case<uint32_t>({5, 4, 3}, 2, 7, 3, true, 1, 2 * 12 * 2 * 7, wide);
    shuffle_case<uint32_t>({8, 8}, 3, 5, 2, true, 0, 2 * 16 * 15 / 4, wide);
    shuffle_case<uint32_t>({10, 10}, 1, 5, 2, true, 0, 2 * 20 * 5 / 2, wide);
    shuffle_case<uint32_t>({12, 4}, 1, 9, 2, true, 0, 2 * 16 * 9 / 4, wide);
    shuffle_case<uint32_t>({6, 10}, 1, 9, 2, true, 0, 2 * 16 * 9 / 2, wide);
    shuffle_case<uint32_t>({6, 6}, 1, 9, 2, true, 0, 2 * 12 * 9 / 2, wide);
    shuffle_case<uint32_t>({8, 8}, 1, 5, 2, true, 2, 2 * 16 * 5 / 2, wide);
    shuffle_case<uint8_t>({32, 32}, 1, 5, 2, true, 0, 2 * 64 * 5 / 16, wide);
    shuffle_case<uint8_t>({6, 6}, 1, 5, 2, true, 0, 2 * 12 * 5, wide);
    shuffle_case<uint32_t>({8, 8}, 1, 5, 2, true, 0, 2 * 16 * 5 / 2, wide, 2);
    shuffle_case<uint16_t>({4, 8}, 1, 3, 2, true, 0, 2 * 12 * 3 / 2, wide);
    shuffle_case<uint64_t>({6}, 1, 3, 3, true, 0, 6 * 3 + 6 * 3 / 2, wide);
    shuffle_case<Bytes16>({3, 3}, 1, 5, 2, true, 0, 2 * 6 * 5, wide);
    shuffle_case<Bytes16>({4}, 2, 3, 2, false, 0, 2 * 4 * 2 * 3, wide);
    shuffle_case<uint64_t>({6}, 1, 3, 3, false, 0, 0, wide);
  }
  shuffle_case<uint32_t>({8, 8}, 1, 1, 2, false, 0, 2 * 16 / 4, false);
  shuffle_case<uint32_t>(std::vector<int64_t>(cuda::kMostParts, 1), 1, 3, 2, true, 0, 0, false);
  for (const auto& [channels, groups] :
       {std::pair<int64_t, int64_t>{16, 2}, {16, 8}, {16, 4}, {18, 9}, {18, 3}, {5, 1}, {5, 5}}) {
    for (const bool channels_last : {false, true}) {
      now = "channel_shuffle of " + std::to_string(channels) + " in " + std::to_string(groups);
      const int64_t area = 6, per_group = channels / groups;
      Buffer<uint32_t> x(channels * area), y(channels * area);
      for (int64_t i = 0; i < x.size(); ++i) x[i] = nth<uint32_t>(i);
      simt::counts = {};
      cuda::channel_shuffle(x.data(), y.data(), 4, 1, channels, area, groups, channels_last, nullptr);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < area; ++p) {
          const int64_t to = c % per_group * groups + c / per_group;
          check(channels_last ? y[p * channels + to] == x[p * channels + c] : y[to * area + p] == x[c * area + p], "an element");
        }
      }
#ifndef SEGFAST_SIMT_THREADS
      if (channels == 16 && groups != 4 && channels_last)
        check(simt::counts.accesses == 2 * 16 * 6 / 4, "the way of fewer groups");
#endif
    }
  }
}
#endif

#ifdef SIMT_SHUFFLE
// More than 2^31 elements: what the first and the last block of threads move.
void huge_checks() {
  now = "a shuffle of more than 2^31 elements";
  const int64_t area = (int64_t{1} << 29) + 16, total = 4 * area, units = total / 16;
  Huge<uint8_t> x(total), y(total);
  const auto each_touched = [&](const auto& visit) {
    const int64_t step = simt::kBlocks * simt::kThreads;
    for (const int64_t block : {int64_t{0}, simt::kBlocks - 1}) {
      for (int t = 0; t < simt::kThreads; ++t) {
        for (int64_t unit = block * simt::kThreads + t; unit < units; unit += step) visit(unit * 16);
      }
    }
  };
  const auto source = [&](int64_t at) {  // of four channels in two groups the second and the third change places
    const int64_t plane = at / area;
    return (plane == 1 ? 2 : plane == 2 ? 1 : plane) * area + at % area;
  };
  int64_t last = 0;
  each_touched([&](int64_t at) { x[source(at)] = static_cast<uint8_t>(1 + at / 16 % 251), last = std::max(last, at); });
  check(last + 16 == total, "the last element is not reached");
  cuda::channel_shuffle(x.data(), y.data(), 1, 1, 4, area, 2, false, nullptr);
  each_touched([&](int64_t at) { check(y[at] == 1 + at / 16 % 251, "a wrong element"); });
}
#endif

#ifdef SIMT_PIXELWISE_KL
enum class Values { ordinary, infinite, high, low, near, ignored };

template <class S, class T>
void kl_case(int64_t images, int64_t classes, int64_t area, bool channels_last, bool masked, double temperature,
             cuda::Divisor divisor, bool gradient, bool each, Values values = Values::ordinary) {
  using A = typename Wide<S>::type;
  now = "kl of " + std::to_string(images) + "x" + std::to_string(classes) + "x" + std::to_string(area) +
        (channels_last ? " last" : " first") + (masked ? " masked" : "") + " T" + std::to_string(temperature);
  const int64_t pixels = images * area, n = pixels * classes;
  Buffer<S> student(n), saved(n);
  Buffer<T> teacher(n);
  Buffer<bool> valid(pixels);
  Buffer<A> losses(pixels), loss(1), scale(1);
  const int64_t tiles = cuda::kl_tiles(images, classes, area, channels_last);
  Buffer<double> partials(tiles);
  Buffer<unsigned long long> count(1);
  for (int64_t i = 0; i < n; ++i)
    student[i] = narrow<S>(static_cast<A>(random_value() + (values == Values::high ? 200 : values == Values::low ? -200 : 0)));
  for (int64_t i = 0; i < n; ++i) {
    const double near = static_cast<double>(widen(student[i])) + random_value() * 1e-3;
    const double far = random_value() + (values == Values::high ? 200 : values == Values::low ? -200 : 0);
    teacher[i] = narrow<T>(static_cast<A>(values == Values::near ? near : far));
  }
  const auto at = [&](int64_t image, int64_t c, int64_t p) {
    return channels_last ? (image * area + p) * classes + c : (image * classes + c) * area + p;
  };
  if (values == Values::infinite) {  // all logits of one thread's share but not all of a pixel's
    for (int64_t c = 0; c + 1 < classes; ++c) student[at(0, c, 0)] = narrow<S>(static_cast<A>(-INFINITY));
    for (int64_t c = 0; c + 1 < classes; ++c)
      student[at(0, c, 1)] = narrow<S>(static_cast<A>(-60)), teacher[at(0, c, 1)] = narrow<T>(static_cast<A>(-60));
  }
  int64_t valid_pixels = 0;
  for (int64_t i = 0; i < pixels; ++i) valid[i] = values != Values::ignored && random_value() > -1, valid_pixels += valid[i];
  const auto kind = [](auto x) {
    return std::is_same_v<decltype(x), float>    ? Dtype::float32
           : std::is_same_v<decltype(x), __half> ? Dtype::float16
                                                 : Dtype::bfloat16;
  };
  const cuda::KlCall call{.student = {student.data(), kind(S{})},
                          .teacher = {teacher.data(), kind(T{})},
                          .valid = masked ? valid.data() : nullptr,
                          .images = images,
                          .classes = classes,
                          .area = area,
                          .temperature = temperature,
                          .divisor = divisor,
                          .saved = gradient ? saved.data() : nullptr,
                          .losses = each ? losses.data() : nullptr,
                          .loss = each ? nullptr : loss.data(),
                          .scale = scale.data(),
                          .partials = partials.data(),
                          .count = count.data()};
  if (pixels > 0) {
    if (masked) count[0] = valid_pixels;
    channels_last ? cuda::launch_kl<A, true>(call, nullptr) : cuda::launch_kl<A, false>(call, nullptr);
#ifndef SEGFAST_SIMT_THREADS
    const int rows = classes <= 20 && !channels_last ? 1 : classes <= 160 ? 8 : 32;
    const int held = rows == 1 ? 20 : classes <= 32 ? 4 : classes <= 640 ? 20 : 32;
    const std::string types = "launch_kl_tile<" + std::string(sizeof(A) == 8 ? "double" : "float") + ", " + std::to_string(rows) +
                              ", " + std::to_string(held) + ",";
    check(simt::launched.find(types) != std::string::npos, "a kernel for other numbers of classes");
    check(simt::shared_bytes_of == 5 * 256 * sizeof(A) + 8 * 8 + 8, "the size of shared memory");
#endif
  }
  simt::counts = {};
  cuda::pixelwise_kl<A>(call, channels_last, nullptr);
#ifndef SEGFAST_SIMT_THREADS
  if (classes <= 1024) {
    // Every logit of a pixel that counts once; the gradient; the mask by every row and the count, which every tile reads; a
    // partial a tile, written and read; the loss or losses and the scale.
    const int64_t s = sizeof(S), t = sizeof(T), a = sizeof(A), used = masked ? valid_pixels : pixels;
    int64_t bytes = used * classes * (s + t) + (gradient ? n * s : 0) + 16 * tiles + (each ? pixels * a : a) + a;
    const int64_t rows = classes <= 20 && !channels_last ? 1 : classes <= 160 ? 8 : 32;
    if (masked && pixels > 0) bytes += (1 + rows) * pixels + 8 * tiles + 8 + 8 * blocks_for(pixels);
    check(simt::counts.loaded + simt::counts.stored == bytes, "bytes");
    check(tiles == ceil_div(pixels, simt::kThreads / rows), "the number of tiles");
    if (rows == 1 && !masked)
      check(simt::counts.shared <= 2 * tiles * simt::kThreads + 64, "shared memory that one row needs not");
  }
#endif
  const double by = divisor == cuda::Divisor::one      ? 1
                    : divisor == cuda::Divisor::images ? images
                    : masked && pixels > 0             ? std::max(1., static_cast<double>(valid_pixels))
                                                       : static_cast<double>(pixels);
  if (pixels == 0 && divisor == cuda::Divisor::pixels) return check(std::isnan(loss[0]), "a mean of nothing");
  check(close(scale[0], 1 / by, 1e-6), "the scale");
  const double tolerance = sizeof(S) == 8 ? 1e-13 : sizeof(S) == 2 ? (std::is_same_v<S, __half> ? 2e-3 : 1e-2) : 3e-6;
  double total = 0;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t p = 0; p < area; ++p) {
      std::vector<double> s(classes), t(classes);
      double max_s = -INFINITY, max_t = -INFINITY, sum_s = 0, sum_t = 0, value = 0;
      for (int64_t c = 0; c < classes; ++c) {
        s[c] = static_cast<double>(widen(student[at(image, c, p)])) / temperature, max_s = std::max(max_s, s[c]);
        t[c] = static_cast<double>(widen(teacher[at(image, c, p)])) / temperature, max_t = std::max(max_t, t[c]);
      }
      for (int64_t c = 0; c < classes; ++c) sum_s += exp(s[c] - max_s), sum_t += exp(t[c] - max_t);
      const bool keep = !masked || valid[image * area + p];
      for (int64_t c = 0; c < classes; ++c) {
        const double log_s = s[c] - max_s - log(sum_s), log_t = t[c] - max_t - log(sum_t);
        value += exp(log_t) * (log_t - log_s);
        if (!gradient) continue;
        const double g = (exp(log_s) - exp(log_t)) * temperature / (std::is_same_v<S, __half> ? 1 : by);
        check(close(static_cast<double>(widen(saved[at(image, c, p)])), keep ? g : 0, tolerance), "a gradient");
      }
      value = keep ? value * temperature * temperature : 0;
      total += value;
      if (each) check(close(losses[image * area + p], value, sizeof(S) == 8 ? 1e-13 : 1e-5), "the loss of a pixel");
      if (each && values == Values::near) {
        check(std::abs(losses[image * area + p] - value) <= (sizeof(S) == 8 ? 1e-6 : 5e-3) * value, "a small loss, relatively");
      }
    }
  }
  if (!each) check(close(loss[0], total / by, 1e-5), "the loss");
}

void checks() {
  using cuda::Divisor;
  const bool all = simt::kThreads == 256;
  for (const bool last : {false, true}) {
    kl_case<float, float>(2, 5, 131, last, true, 4, Divisor::pixels, true, false);
    kl_case<float, __half>(1, 20, 35, last, false, .7, Divisor::pixels, true, false, Values::infinite);
    kl_case<__half, float>(2, 21, 17, last, true, 1, Divisor::pixels, true, false);
    kl_case<__nv_bfloat16, float>(1, 33, 11, last, true, 2, Divisor::images, true, false, Values::infinite);
    kl_case<float, __nv_bfloat16>(2, 3, 19, last, true, 1, Divisor::one, true, true);
    kl_case<float, float>(1, 161, 3, last, true, .5, Divisor::images, true, false, Values::infinite);
    kl_case<float, float>(1, 641, 3, last, true, 1, Divisor::pixels, true, true, Values::infinite);
    kl_case<float, float>(1, 1025, 2, last, false, 1, Divisor::one, true, false, Values::infinite);
    kl_case<float, float>(1, 1030, 2, last, false, 1, Divisor::pixels, false, true, Values::infinite);
    kl_case<float, float>(3, 7, 0, last, true, 1, Divisor::one, true, false);
    kl_case<float, float>(3, 7, 0, last, true, 1, Divisor::pixels, true, false);
    kl_case<float, float>(1, 1, 40, last, true, 1, Divisor::one, true, true);
    kl_case<float, float>(1, 4, 1, last, true, 1, Divisor::pixels, true, false);
    kl_case<float, float>(1, 4, 9, last, true, 1, Divisor::pixels, true, false, Values::ignored);
    kl_case<float, float>(1, 4, 1, last, true, 1, Divisor::pixels, true, false, Values::ignored);
    kl_case<double, double>(1, 5, 9, last, true, .7, Divisor::pixels, true, true);
    kl_case<double, double>(1, 5, 9, last, false, 1, Divisor::one, true, true, Values::near);
    for (const Values values : {Values::high, Values::low, Values::near}) {
      kl_case<float, float>(1, 7, 9, last, false, 1, Divisor::one, true, true, values);
      kl_case<float, float>(1, 21, 9, last, false, 1, Divisor::one, true, true, values);
    }
    for (const int64_t classes : {19, 20, 21, 32, 33, 160, 161, 640, 641, 1024}) {
      if (!all && classes > 40) continue;
      kl_case<float, float>(1, classes,
                            classes < 160    ? 57
                            : classes == 160 ? 40
                                             : 15,
                            last, false, 1, Divisor::pixels, true, false);
    }
  }
  kl_case<float, float>(1, 2, 9 * simt::kThreads, false, true, 1, Divisor::pixels, false, false);
  kl_case<float, float>(1, 2, (simt::kThreads + 3) * simt::kThreads / 8, false, false, 1, Divisor::pixels, false, false);
}
#endif

#ifdef SIMT_PIXELWISE_KL
void huge_checks() {
  now = "kl of more than 2^31 logits";
  const int64_t pixels = (int64_t{1} << 30) + 45, first = pixels - 40;
  Huge<__half> student(2 * pixels), teacher(2 * pixels), saved(2 * pixels);
  Huge<float> losses(pixels);
  Huge<double> partials(cuda::kl_tiles(1, 2, pixels, false));
  for (int64_t c = 0; c < 2; ++c) {
    for (int64_t p = first; p < pixels; ++p) {
      student[c * pixels + p] = narrow<__half>(static_cast<float>(random_value()));
      teacher[c * pixels + p] = narrow<__half>(static_cast<float>(random_value()));
    }
  }
  const cuda::KlCall call{.student = {student.data(), Dtype::float16},
                          .teacher = {teacher.data(), Dtype::float16},
                          .valid = nullptr,
                          .images = 1,
                          .classes = 2,
                          .area = pixels,
                          .temperature = 1,
                          .divisor = cuda::Divisor::one,
                          .saved = saved.data(),
                          .losses = losses.data(),
                          .loss = nullptr,
                          .scale = nullptr,
                          .partials = partials.data(),
                          .count = nullptr};
  cuda::launch_kl<float, false>(call, nullptr);
  for (int64_t p = first; p < pixels; ++p) {
    const auto probability = [&](Huge<__half>& x) {
      return 1 / (1 + exp(static_cast<double>(widen(x[pixels + p])) - static_cast<double>(widen(x[p]))));
    };
    const double a = probability(student), b = probability(teacher);
    check(close(losses[p], b * log(b / a) + (1 - b) * log((1 - b) / (1 - a)), 1e-5), "the loss of a pixel");
    check(close(static_cast<double>(widen(saved[p])), a - b, 2e-3), "a gradient");
    check(close(static_cast<double>(widen(saved[pixels + p])), b - a, 2e-3), "a gradient of the last class");
  }
}
#endif

#ifdef SIMT_DEPTHWISE
void huge_checks() {
  now = "depthwise of more than 2^31 elements";
  const int side = 46411;
  const cuda::DepthwiseShape s{1, 1, side, side, side, side, 3, 3, 1, 1, 1, 1, 1, 1};
  const cuda::DepthwiseTile tile = cuda::depthwise_tile_of(s, 4);
  const int top = (tile.down - 1) * tile.rows * cuda::kDepthwiseRun, left = (tile.across - 1) * tile.columns;
  const auto at = [&](int row, int column) { return static_cast<int64_t>(row) * side + column; };
  Huge<__half> x(at(side, 0)), y(at(side, 0));
  Buffer<__half> weight(9);
  for (int k = 0; k < 9; ++k) weight[k] = narrow<__half>(static_cast<float>(k - 3) / 4);
  for (int r = top - 1; r < side; ++r) {
    for (int c = left - 1; c < side; ++c) x[at(r, c)] = narrow<__half>(static_cast<float>(random_value()));
  }
  cuda::depthwise<__half>(s, x.data(), weight.data(), nullptr, nullptr, cuda::Act::none, y.data(), nullptr);
  for (int r = top; r < side; ++r) {
    for (int c = left; c < side; ++c) {
      double value = 0;
      for (int k = 0; k < 9; ++k) {
        const int row = r + k / 3 - 1, column = c + k % 3 - 1;
        if (row < side && column < side) value += static_cast<double>(widen(x[at(row, column)])) * (k - 3) / 4;
      }
      check(close(static_cast<double>(widen(y[at(r, c)])), value, 1e-2), "an output");
    }
  }
}

struct Case {
  int64_t images, channels;
  int h, w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t reads;  // of the input, each element as often as tiles need it; 0 where it is not staged or not counted
};

template <class T>
void depthwise_case(const Case& k, cuda::Act act) {
  now = "depthwise of " + std::to_string(k.h) + "x" + std::to_string(k.w) + " kernel " + std::to_string(k.kernel_h) + "x" +
        std::to_string(k.kernel_w) + " stride " + std::to_string(k.stride_h) + " act " + std::to_string(static_cast<int>(act));
  using A = typename Wide<T>::type;
  cuda::DepthwiseShape s{k.images,   k.channels,  k.h,         k.w,          0,           0, k.kernel_h, k.kernel_w, k.stride_h,
                         k.stride_w, k.padding_h, k.padding_w, k.dilation_h, k.dilation_w};
  s.out_h = (k.h + 2 * k.padding_h - k.dilation_h * (k.kernel_h - 1) - 1) / k.stride_h + 1;
  s.out_w = (k.w + 2 * k.padding_w - k.dilation_w * (k.kernel_w - 1) - 1) / k.stride_w + 1;
  const int64_t planes = k.images * k.channels, outputs = planes * s.out_h * s.out_w, taps = k.kernel_h * k.kernel_w;
  Buffer<T> x(planes * k.h * k.w), weight(k.channels * taps), y(outputs), u(outputs);
  Buffer<A> scale(k.channels), shift(k.channels), mean(k.channels), var(k.channels);
  Buffer<double> partials(cuda::depthwise_partials<T>(s));
  for (int64_t i = 0; i < x.size(); ++i) x[i] = narrow<T>(static_cast<A>(random_value() + 5));
  for (int64_t i = 0; i < weight.size(); ++i) weight[i] = narrow<T>(static_cast<A>(random_value() / 3));
  for (int64_t i = 0; i < k.channels; ++i) scale[i] = static_cast<A>(random_value()), shift[i] = static_cast<A>(random_value());
  simt::counts = {};
  cuda::depthwise<T>(s, x.data(), weight.data(), scale.data(), shift.data(), act, y.data(), nullptr);
#ifndef SEGFAST_SIMT_THREADS
  check(simt::counts.stored == outputs * static_cast<int64_t>(sizeof(T)), "bytes stored");
  if (k.reads > 0 && simt::kThreads == 256) {
    const cuda::DepthwiseTile tile = cuda::depthwise_tile_of(s, sizeof(A));
    const int64_t small =
        planes * tile.across * tile.down * (taps * static_cast<int64_t>(sizeof(T)) + 2 * static_cast<int64_t>(sizeof(A)));
    check(simt::counts.loaded == planes * k.reads * static_cast<int64_t>(sizeof(T)) + small, "bytes loaded");
  }
#endif
  const cuda::DepthwiseTile tile = cuda::depthwise_tile_of(s, sizeof(A));
  const int64_t blocks = planes * tile.across * tile.down;
  check(partials.size() == 3 * blocks, "scratch for the statistics");
#ifndef SEGFAST_SIMT_THREADS
  const size_t staged = static_cast<size_t>(tile.halo_h) * tile.halo_w * sizeof(A);
  const size_t fixed = (staged + 15) / 16 * 16 + 64 * sizeof(A) + 16 + 8 * 24;  // taps, scale and shift, moments of eight warps
  check(simt::shared_bytes_of == fixed, "the size of shared memory");
#endif
#ifndef SEGFAST_SIMT_THREADS
  int64_t staged_accesses = 0;
  if (k.kernel_h == 3 && k.kernel_w == 3 && k.stride_h == k.stride_w && k.stride_h < 3 && k.dilation_h == 1 &&
      k.dilation_w == 1) {
    // The kernel made for this shape: three staged values of every row that a thread goes down, the taps, scale and shift.
    const int64_t thread = ((cuda::kDepthwiseRun - 1) * k.stride_h + 3) * 3 + 9 + 2;
    const int64_t block = static_cast<int64_t>(tile.halo_h) * tile.halo_w + 9 + 2 + thread * tile.columns * tile.rows;
    staged_accesses = blocks * block;
    check(simt::counts.shared == staged_accesses, "accesses of shared memory");
  }
#endif
  const bool biased = act != cuda::Act::relu;
  simt::counts = {};
  cuda::depthwise_train<T>(s, x.data(), weight.data(), biased ? shift.data() : nullptr, u.data(), partials.data(), mean.data(),
                           var.data(), nullptr);
#ifndef SEGFAST_SIMT_THREADS
  if (staged_accesses > 0) {  // and of the moments: each warp's written, and read by the first thread but for its own warp's
    const int64_t warps = tile.columns * tile.rows / 32, last = simt::kThreads / 32;
    check(simt::counts.shared == staged_accesses + blocks * (2 * warps - 1) + k.channels * (2 * last - 1),
          "accesses of shared memory in training");
  }
#endif
  const double tolerance = sizeof(T) == 2 ? 1e-2 : 1e-5;
  double values = 0;
  for (int64_t b = 0; b < blocks; ++b) values += partials[3 * b];
  check(values == static_cast<double>(outputs), "the number of values in the statistics");
  for (int64_t c = 0; c < k.channels; ++c) {
    double sum = 0, squares = 0;
    for (int64_t n = 0; n < k.images; ++n) {
      const int64_t plane = n * k.channels + c;
      for (int oh = 0; oh < s.out_h; ++oh) {
        for (int ow = 0; ow < s.out_w; ++ow) {
          double value = 0;
          for (int kh = 0; kh < k.kernel_h; ++kh) {
            for (int kw = 0; kw < k.kernel_w; ++kw) {
              const int ih = oh * k.stride_h - k.padding_h + kh * k.dilation_h,
                        iw = ow * k.stride_w - k.padding_w + kw * k.dilation_w;
              if (ih < 0 || ih >= k.h || iw < 0 || iw >= k.w) continue;
              value += static_cast<double>(widen(x[(plane * k.h + ih) * k.w + iw])) *
                       static_cast<double>(widen(weight[(c * k.kernel_h + kh) * k.kernel_w + kw]));
            }
          }
          const int64_t at = (plane * s.out_h + oh) * s.out_w + ow;
          double expected = value * scale[c] + shift[c];
          if (act == cuda::Act::relu) expected = std::max(expected, 0.);
          if (act == cuda::Act::relu6) expected = std::min(std::max(expected, 0.), 6.);
          if (act == cuda::Act::silu) expected = expected / (1 + exp(-expected));
          if (act == cuda::Act::hardswish) expected = expected * std::min(std::max(expected + 3, 0.), 6.) / 6;
          check(close(static_cast<double>(widen(y[at])), expected, tolerance), "an output");
          check(close(static_cast<double>(widen(u[at])), value + (biased ? shift[c] : 0), tolerance), "an output in training");
          sum += static_cast<double>(widen(u[at])), squares += pow(static_cast<double>(widen(u[at])), 2);
        }
      }
    }
    const double n = static_cast<double>(k.images) * s.out_h * s.out_w, expected = sum / n;
    check(close(mean[c], expected, 1e-6), "a mean");
    check(close(var[c], squares / n - expected * expected, 1e-5), "a variance");
  }
}

// The tile of a plane: columns, rows of threads, and the staged input.
void tile_case(int h, int w, int kernel, int stride, int dilation, int64_t bytes, std::array<int, 6> expected) {
  now = "the tile of " + std::to_string(h) + "x" + std::to_string(w) + " stride " + std::to_string(stride);
  const int reach = dilation * (kernel - 1);
  const cuda::DepthwiseShape s{
      1, 1, h * stride + reach, w * stride + reach, h, w, kernel, kernel, stride, stride, 0, 0, dilation, dilation};
  const cuda::DepthwiseTile t = cuda::depthwise_tile_of(s, bytes);
  check(std::array{t.columns, t.rows, t.halo_h, t.halo_w, t.across, t.down} == expected, "another tile");
}

void tiles() {
  tile_case(33, 32, 3, 1, 1, 4, {32, 5, 42, 34, 1, 1});
  tile_case(32, 33, 3, 1, 1, 4, {64, 4, 34, 66, 1, 1});
  tile_case(33, 65, 3, 1, 1, 4, {64, 4, 34, 66, 2, 2});
  tile_case(8, 64, 3, 1, 1, 4, {64, 1, 10, 66, 1, 1});
  tile_case(9, 64, 3, 1, 1, 4, {64, 2, 18, 66, 1, 1});
  tile_case(128, 128, 3, 2, 1, 4, {64, 4, 65, 129, 2, 4});
  tile_case(128, 128, 3, 2, 1, 8, {64, 2, 33, 129, 2, 8});
  tile_case(128, 128, 3, 1, 43, 4, {64, 1, 0, 0, 2, 16});
  tile_case(128, 128, 3, 1, 20, 4, {64, 4, 72, 104, 2, 4});
  tile_case(128, 128, 3, 1, 31, 4, {64, 2, 0, 0, 2, 8});
  tile_case(128, 128, 2, 1, 54, 4, {64, 4, 0, 0, 2, 4});     // 40,592 bytes of 40,960
  tile_case(128, 128, 2, 1, 55, 4, {64, 3, 0, 0, 2, 6});     // would be 41,412
  tile_case(128, 128, 3, 1, 32, 4, {64, 2, 0, 0, 2, 8});     // 40,960 exactly, which fits, but mostly halo
  tile_case(128, 128, 4, 2, 11, 4, {64, 2, 64, 160, 2, 8});  // 40,960 exactly
  tile_case(32, 30, 3, 1, 16, 4, {32, 4, 64, 64, 1, 1});     // 4,096 of 4 x 1,024
  tile_case(8, 30, 3, 1, 7, 4, {32, 1, 22, 46, 1, 1});       // 1,012 of 4 x 256
  tile_case(8, 30, 5, 1, 4, 4, {32, 1, 0, 0, 1, 1});         // 1,152: mostly halo
}

void checks() {
  if (simt::kThreads == 256) tiles();
  const auto acts = {cuda::Act::none, cuda::Act::relu, cuda::Act::relu6, cuda::Act::silu, cuda::Act::hardswish};
  for (const cuda::Act act : acts) depthwise_case<float>({1, 2, 5, 9, 3, 3, 1, 1, 1, 1, 1, 1, 45}, act);
  depthwise_case<float>({2, 2, 9, 33, 3, 3, 1, 1, 1, 1, 1, 1, 9 * 33}, cuda::Act::relu);
  depthwise_case<float>({1, 1, 37, 70, 3, 3, 1, 1, 1, 1, 1, 1, (33 + 6) * (65 + 7)}, cuda::Act::none);
  depthwise_case<float>({3, 2, 19, 37, 3, 3, 2, 2, 1, 1, 1, 1, 19 * 37}, cuda::Act::none);
  depthwise_case<float>({1, 1, 21, 140, 3, 3, 2, 2, 0, 2, 1, 1, 0}, cuda::Act::none);
  depthwise_case<float>({1, 1, 12, 12, 3, 3, 2, 1, 1, 1, 1, 1, 12 * 12}, cuda::Act::none);
  depthwise_case<float>({1, 1, 12, 12, 3, 3, 1, 2, 1, 1, 1, 1, 12 * 12}, cuda::Act::none);
  depthwise_case<float>({1, 2, 13, 11, 5, 3, 1, 2, 2, 0, 1, 2, 0}, cuda::Act::relu);
  depthwise_case<float>({1, 2, 13, 11, 3, 5, 2, 1, 1, 2, 1, 1, 13 * 11}, cuda::Act::none);
  depthwise_case<float>({1, 1, 11, 13, 3, 3, 1, 1, 2, 1, 2, 1, 11 * 13}, cuda::Act::none);
  depthwise_case<float>({1, 1, 11, 13, 3, 3, 1, 1, 1, 2, 1, 2, 11 * 13}, cuda::Act::none);
  depthwise_case<float>({1, 1, 40, 41, 3, 3, 1, 1, 36, 36, 36, 36, 0}, cuda::Act::none);
  depthwise_case<float>({1, 1, 23, 19, 8, 8, 3, 3, 3, 3, 1, 1, 0}, cuda::Act::none);
  depthwise_case<float>({2, 3, 1, 2, 1, 1, 1, 1, 0, 0, 1, 1, 2}, cuda::Act::none);
  depthwise_case<float>({3, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1}, cuda::Act::none);
  depthwise_case<float>({1, 1, 9, 9, 3, 1, 1, 1, 1, 0, 1, 1, 81}, cuda::Act::none);
  depthwise_case<float>({1, 1, 9, 9, 1, 3, 1, 1, 0, 1, 1, 1, 81}, cuda::Act::none);
  depthwise_case<float>({1, 1, 9, 9, 2, 2, 1, 1, 0, 0, 1, 1, 81}, cuda::Act::none);
  depthwise_case<double>({2, 2, 9, 7, 3, 3, 1, 1, 1, 1, 1, 1, 63}, cuda::Act::hardswish);
  depthwise_case<__half>({2, 1, 9, 7, 3, 3, 1, 1, 1, 1, 1, 1, 63}, cuda::Act::relu);
  depthwise_case<__nv_bfloat16>({300, 1, 2, 3, 3, 3, 1, 1, 1, 1, 1, 1, 0}, cuda::Act::none);
}
#endif

}  // namespace

int main(int count, char** values) {
#ifndef SEGFAST_SIMT_THREADS
  alarm(120);  // a mutant may never end
#endif
#ifdef SIMT_MUTANTS
  simt_mutant = count > 1 ? atoi(values[1]) : -1;
#else
  (void)values;
#endif
#ifdef SEGFAST_SIMT_THREADS
  (void)count;
#endif
  try {
#ifdef SEGFAST_SIMT_THREADS
    for (const auto& [threads, blocks] : {std::pair<int, int64_t>{64, 2}, {96, 3}}) {
      simt::kThreads = threads, simt::kBlocks = blocks, state = 1;
      checks();
    }
#else
    for (const auto& [order, threads, blocks] : {std::tuple<simt::Schedule, int, int64_t>{simt::Schedule::forward, 64, 2},
                                                 {simt::Schedule::reverse, 256, 1 << 16},
                                                 {simt::Schedule::shuffled, 96, 3}}) {
      simt::schedule = order, simt::kThreads = threads, simt::kBlocks = blocks, state = 1;
      checks();
    }
    if (count == 1) {
      simt::kThreads = 256, simt::kBlocks = 1 << 16, simt::edge_blocks = 1;
      huge_checks();
    }
#endif
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
