#define SEGFAST_FILE "upsample_pixelwise_kl.cpp"
#include "each_isa.h"
#include "upsample.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// One output row of a strip; student and teacher lie between rows of their own. As block_kl of pixelwise_kl.cpp: with
// e = exp(x - max), Z = sum e and D = sum e_t ((t - max t) - (s - max s)),  KL = D / Z_t + log(Z_s / Z_t), and the gradient is
// e_s / Z_s - e_t / Z_t, times the factor. Pixels that do not count give 0 whatever they hold. `kept` has room for two vectors a
// class.
template <class A, bool FINITE>
SEGFAST_INLINE void kl_of(const A* s_a, const A* s_b, A s_h0, A s_h1, const A* t_a, const A* t_b, A t_h0, A t_h1, int64_t classes,
                          int64_t strip, const A* counts, const A* factor, A* kept, A* grad_a, A* grad_b, A* kl) {
  constexpr int L = lanes<A>;
  const Vec<A> s_down = splat(s_h0), s_up = splat(s_h1), t_down = splat(t_h0), t_up = splat(t_h1);
  for (int64_t x = 0; x < strip; x += L) {
    Vec<A> max_s{}, max_t{};
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * strip + x;
      const Vec<A> s = between<A, FINITE>(load(s_a + at), load(s_b + at), s_down, s_up);
      const Vec<A> t = between<A, FINITE>(load(t_a + at), load(t_b + at), t_down, t_up);
      max_s = c == 0 ? s : (s > max_s ? s : max_s);
      max_t = c == 0 ? t : (t > max_t ? t : max_t);
      store(kept + 2 * c * L, s);
      store(kept + (2 * c + 1) * L, t);
    }
    Vec<A> sum_s{}, sum_t{}, difference{};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<A> s = load(kept + 2 * c * L) - max_s, t = load(kept + (2 * c + 1) * L) - max_t;
      const Vec<A> exp_s = exp<true>(s), exp_t = exp<true>(t);
      sum_s += exp_s;
      sum_t += exp_t;
      difference += exp_t * (t - s);
      store(kept + 2 * c * L, exp_s);
      store(kept + (2 * c + 1) * L, exp_t);
    }
    const Vec<A> keep = load(counts + x);
    const Vec<A> value = difference / sum_t + log(sum_s / sum_t);
    store(kl + x, keep == Vec<A>{} ? Vec<A>{} : value);
    if (grad_a == nullptr) continue;
    const Vec<A> inverse_s = load(factor + x) / sum_s, inverse_t = load(factor + x) / sum_t;
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = c * strip + x;
      Vec<A> g = load(kept + 2 * c * L) * inverse_s - load(kept + (2 * c + 1) * L) * inverse_t;
      g = keep == Vec<A>{} ? Vec<A>{} : g;
      store(grad_a + at, load(grad_a + at) + g * s_down);
      store(grad_b + at, load(grad_b + at) + g * s_up);
    }
  }
}

template <class A>
void kl_row(const A* s_a, const A* s_b, A s_h0, A s_h1, const A* t_a, const A* t_b, A t_h0, A t_h1, bool finite, int64_t classes,
            int64_t strip, const A* counts, const A* factor, A* kept, A* grad_a, A* grad_b, A* kl) {
  if (finite) {
    kl_of<A, true>(s_a, s_b, s_h0, s_h1, t_a, t_b, t_h0, t_h1, classes, strip, counts, factor, kept, grad_a, grad_b, kl);
  } else {
    kl_of<A, false>(s_a, s_b, s_h0, s_h1, t_a, t_b, t_h0, t_h1, classes, strip, counts, factor, kept, grad_a, grad_b, kl);
  }
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("upsample_pixelwise_kl");

enum Reduction : int64_t { none, mean, sum, batchmean };
constexpr int64_t kPart = 1 << 16;

int64_t count_valid(const bool* valid, int64_t n) {
  const int64_t parts = (n + kPart - 1) / kPart;
  std::atomic<int64_t> total{0};
  parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    int64_t here = 0;
    for (int64_t i = from * kPart; i < std::min(n, to * kPart); ++i) here += valid[i];
    total += here;
  });
  return total;
}

