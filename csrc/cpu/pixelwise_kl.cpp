#define SEGFAST_FILE "pixelwise_kl.cpp"
#include "each_isa.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// Logits of `count` pixels over the temperature, class-major: out[c][block]. Lanes past `count` hold finite rubbish.
template <class T, class A>
void gather_logits(const T* x, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count, int64_t block,
                   A temperature, bool multiply, A* out) {
  if (pixel_stride == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t p = 0; p < count; p += lanes<A>) {
        const int64_t left = count - p;
        prefetch(x + c * class_stride + p + block);
        const Vec<A> v = load_n(x + c * class_stride + p, left < lanes<A> ? static_cast<int>(left) : lanes<A>);
        store(out + c * block + p, multiply ? v * temperature : v / temperature);
      }
    }
    return;
  }
  for (int64_t p = 0; p < (count + lanes<A> - 1) / lanes<A> * lanes<A>; ++p) {
    const T* from = x + (p < count ? p : 0) * pixel_stride;
    for (int64_t c = 0; c < classes; ++c) {
      const A v = static_cast<A>(widen(from[c * class_stride]));
      out[c * block + p] = multiply ? v * temperature : v / temperature;
    }
  }
}

// With e = exp(x - max), Z = sum e and D = sum e_t ((t - max t) - (s - max s)):  KL = D / Z_t + log(Z_s / Z_t), and the
// gradient is e_s / Z_s - e_t / Z_t, left in `s`, times `scale`. Invalid pixels give 0 whatever they hold.
template <class A>
void block_kl(A* s, A* t, int64_t classes, int64_t count, int64_t block, const bool* valid, bool gradient, A scale, A* kl) {
  for (int64_t p = 0; p < count; p += lanes<A>) {
    Vec<A> max_s = load(s + p), max_t = load(t + p);
    for (int64_t c = 1; c < classes; ++c) {
      const Vec<A> a = load(s + c * block + p), b = load(t + c * block + p);
      max_s = a > max_s ? a : max_s;
      max_t = b > max_t ? b : max_t;
    }
    Vec<A> sum_s{}, sum_t{}, difference{};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<A> a = load(s + c * block + p) - max_s, b = load(t + c * block + p) - max_t;
      const Vec<A> exp_s = exp(a), exp_t = exp(b);
      sum_s += exp_s;
      sum_t += exp_t;
      difference += exp_t * (b - a);
      if (gradient) {
        store(s + c * block + p, exp_s);
        store(t + c * block + p, exp_t);
      }
    }
    Vec<A> keep = splat<A>(1);
    if (valid != nullptr) {
      for (int i = 0; i < lanes<A>; ++i) lane<A>(keep, i) = p + i < count && valid[p + i] ? 1 : 0;
    }
    const Vec<A> value = difference / sum_t + log(sum_s / sum_t);
    store(kl + p, keep == Vec<A>{} ? Vec<A>{} : value);
    if (!gradient) continue;
    const Vec<A> inverse_s = scale / sum_s, inverse_t = scale / sum_t;
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<A> g = load(s + c * block + p) * inverse_s - load(t + c * block + p) * inverse_t;
      store(s + c * block + p, keep == Vec<A>{} ? Vec<A>{} : g);
    }
  }
}

template <class T, class A>
void scatter_gradient(const A* g, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count, int64_t block,
                      T* out) {
  if (pixel_stride == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t p = 0; p < count; p += lanes<A>) {
        const int64_t left = count - p;
        store_n(out + c * class_stride + p, load(g + c * block + p), left < lanes<A> ? static_cast<int>(left) : lanes<A>);
      }
    }
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t c = 0; c < classes; ++c) out[p * pixel_stride + c * class_stride] = narrow_to<T>(g[c * block + p]);
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
        const int64_t block = s.channels_last || s.classes > 512 ? 16 : s.classes > 256 ? 64 : 128;
        parallel_for(0, s.images * parts, 1, [&](int64_t from, int64_t to) {
          std::vector<A> buffer((2 * s.classes + 1) * block + 64 / sizeof(A));
          A* const a = aligned(buffer);
          A* const b = a + s.classes * block;
          A* const kl = b + s.classes * block;
          for (int64_t part = from; part < to; ++part) {
            const int64_t image = part / parts, begin = part % parts * kPart, end = std::min(begin + kPart, s.pixels);
            double total = 0;
            for (int64_t p = begin; p < end; p += block) {
              const int64_t count = std::min(block, end - p), pixel = image * s.pixels + p;
              SEGFAST_CALL(gather_logits<S, A>)
              (data<const S>(s.x) + s.offset(image, p), s.class_stride, s.pixel_stride, s.classes, count, block,
               exact ? inverse : static_cast<A>(temperature), exact, a);
              SEGFAST_CALL(gather_logits<T, A>)
              (data<const T>(t.x) + t.offset(image, p), t.class_stride, t.pixel_stride, t.classes, count, block,
               exact ? inverse : static_cast<A>(temperature), exact, b);
              SEGFAST_CALL(block_kl<A>)
              (a, b, s.classes, count, block, keep == nullptr ? nullptr : keep + pixel, gradient, static_cast<A>(factor), kl);
              if (gradient) {
                SEGFAST_CALL(scatter_gradient<S, A>)
                (a, s.class_stride, s.pixel_stride, s.classes, count, block, data<S>(saved) + s.offset(image, p));
              }
              for (int64_t i = 0; i < count; ++i) {
                const double value = temperature * temperature * static_cast<double>(kl[i]);
                if (reduction == none) {
                  data<A>(loss)[pixel + i] = static_cast<A>(value);
                } else {
                  total += value;
                }
              }
            }
            sums[part] = total;
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
