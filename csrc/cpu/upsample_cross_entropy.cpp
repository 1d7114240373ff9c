#define SEGFAST_FILE "upsample_cross_entropy.cpp"
#ifndef SEGFAST_KERNELS
#include <cstdint>

namespace segfast {

// Rows of a strip's pixels, one after the other.
template <class A>
struct LabelledPixels {
  int32_t* label;  // 0 where there is none
  A* share;        // of the label's logarithm in the loss
  A* counts;       // 1 or 0
  A* factor;       // of the gradient
  A* value;        // the label's logit
  A *loss, *probability;
  LabelledPixels at(int64_t i) const {
    return {label + i, share + i, counts + i, factor + i, value + i, loss + i, probability + i};
  }
};

template <class A>
struct Smoothing {
  const A* weight;  // of each class, times the share that goes to all classes; null without smoothing
  A total;          // their sum
};

}  // namespace segfast
#endif
#include "each_isa.h"
#include "upsample.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// `cut`: with probabilities, a pixel counts that is below `threshold` or not above `cut`.
template <class L, class A>
void label_row(const L* target, int64_t count, int64_t strip, int64_t ignore_index, const A* weight, A share,
               const A* probability, A threshold, A cut, const A* grad, A scale, const A* a, const A* b, A h0, A h1, bool finite,
               const LabelledPixels<A>& to) {
  for (int64_t x = 0; x < count; ++x) {
    const int64_t t = static_cast<int64_t>(target[x]);
    const bool counts = t != ignore_index && (probability == nullptr || probability[x] < threshold || probability[x] <= cut);
    const int32_t label = t != ignore_index ? static_cast<int32_t>(t) : 0;
    to.label[x] = label;
    to.counts[x] = counts ? A(1) : A(0);
    to.share[x] = counts ? (weight == nullptr ? share : share * weight[label]) : A(0);
    to.factor[x] = counts ? (grad == nullptr ? scale : grad[x]) : A(0);
  }
  for (int64_t x = count; x < strip; ++x) {
    to.label[x] = 0;
    to.counts[x] = to.share[x] = to.factor[x] = 0;
  }
  for (int64_t x = 0; x < strip; ++x) {
    const A v = a[to.label[x] * strip + x], w = b[to.label[x] * strip + x];
    to.value[x] = finite ? v + h1 * (w - v) : v * h0 + w * h1;
  }
}

