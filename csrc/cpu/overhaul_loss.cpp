#define SEGFAST_FILE "overhaul_loss.cpp"
#include "each_isa.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// S - T, or 0 where S <= T <= 0 or the mask says so. A NaN stays one.
template <class A>
SEGFAST_INLINE Vec<A> partial_difference(Vec<A> s, Vec<A> t, Vec<A> margin, Vec<A> keep) {
  const Vec<A> zero{};
  // max that hands on a NaN of either side
  t = t > margin ? t : (t == t ? margin : t);
  const Vec<A> difference = t <= zero ? (s <= t ? zero : s - t) : s - t;
  return keep == zero ? zero : difference;
}

// The sum of (S - T)^2 over `count` neighbours in memory, and the difference times `factor`. Margins and mask go along with the
// neighbours (step 1) or are one for all of them (step 0).
template <class S, class T, class A>
A run_loss(const S* s, const T* t, const A* margin, int64_t margin_step, const bool* valid, int64_t valid_step, int64_t count,
           A factor, S* gradient) {
  constexpr int64_t kSums = 4;
  Vec<A> sums[kSums] = {};
  int64_t turn = 0;
  for (int64_t i = 0; i < count; i += lanes<A>, turn = (turn + 1) % kSums) {
    const int n = count - i < lanes<A> ? static_cast<int>(count - i) : lanes<A>;
    Vec<A> keep = splat<A>(1);
    if (valid != nullptr) {
      if (valid_step == 0) {
        keep = splat<A>(*valid ? 1 : 0);
      } else {
        for (int k = 0; k < n; ++k) lane<A>(keep, k) = valid[i + k] ? 1 : 0;
      }
    }
    const Vec<A> m = margin_step == 0 ? splat<A>(*margin) : load_n(margin + i, n);
    Vec<A> difference = partial_difference<A>(load_n(s + i, n), load_n(t + i, n), m, keep);
    if (n < lanes<A>) {  // past the end S and T are 0, a margin for all may be more
      for (int k = n; k < lanes<A>; ++k) lane<A>(difference, k) = 0;
    }
    sums[turn] += difference * difference;
    if (gradient != nullptr) store_n(gradient + i, difference * factor, n);
  }
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>
#include <vector>

namespace segfast {
namespace {

Counter counter("overhaul_loss");

enum Reduction : int64_t { mean, sum, batchmean };
constexpr int64_t kPart = 4096;  // elements whose distances are added in one go, whatever the number of threads

std::tuple<Tensor, Tensor, Tensor> overhaul_loss_cpu(const Tensor& student, const Tensor& teacher, const Tensor& margin,
                                                     std::optional<Tensor> mask, int64_t reduction, bool gradient) {
  counter.add();
  const bool channels_last = is_channels_last(student);
  const Tensor s = contiguous_as(student, channels_last), t = contiguous_as(teacher, channels_last);
  const Tensor valid = mask.has_value() ? torch::stable::contiguous(*mask) : s;
  const bool* const keep = mask.has_value() ? data<const bool>(valid) : nullptr;
  const int64_t images = s.size(0), channels = s.size(1), pixels = s.size(2) * s.size(3), all = images * pixels;
  const bool wide = s.scalar_type() == ScalarType::Double;
  const ScalarType result = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = empty({}, result, s), scale = empty({}, result, s);
  const Tensor saved = gradient ? empty({images, channels, s.size(2), s.size(3)}, s.scalar_type(), s, channels_last)
                                : empty({0}, s.scalar_type(), s);
  double divisor = static_cast<double>(all) * static_cast<double>(channels);
  if (reduction == sum) divisor = 1;
  if (reduction == batchmean) divisor = static_cast<double>(images);
  if (reduction == mean && keep != nullptr && all != 0) {
    const int64_t counted = std::count(keep, keep + all, true);
    divisor = static_cast<double>(std::max<int64_t>(counted, 1)) * static_cast<double>(channels);
  }
  // Half has too few small numbers for a gradient divided by the number of elements: that factor is applied at the end.
  const double factor = s.scalar_type() == ScalarType::Half ? 2 : 2 / divisor;
  // Rows of neighbours that share a margin (planes) or a place in the mask (pixels), cut into parts of whole rows or of a
  // piece of one.
  const int64_t rows = channels_last ? all : images * channels, row = channels_last ? channels : pixels;
  const int64_t together = row == 0 ? 1 : std::max<int64_t>(1, kPart / row), pieces = (row + kPart - 1) / kPart;
  const int64_t groups = (rows + together - 1) / together;
  std::vector<double> sums(groups * pieces);

  dispatch_float("overhaul_loss", s.scalar_type(), [&](auto student_type) {
    dispatch_float("overhaul_loss", t.scalar_type(), [&](auto teacher_type) {
      using S = decltype(student_type);
      using T = decltype(teacher_type);
      using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
      if constexpr (std::is_same_v<S, double> == std::is_same_v<T, double>) {
        const A* const margins = data<const A>(margin);
        parallel_for(0, groups * pieces, 1, [&](int64_t from, int64_t to) {
          for (int64_t part = from; part < to; ++part) {
            const int64_t first = part / pieces * together, last = std::min(rows, first + together);
            const int64_t begin = part % pieces * kPart, count = std::min(kPart, row - begin);
            double total = 0;
            for (int64_t r = first; r < last; ++r) {
              const int64_t at = r * row + begin;
              const bool* const counts = keep == nullptr ? nullptr
                                         : channels_last ? keep + r
                                                         : keep + r / channels * pixels + begin;
              total += static_cast<double>(SEGFAST_CALL(run_loss<S, T, A>)(
                  data<const S>(s) + at, data<const T>(t) + at, margins + (channels_last ? begin : r % channels), channels_last,
                  counts, !channels_last, count, static_cast<A>(factor), gradient ? data<S>(saved) + at : nullptr));
            }
            sums[part] = total;
          }
        });
        double total = 0;
        for (const double part : sums) total += part;
        *data<A>(loss) = static_cast<A>(total / divisor);
        *data<A>(scale) = static_cast<A>(1 / divisor);
      }
    });
  });
  return {loss, saved, scale};
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("overhaul_loss", TORCH_BOX(&segfast::overhaul_loss_cpu)); }
#endif