template <class A>
struct Problem {
  const Source student, teacher;
  std::optional<Tensor> valid;
  const double temperature;
  const int64_t reduction;
  const Axis rows, across, teacher_rows, teacher_across;
  const int64_t width;
  const Columns<A> columns, teacher_columns;
  const Weights<A> weights, teacher_weights;
  const std::vector<Chunk> chunks;
  const int64_t pixels;

  Problem(const Tensor& s, const Tensor& t, const std::optional<Tensor>& mask, const std::vector<int64_t>& size,
          double temperature, bool align_corners, int64_t reduction)
      : student(s),
        teacher(t),
        temperature(temperature),
        reduction(reduction),
        rows(student.height, size[0], align_corners, s.scalar_type()),
        across(student.width, size[1], align_corners, s.scalar_type()),
        teacher_rows(teacher.height, size[0], align_corners, s.scalar_type()),
        teacher_across(teacher.width, size[1], align_corners, s.scalar_type()),
        width(strip_width<A>(student.classes, 6, size[1])),
        columns(across, width),
        teacher_columns(teacher_across, width),
        weights(rows),
        teacher_weights(teacher_rows),
        chunks(chunks_of(rows)),
        pixels(student.images * size[0] * size[1]) {
    if (mask.has_value()) valid = contiguous_as(*mask, false);
  }
  static ScalarType dtype() { return std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float; }
  const bool* keep() const { return valid.has_value() ? data<const bool>(*valid) : nullptr; }

  double divisor() const {
    if (reduction == none || reduction == sum) return 1;
    if (pixels == 0) return std::numeric_limits<double>::quiet_NaN();
    if (reduction == batchmean) return static_cast<double>(student.images);
    return static_cast<double>(keep() == nullptr ? pixels : std::max<int64_t>(count_valid(keep(), pixels), 1));
  }

  // Every pixel: T^2 KL to `loss` where that is not null, and the gradient, times `scale` or grad[pixel], into `gradient` where
  // it is wanted. Returns the sum.
  double run(const A* grad, double scale, const Gradient<A>& gradient, A* loss) const {
    const int64_t count = static_cast<int64_t>(chunks.size()), classes = student.classes;
    std::vector<double> sums(student.images * count);
    parallel_for(0, student.images * count, 1, [&](int64_t from, int64_t to) {
      Scratch<A> scratch(Rows<A>::size(student, columns) + Rows<A>::size(teacher, teacher_columns) +
                         Gradient<A>::Piece::size(student, columns) + 2 * kLanes<A> * classes + 3 * width);
      const A degrees = static_cast<A>(temperature);
      Rows<A> pair(student, columns, degrees, scratch), teacher_pair(teacher, teacher_columns, degrees, scratch);
      typename Gradient<A>::Piece piece(gradient, scratch);
      A* const kept = scratch.take(2 * kLanes<A> * classes);
      A *const counts = scratch.take(width), *const factor = scratch.take(width), *const kl = scratch.take(width);
      for (int64_t task = from; task < to; ++task) {
        const int64_t image = task / count;
        const Chunk& chunk = chunks[task % count];
        double total = 0;
        if (gradient.wanted()) piece.start(image, task % count);
        for (size_t k = 0; k < columns.strips.size(); ++k) {
          const Strip& strip = columns.strips[k];
          pair.start(image, strip);
          teacher_pair.start(image, teacher_columns.strips[k]);
          piece.start_strip(strip);
          for (int64_t row = chunk.begin; row < chunk.end; ++row) {
            pair.want(rows.i0[row], rows.i1[row]);
            teacher_pair.want(teacher_rows.i0[row], teacher_rows.i1[row]);
            if (gradient.wanted()) piece.want(rows.i0[row], rows.i1[row]);
            const int64_t at = (image * rows.out + row) * across.out + strip.begin;
            for (int64_t x = 0; x < width; ++x) {
              counts[x] = x < strip.count && (keep() == nullptr || keep()[at + x]) ? A(1) : A(0);
              factor[x] = static_cast<A>(temperature * (grad == nullptr ? scale : x < strip.count ? grad[at + x] : 0));
            }
            SEGFAST_CALL(kl_row<A>)
            (pair.a(), pair.b(), weights.w0[row], weights.w1[row], teacher_pair.a(), teacher_pair.b(), teacher_weights.w0[row],
             teacher_weights.w1[row], pair.finite() && teacher_pair.finite(), classes, width, counts, factor, kept,
             gradient.wanted() ? piece.a() : nullptr, piece.b(), kl);
            total += SEGFAST_CALL(sum_row<A>)(kl, strip.count);
            for (int64_t x = 0; loss != nullptr && x < strip.count; ++x) {
              loss[at + x] = static_cast<A>(temperature * temperature * static_cast<double>(kl[x]));
            }
          }
          piece.finish_strip();
        }
        sums[task] = total;
      }
    });
    double total = 0;
    for (const double part : sums) total += part;
    return temperature * temperature * total;
  }
};

