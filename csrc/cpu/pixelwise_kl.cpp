#define SEGFAST_FILE "pixelwise_kl.cpp"
#include "each_isa.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

constexpr int64_t kAhead = 4;  // classes whose rows are fetched ahead: the hardware's prefetcher starts anew with every row

// Logits of `count` pixels over the temperature, class-major: out[c][pitch], and the greatest of each pixel in `max`. Lanes
// past `count` hold finite rubbish.
template <class T, class A>
void gather_logits(const T* x, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count, int64_t pitch,
                   A temperature, bool multiply, A* out, A* max) {
  const int64_t whole = (count + lanes<A> - 1) / lanes<A> * lanes<A>;
  if (pixel_stride == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      // Past the last class: the first rows of the next block.
      const T* const ahead =
          c + kAhead < classes ? x + (c + kAhead) * class_stride : x + (c + kAhead - classes) % classes * class_stride + whole;
      for (int64_t p = 0; p < whole; p += lanes<A>) {
        const int64_t left = count - p;
        prefetch_l2(ahead + p);
        const Vec<A> raw = load_n(x + c * class_stride + p, left < lanes<A> ? static_cast<int>(left) : lanes<A>);
        const Vec<A> v = multiply ? raw * temperature : raw / temperature;
        store(out + c * pitch + p, v);
        if (c == 0) {
          store(max + p, v);
        } else {
          const Vec<A> m = load(max + p);
          store(max + p, v > m ? v : m);
        }
      }
    }
    return;
  }
  for (int64_t p = 0; p < whole; ++p) {
    const T* from = x + (p < count ? p : 0) * pixel_stride;
    for (int64_t c = 0; c < classes; ++c) {
      const A v = static_cast<A>(widen(from[c * class_stride]));
      out[c * pitch + p] = multiply ? v * temperature : v / temperature;
    }
  }
  for (int64_t p = 0; p < whole; p += lanes<A>) {
    Vec<A> m = load(out + p);
    for (int64_t c = 1; c < classes; ++c) {
      const Vec<A> v = load(out + c * pitch + p);
      m = v > m ? v : m;
    }
    store(max + p, m);
  }
}

// With e = exp(x - max), Z = sum e and D = sum e_t ((t - max t) - (s - max s)):  KL = D / Z_t + log(Z_s / Z_t), and the
// gradient is e_s / Z_s - e_t / Z_t times `scale`: the exponentials stay in `s` and `t`, the factors go into `max_s` and
// `max_t`. Invalid pixels give 0 whatever they hold.
template <class A>
void block_kl(A* s, A* t, A* max_s, A* max_t, int64_t classes, int64_t count, int64_t pitch, const bool* valid, bool gradient,
              A scale, A* kl) {
  for (int64_t p = 0; p < count; p += lanes<A>) {
    const Vec<A> shift_s = load(max_s + p), shift_t = load(max_t + p);
    Vec<A> sum_s{}, sum_t{}, difference{};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<A> a = load(s + c * pitch + p) - shift_s, b = load(t + c * pitch + p) - shift_t;
      const Vec<A> exp_s = exp<true>(a), exp_t = exp<true>(b);
      sum_s += exp_s;
      sum_t += exp_t;
      difference += exp_t * (b - a);
      if (gradient) {
        store(s + c * pitch + p, exp_s);
        store(t + c * pitch + p, exp_t);
      }
    }
    const Vec<A> value = difference / sum_t + log(sum_s / sum_t);
    store(kl + p, value);
    if (gradient) {
      store(max_s + p, scale / sum_s);
      store(max_t + p, scale / sum_t);
    }
    if (valid == nullptr) continue;
    for (int i = 0; i < lanes<A> && p + i < count; ++i) {
      if (!valid[p + i]) kl[p + i] = 0;
    }
  }
}