// Loss, label's probability and gradient of R rows between the same two source rows. With m the maximum and Z = sum exp(x - m):
// -log p_c = (m - x_c) + log Z, and the gradient is (share + total) p - share 1[c = label] - weight, times the factor. The
// label's exponential loses its part of Z before anything is summed: 1 - p would otherwise have the rounding of sums of 1 and of
// p.
template <class A, int R, bool FINITE, bool SMOOTH>
SEGFAST_INLINE void cross_entropy_of(const A* a, const A* b, const A* h0, const A* h1, int64_t classes, int64_t strip,
                                     const LabelledPixels<A>& pixels, const Smoothing<A>& smoothing, bool probability, A* kept,
                                     A* grad_a, A* grad_b) {
  constexpr int L = lanes<A>;
  for (int64_t x = 0; x < strip; x += L) {
    Vec<A> most[R], up[R], down[R], sum[R] = {}, spread[R] = {};
    const Vec<A> first = load(a + x), second = load(b + x);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      down[r] = splat(h0[r]);
      up[r] = splat(h1[r]);
      most[r] = between<A, FINITE>(first, second, down[r], up[r]);
    }
    for (int64_t c = 1; c < classes; ++c) {
      const Vec<A> v = load(a + c * strip + x), w = load(b + c * strip + x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> value = between<A, FINITE>(v, w, down[r], up[r]);
        most[r] = value > most[r] ? value : most[r];
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<A> v = load(a + c * strip + x), w = load(b + c * strip + x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> below = between<A, FINITE>(v, w, down[r], up[r]) - most[r];
        if constexpr (SMOOTH) spread[r] += below * smoothing.weight[c];
        const Vec<A> e = exp<true>(below);
        sum[r] += e;
        if (grad_a != nullptr) store(kept + (c * R + r) * L, e);
      }
    }
    Vec<A> to_a[R] = {}, to_b[R] = {}, all_a{}, all_b{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * strip + x;
      const Vec<A> logarithm = log(sum[r]), share = load(pixels.share + at), counts = load(pixels.counts + at);
      const Vec<A> below = most[r] - load(pixels.value + at);
      Vec<A> value = share * (below + logarithm);
      if constexpr (SMOOTH) value += logarithm * smoothing.total - spread[r];
      store(pixels.loss + at, counts == Vec<A>{} ? Vec<A>{} : value);
      if (probability) store(pixels.probability + at, exp(-below) / sum[r]);
      if (grad_a == nullptr) continue;
      const Vec<A> factor = load(pixels.factor + at);
      Vec<A> all = share, own = sum[r];
      if constexpr (SMOOTH) {  // weights may cancel, or be 0
        all += smoothing.total;
        all = all == Vec<A>{} ? share * static_cast<A>(0x1p-60) : all;
        own = all == Vec<A>{} ? Vec<A>{} : sum[r] * share / all;
      }
      const Vec<A> scale = factor * all / sum[r];
      for (int i = 0; i < L; ++i) kept[(pixels.label[at + i] * R + r) * L + i] -= lane<A>(own, i);
      to_a[r] = scale * down[r];
      to_b[r] = scale * up[r];
      if constexpr (SMOOTH) {
        all_a += factor * down[r];
        all_b += factor * up[r];
      }
    }
    if (grad_a == nullptr) continue;
    for (int64_t c = 0; c < classes; ++c) {
      Vec<A> sum_a = load(grad_a + c * strip + x), sum_b = load(grad_b + c * strip + x);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<A> e = load(kept + (c * R + r) * L);
        sum_a += e * to_a[r];
        sum_b += e * to_b[r];
      }
      if constexpr (SMOOTH) {
        sum_a -= all_a * smoothing.weight[c];
        sum_b -= all_b * smoothing.weight[c];
      }
      store(grad_a + c * strip + x, sum_a);
      store(grad_b + c * strip + x, sum_b);
    }
  }
}

constexpr int kTogether = lanes<float> == 4 ? 2 : 4;

template <class A>
void cross_entropy_rows(const A* a, const A* b, const A* h0, const A* h1, int64_t rows, bool finite, int64_t classes,
                        int64_t strip, const LabelledPixels<A>& pixels, const Smoothing<A>& smoothing, bool probability, A* kept,
                        A* grad_a, A* grad_b) {
  constexpr int R = kTogether;
  constexpr std::integral_constant<int, R> many{};
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::true_type yes{};
  constexpr std::false_type no{};
  for (int64_t r = 0, step; r < rows; r += step) {
    const bool together = finite && rows - r >= R, smooth = smoothing.weight != nullptr;
    step = together ? R : 1;
    const auto run = [&](auto number, auto short_form, auto smoothed) {
      cross_entropy_of<A, decltype(number)::value, decltype(short_form)::value, decltype(smoothed)::value>(
          a, b, h0 + r, h1 + r, classes, strip, pixels.at(r * strip), smoothing, probability, kept, grad_a, grad_b);
    };
    if (together) {
      smooth ? run(many, yes, yes) : run(many, yes, no);
    } else if (finite) {
      smooth ? run(one, yes, yes) : run(one, yes, no);
    } else {
      smooth ? run(one, no, yes) : run(one, no, no);
    }
  }
}

// Labels that are neither a class nor ignored: the position of the first, or `count`.
template <class L>
int64_t first_wrong(const L* target, int64_t count, int64_t ignore_index, int64_t classes) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = static_cast<int64_t>(target[i]);
    wrong += (t != ignore_index) & ((t < 0) | (t >= classes));
  }
  if (wrong == 0) return count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = static_cast<int64_t>(target[i]);
    if (t != ignore_index && (t < 0 || t >= classes)) return i;
  }
  return count;
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("upsample_cross_entropy");
constexpr int64_t kPart = 1 << 12;  // pixels that are looked at in one go, whatever the number of threads
constexpr int64_t kRows = 16;       // output rows in one go

enum Reduction : int64_t { none, mean, sum };

struct Options {
  int64_t ignore_index;
  double smoothing, threshold;
  int64_t min_kept;
  bool align_corners;
  int64_t reduction;
};