template <class A>
std::tuple<Tensor, Tensor> forward(const Problem<A>& problem, bool gradient) {
  const Source& student = problem.student;
  const bool each = problem.reduction == none;
  const double divisor = problem.divisor();
  const Gradient<A> sums(student, problem.columns, problem.chunks, gradient && !each);
  const Tensor loss = each ? empty({student.images, problem.rows.out, problem.across.out}, problem.dtype(), student.x)
                           : empty({}, problem.dtype(), student.x);
  const double total = problem.run(nullptr, 1 / divisor, sums, each ? data<A>(loss) : nullptr);
  if (!each) *data<A>(loss) = static_cast<A>(total / divisor);
  return {loss, sums.wanted() ? sums.finish(problem.dtype()) : empty({0}, problem.dtype(), student.x)};
}

template <class A>
Tensor backward(const Problem<A>& problem, const Tensor& grad) {
  const Tensor each = contiguous_as(grad, false);
  const Gradient<A> sums(problem.student, problem.columns, problem.chunks, true);
  problem.run(data<const A>(each), 0, sums, nullptr);
  return sums.finish(problem.student.x.scalar_type());
}

std::tuple<Tensor, Tensor> upsample_pixelwise_kl_cpu(const Tensor& student, const Tensor& teacher, std::optional<Tensor> valid,
                                                     std::vector<int64_t> size, double temperature, bool align_corners,
                                                     int64_t reduction, bool gradient) {
  counter.add();
  if (student.scalar_type() == ScalarType::Double) {
    return forward(Problem<double>(student, teacher, valid, size, temperature, align_corners, reduction), gradient);
  }
  return forward(Problem<float>(student, teacher, valid, size, temperature, align_corners, reduction), gradient);
}

Tensor upsample_pixelwise_kl_backward_cpu(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                          std::optional<Tensor> valid, std::vector<int64_t> size, double temperature,
                                          bool align_corners, int64_t reduction) {
  counter.add();
  if (student.scalar_type() == ScalarType::Double) {
    return backward(Problem<double>(student, teacher, valid, size, temperature, align_corners, reduction), grad);
  }
  return backward(Problem<float>(student, teacher, valid, size, temperature, align_corners, reduction), grad);
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("upsample_pixelwise_kl", TORCH_BOX(&segfast::upsample_pixelwise_kl_cpu));
  m.impl("upsample_pixelwise_kl_backward", TORCH_BOX(&segfast::upsample_pixelwise_kl_backward_cpu));
}
#endif