template <class T, class A>
void write_gradient(const A* s, const A* t, const A* scale_s, const A* scale_t, const bool* valid, int64_t class_stride,
                    int64_t pixel_stride, int64_t classes, int64_t count, int64_t pitch, A* row, bool past_caches, T* out) {
  if constexpr (std::is_same_v<T, float>) {
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && class_stride % 16 == 0 && count % lanes<A> == 0;
    if (past_caches && aligned && pixel_stride == 1 && valid == nullptr) {
      for (int64_t c = 0; c < classes; ++c) {
        for (int64_t p = 0; p < count; p += lanes<A>) {
          stream(out + c * class_stride + p,
                 load(s + c * pitch + p) * load(scale_s + p) - load(t + c * pitch + p) * load(scale_t + p));
        }
      }
      return fence();
    }
  }
  for (int64_t c = 0; c < classes; ++c) {
    A* const to = pixel_stride == 1 ? row : const_cast<A*>(s) + c * pitch;
    for (int64_t p = 0; p < count; p += lanes<A>) {
      const Vec<A> g = load(s + c * pitch + p) * load(scale_s + p) - load(t + c * pitch + p) * load(scale_t + p);
      if (pixel_stride == 1 && valid == nullptr) {
        const int64_t left = count - p;
        store_n(out + c * class_stride + p, g, left < lanes<A> ? static_cast<int>(left) : lanes<A>);
      } else {
        store(to + p, g);
      }
    }
    if (pixel_stride != 1 || valid == nullptr) continue;
    for (int64_t p = 0; p < count; ++p) out[c * class_stride + p] = valid[p] ? narrow_to<T>(row[p]) : T(0);
  }
  if (pixel_stride == 1) return;
  for (int64_t p = 0; p < count; ++p) {
    const bool keep = valid == nullptr || valid[p];
    for (int64_t c = 0; c < classes; ++c) {
      out[p * pixel_stride + c * class_stride] = keep ? narrow_to<T>(s[c * pitch + p]) : T(0);
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>
#include <vector>

namespace segfast {
namespace {

Counter counter("pixelwise_kl");

enum Reduction : int64_t { none, mean, sum, batchmean };
constexpr int64_t kPart = 4096;  // pixels whose losses are added in one go, whatever the number of threads

// Logits as [image][class][pixel] with strides. Where classes are contiguous, all images' pixels lie in one line.
struct Logits {
  Tensor x;
  bool channels_last;
  int64_t images, classes, pixels, class_stride, pixel_stride, image_stride;
  explicit Logits(const Tensor& t)
      : x(contiguous_as(t, is_channels_last(t))),
        channels_last(is_channels_last(x)),
        images(t.size(0)),
        classes(t.size(1)),
        pixels(t.size(2) * t.size(3)),
        class_stride(channels_last ? 1 : pixels),
        pixel_stride(channels_last ? classes : 1),
        image_stride(classes * pixels) {}
  int64_t offset(int64_t image, int64_t pixel) const { return image * image_stride + pixel * pixel_stride; }
};

int64_t count_valid(const bool* valid, int64_t n) {
  std::atomic<int64_t> total{0};
  parallel_for(0, n, 1 << 16, [&](int64_t from, int64_t to) {
    int64_t here = 0;
    for (int64_t i = from; i < to; ++i) here += valid[i];
    total += here;
  });
  return total;
}

template <class A>
A* aligned(std::vector<A>& buffer) {
  return reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

std::tuple<Tensor, Tensor, Tensor> pixelwise_kl_cpu(const Tensor& student, const Tensor& teacher, std::optional<Tensor> mask,
                                                    double temperature, int64_t reduction, bool gradient) {
  counter.add();
  const Logits s(student), t(teacher);
  const bool wide = s.x.scalar_type() == ScalarType::Double;
  const ScalarType result = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t all = s.images * s.pixels;
  const Tensor valid = mask.has_value() ? torch::stable::contiguous(*mask) : s.x;
  const bool* const keep = mask.has_value() ? data<const bool>(valid) : nullptr;
  const Tensor loss =
      reduction == none ? empty({s.images, student.size(2), student.size(3)}, result, s.x) : empty({}, result, s.x);
  const Tensor saved =
      gradient ? empty({s.images, s.classes, student.size(2), student.size(3)}, s.x.scalar_type(), s.x, s.channels_last)
               : empty({0}, s.x.scalar_type(), s.x);
  const Tensor scale = empty({}, result, s.x);
  double divisor = 1;
  if (reduction == mean) divisor = static_cast<double>(keep != nullptr ? std::max<int64_t>(count_valid(keep, all), 1) : all);
  if (all == 0) divisor = std::numeric_limits<double>::quiet_NaN();
  if (reduction == batchmean) divisor = static_cast<double>(s.images);
  if (reduction == sum) divisor = 1;
  const int64_t parts = (s.pixels + kPart - 1) / kPart;
  std::vector<double> sums(s.images * parts);
  // Half has too few small numbers for a gradient divided by the number of pixels: that factor is applied at the end.
  const double factor = s.x.scalar_type() == ScalarType::Half ? temperature : temperature / divisor;

  dispatch_float("pixelwise_kl", s.x.scalar_type(), [&](auto student_type) {
    dispatch_float("pixelwise_kl", t.x.scalar_type(), [&](auto teacher_type) {
      using S = decltype(student_type);
      using T = decltype(teacher_type);
      using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
      if constexpr (std::is_same_v<S, double> == std::is_same_v<T, double>) {
        const A inverse = static_cast<A>(1 / temperature);
        int exponent = 0;
        const bool exact = std::frexp(temperature, &exponent) == 0.5 && std::abs(exponent) < 100;
        // Long runs of a class, for the hardware asks ahead within them alone; both blocks stay in cache, if not the second
        // level's. The pitch is odd in cache lines, or the classes would share a set.
        const int64_t block = s.channels_last ? 16 : std::clamp<int64_t>((1 << 18) / s.classes / 64 * 64, 64, 1024);
        const int64_t pitch = block + 16;
        const bool past_caches = saved.numel() * sizeof(S) > (16u << 20);  // with both logits, three times that
        parallel_for(0, s.images * parts, 1, [&](int64_t from, int64_t to) {
          std::vector<A> buffer((2 * s.classes + 4) * pitch + 64 / sizeof(A));
          A* const a = aligned(buffer);
          A* const b = a + s.classes * pitch;
          A* const kl = b + s.classes * pitch;
          A* const max_a = kl + pitch;
          A* const max_b = max_a + pitch;
          A* const row = max_b + pitch;
          for (int64_t part = from; part < to; ++part) {
            const int64_t image = part / parts, begin = part % parts * kPart, end = std::min(begin + kPart, s.pixels);
            double total = 0;
            for (int64_t p = begin; p < end; p += block) {
              const int64_t count = std::min(block, end - p), pixel = image * s.pixels + p;
              const bool* const valid_here = keep == nullptr ? nullptr : keep + pixel;
              SEGFAST_CALL(gather_logits<S, A>)
              (data<const S>(s.x) + s.offset(image, p), s.class_stride, s.pixel_stride, s.classes, count, pitch,
               exact ? inverse : static_cast<A>(temperature), exact, a, max_a);
              SEGFAST_CALL(gather_logits<T, A>)
              (data<const T>(t.x) + t.offset(image, p), t.class_stride, t.pixel_stride, t.classes, count, pitch,
               exact ? inverse : static_cast<A>(temperature), exact, b, max_b);
              SEGFAST_CALL(block_kl<A>)
              (a, b, max_a, max_b, s.classes, count, pitch, valid_here, gradient, static_cast<A>(factor), kl);
              if (gradient) {
                SEGFAST_CALL(write_gradient<S, A>)
                (a, b, max_a, max_b, valid_here, s.class_stride, s.pixel_stride, s.classes, count, pitch, row, past_caches,
                 data<S>(saved) + s.offset(image, p));
              }
              if (reduction == none) {
                A* const out = data<A>(loss) + pixel;
                for (int64_t i = 0; i < count; ++i) {
                  out[i] = static_cast<A>(temperature * temperature * static_cast<double>(kl[i]));
                }
                continue;
              }
              std::array<double, 8> lanes{};  // one chain of additions would take longer than the exponentials
              int64_t i = 0;
              for (; i + 8 <= count; i += 8) {
                for (int j = 0; j < 8; ++j) lanes[j] += static_cast<double>(kl[i + j]);
              }
              for (; i < count; ++i) lanes[0] += static_cast<double>(kl[i]);
              for (const double here : lanes) total += here;
            }
            sums[part] = temperature * temperature * total;
          }
        });
        double total = 0;
        for (const double part : sums) total += part;
        if (reduction != none) *data<A>(loss) = static_cast<A>(total / divisor);
        *data<A>(scale) = static_cast<A>(1 / divisor);
      }
    });
  });
  return {loss, saved, scale};
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("pixelwise_kl", TORCH_BOX(&segfast::pixelwise_kl_cpu)); }
#endif