// f(pointer) for the target's dtype.
template <class F>
void dispatch_label(const Tensor& target, F&& f) {
  if (target.scalar_type() == ScalarType::Byte) return f(data<const uint8_t>(target));
  if (target.scalar_type() == ScalarType::Int) return f(data<const int32_t>(target));
  f(data<const int64_t>(target));
}

template <class A>
struct Problem {
  const Source source;
  const Tensor target;
  std::optional<Tensor> class_weight;
  const Options& options;
  const Axis rows, across;
  const Columns<A> columns;
  const Weights<A> weights;
  const std::vector<Chunk> chunks;
  const int64_t pixels;
  std::vector<A> smooth;  // of each class
  A smooth_total = 0;

  Problem(const Tensor& logits, const Tensor& target_, const std::optional<Tensor>& weight, const Options& options)
      : source(logits),
        target(contiguous_as(target_, false)),
        options(options),
        rows(source.height, target.size(1), options.align_corners, logits.scalar_type()),
        across(source.width, target.size(2), options.align_corners, logits.scalar_type()),
        columns(across, strip_width<A>(source.classes, 4, across.out)),
        weights(rows),
        chunks(chunks_of(rows)),
        pixels(target.numel()) {
    if (weight.has_value()) class_weight = contiguous_as(*weight, false);
    if (smoothed() > 0) {
      double total = 0;
      for (int64_t c = 0; c < source.classes; ++c) {
        const double each = class_weights() == nullptr ? 1.0 : static_cast<double>(class_weights()[c]);
        smooth.push_back(static_cast<A>(each * smoothed() / static_cast<double>(source.classes)));
        total += static_cast<double>(smooth.back());
      }
      smooth_total = static_cast<A>(total);
    }
  }
  const A* class_weights() const { return class_weight.has_value() ? data<const A>(*class_weight) : nullptr; }

  double smoothed() const { return source.classes == 1 ? 0 : options.smoothing; }  // between classes

  void check_labels() const {
    const int64_t parts = (pixels + kPart - 1) / kPart;
    std::vector<int64_t> wrong(parts, pixels);
    dispatch_label(target, [&](auto* labels) {
      using L = std::remove_const_t<std::remove_pointer_t<decltype(labels)> >;
      parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part) {
          const int64_t begin = part * kPart, count = std::min(kPart, pixels - begin);
          const int64_t at = SEGFAST_CALL(first_wrong<L>)(labels + begin, count, options.ignore_index, source.classes);
          if (at < count) wrong[part] = begin + at;
        }
      });
      const int64_t at = parts == 0 ? pixels : *std::min_element(wrong.begin(), wrong.end());
      if (at < pixels) {
        const int64_t row = at / across.out % rows.out, image = at / across.out / rows.out;
        STD_TORCH_CHECK(false, "upsample_cross_entropy: want labels from 0 to ", source.classes - 1, " or ", options.ignore_index,
                        ", got ", static_cast<int64_t>(labels[at]), " at (n, y, x) = (", image, ", ", row, ", ", at % across.out,
                        ")");
      }
    });
  }

  // As in label_row.
  bool counts(const A* probability, A cut, int64_t i) const {
    return probability == nullptr || probability[i] < static_cast<A>(options.threshold) || probability[i] <= cut;
  }

  // What a mean is divided by: the weights of the pixels that count; 1 where there are none.
  double divisor(const A* probability, A cut) const {
    const int64_t parts = (pixels + kPart - 1) / kPart;
    std::vector<double> sums(parts);
    std::vector<int64_t> numbers(parts);
    const A* const weight = class_weights();
    dispatch_label(target, [&](auto* labels) {
      parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part) {
          double totals[8] = {};  // a plain sum of so many would be off by more than the loss's own rounding
          int64_t number = 0;
          for (int64_t i = part * kPart; i < std::min(pixels, (part + 1) * kPart); ++i) {
            const int64_t label = static_cast<int64_t>(labels[i]);
            if (label == options.ignore_index || !counts(probability, cut, i)) continue;
            ++number;
            if (weight != nullptr) totals[i % 8] += static_cast<double>(weight[label]);
          }
          double total = 0;
          for (const double each : totals) total += each;
          sums[part] = weight != nullptr ? total : static_cast<double>(number);
          numbers[part] = number;
        }
      });
    });
    double total = 0;
    int64_t number = 0;
    for (int64_t part = 0; part < parts; ++part) {
      total += sums[part];
      number += numbers[part];
    }
    return number == 0 ? 1 : total;
  }

  // The label's probability below which (or at which) the hardest min_kept pixels lie; -1 where the threshold has enough.
  A cut_of(const A* probability) const {
    if (options.min_kept == 0) return -1;
    std::vector<A> valid;
    int64_t hard = 0;
    dispatch_label(target, [&](auto* labels) {
      for (int64_t i = 0; i < pixels; ++i) {
        if (static_cast<int64_t>(labels[i]) != options.ignore_index) {
          hard += probability[i] < static_cast<A>(options.threshold);
        }
      }
      if (hard >= options.min_kept) return;
      for (int64_t i = 0; i < pixels; ++i) {
        if (static_cast<int64_t>(labels[i]) != options.ignore_index) valid.push_back(probability[i]);
      }
    });
    if (hard >= options.min_kept || valid.empty()) return -1;
    const auto last = valid.begin() + (std::min<int64_t>(options.min_kept, static_cast<int64_t>(valid.size())) - 1);
    std::nth_element(valid.begin(), last, valid.end());
    return *last;
  }

  // Every pixel: losses and probabilities to where that is not null, the gradient, times `scale` or grad[pixel], into `gradient`
  // where it is wanted. Returns the sum of the losses.
  double run(const A* probability, A cut, const A* grad, A scale, const Gradient<A>& gradient, A* loss_out,
             A* probability_out) const {
    const int64_t count = static_cast<int64_t>(chunks.size()), width = columns.width, classes = source.classes;
    const Smoothing<A> smoothing{smooth.empty() ? nullptr : smooth.data(), smooth_total};
    std::vector<double> sums(source.images * count);
    parallel_for(0, source.images * count, 1, [&](int64_t from, int64_t to) {
      Scratch<A> scratch(Rows<A>::size(source, columns) + Gradient<A>::Piece::size(source, columns) + 6 * kRows * width +
                         4 * kLanes<A> * classes);
      Rows<A> pair(source, columns, 1, scratch);
      typename Gradient<A>::Piece piece(gradient, scratch);
      A* const kept = scratch.take(4 * kLanes<A> * classes);
      std::vector<int32_t> labels(kRows * width);
      const auto line = [&] { return scratch.take(kRows * width); };
      const LabelledPixels<A> all{labels.data(), line(), line(), line(), line(), line(), line()};
      for (int64_t task = from; task < to; ++task) {
        const int64_t image = task / count;
        const Chunk& chunk = chunks[task % count];
        double total = 0;
        if (gradient.wanted()) piece.start(image, task % count);
        for (const Strip& strip : columns.strips) {
          pair.start(image, strip);
          piece.start_strip(strip);
          for (int64_t row = chunk.begin, run; row < chunk.end; row += run) {
            run = std::min(run_of(rows, row, chunk.end), kRows);
            pair.want(rows.i0[row], rows.i1[row]);
            if (gradient.wanted()) piece.want(rows.i0[row], rows.i1[row]);
            const A *const h0 = weights.w0.data() + row, *const h1 = weights.w1.data() + row;
            const int64_t first = (image * rows.out + row) * across.out + strip.begin;
            for (int64_t r = 0; r < run; ++r) {
              const int64_t at = first + r * across.out;
              dispatch_label(target, [&](auto* label) {
                using L = std::remove_const_t<std::remove_pointer_t<decltype(label)> >;
                SEGFAST_CALL(label_row<L, A>)
                (label + at, strip.count, width, options.ignore_index, class_weights(), static_cast<A>(1 - smoothed()),
                 probability == nullptr ? nullptr : probability + at, static_cast<A>(options.threshold), cut,
                 grad == nullptr ? nullptr : grad + at, scale, pair.a(), pair.b(), h0[r], h1[r], pair.finite(),
                 all.at(r * width));
              });
            }
            SEGFAST_CALL(cross_entropy_rows<A>)
            (pair.a(), pair.b(), h0, h1, run, pair.finite(), classes, width, all, smoothing, probability_out != nullptr, kept,
             gradient.wanted() ? piece.a() : nullptr, piece.b());
            for (int64_t r = 0; r < run; ++r) {
              const int64_t at = first + r * across.out;
              const LabelledPixels<A> line = all.at(r * width);
              if (loss_out != nullptr) std::copy(line.loss, line.loss + strip.count, loss_out + at);
              total += SEGFAST_CALL(sum_row<A>)(line.loss, strip.count);
              for (int64_t x = 0; probability_out != nullptr && x < strip.count; ++x) {  // what is not a number is hard
                probability_out[at + x] = line.probability[x] == line.probability[x] ? line.probability[x] : A(0);
              }
            }
          }
          piece.finish_strip();
        }
        sums[task] = total;
      }
    });
    double total = 0;
    for (const double part : sums) total += part;
    return total;
  }

  // Each pixel's probability of its label, where only hard pixels count; else nothing.
  std::optional<Tensor> probabilities() const {
    if (options.threshold <= 0) return std::nullopt;
    const Tensor out = empty({pixels}, dtype(), source.x);
    run(nullptr, -1, nullptr, 0, Gradient<A>(source, columns, chunks, false), nullptr, data<A>(out));
    return out;
  }
  static ScalarType dtype() { return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float; }
};

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const Problem<A>& problem, bool gradient) {
  const Options& options = problem.options;
  const Source& source = problem.source;
  const ScalarType dtype = problem.dtype();
  problem.check_labels();
  const std::optional<Tensor> probability = problem.probabilities();
  const A* const p = probability.has_value() ? data<const A>(*probability) : nullptr;
  const A cut = p == nullptr ? A(-1) : problem.cut_of(p);
  const double divisor = options.reduction == mean ? problem.divisor(p, cut) : 1;
  const Gradient<A> sums(source, problem.columns, problem.chunks, gradient && options.reduction != none);
  const Tensor loss = options.reduction == none ? empty({source.images, problem.rows.out, problem.across.out}, dtype, source.x)
                                                : empty({}, dtype, source.x);
  A* const each = options.reduction == none ? data<A>(loss) : nullptr;
  const double total = problem.run(p, cut, nullptr, static_cast<A>(1 / divisor), sums, each, nullptr);
  if (options.reduction != none) *data<A>(loss) = static_cast<A>(total / divisor);
  const Tensor saved = sums.wanted() ? sums.finish(dtype) : empty({0}, dtype, source.x);
  const Tensor kept = empty({}, dtype, source.x);
  *data<A>(kept) = cut;
  return {loss, saved, kept};
}

template <class A>
Tensor backward(const Problem<A>& problem, const Tensor& grad, const Tensor& cut) {
  const Tensor each = contiguous_as(grad, false);
  const std::optional<Tensor> probability = problem.probabilities();
  const Gradient<A> sums(problem.source, problem.columns, problem.chunks, true);
  problem.run(probability.has_value() ? data<const A>(*probability) : nullptr, *data<const A>(cut), data<const A>(each), 0, sums,
              nullptr, nullptr);
  return sums.finish(problem.source.x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_cpu(const Tensor& logits, const Tensor& target,
                                                              std::optional<Tensor> weight, int64_t ignore_index,
                                                              double label_smoothing, double ohem_threshold,
                                                              int64_t ohem_min_kept, bool align_corners, int64_t reduction,
                                                              bool gradient) {
  counter.add();
  const Options options{ignore_index, label_smoothing, ohem_threshold, ohem_min_kept, align_corners, reduction};
  if (logits.scalar_type() == ScalarType::Double) return forward(Problem<double>(logits, target, weight, options), gradient);
  return forward(Problem<float>(logits, target, weight, options), gradient);
}

Tensor upsample_cross_entropy_backward_cpu(const Tensor& grad, const Tensor& logits, const Tensor& target,
                                           std::optional<Tensor> weight, const Tensor& cut, int64_t ignore_index,
                                           double label_smoothing, double ohem_threshold, int64_t ohem_min_kept,
                                           bool align_corners, int64_t reduction) {
  counter.add();
  const Options options{ignore_index, label_smoothing, ohem_threshold, ohem_min_kept, align_corners, reduction};
  if (logits.scalar_type() == ScalarType::Double) return backward(Problem<double>(logits, target, weight, options), grad, cut);
  return backward(Problem<float>(logits, target, weight, options), grad, cut);
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&segfast::upsample_cross_entropy_cpu));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&segfast::upsample_cross_entropy_backward_cpu));
}
#endif
