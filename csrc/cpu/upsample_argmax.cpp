#define SEGFAST_FILE "upsample_argmax.cpp"
#include "each_isa.h"
#include "max_class.h"
#include "upsample.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// R output rows between the same two source rows: each pair of loads serves R comparisons, whose state stays in registers. The
// class is carried as a number of the compute type, so that one blend serves both.
template <class A, int R, bool FINITE>
SEGFAST_INLINE void argmax_of(const A* a, const A* b, const A* h0, const A* h1, int64_t classes, int64_t strip, A* index,
                              A* probability) {
  for (int64_t x = 0; x < strip; x += lanes<A>) {
    Vec<A> best[R], at[R], up[R], down[R];
    const Vec<A> first = load(a + x), second = load(b + x);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      down[r] = splat(h0[r]);
      up[r] = splat(h1[r]);
      best[r] = between<A, FINITE>(first, second, down[r], up[r]);
      at[r] = Vec<A>{};
    }
    Vec<A> number = splat<A>(1);
    for (int64_t c = 1; c < classes; ++c) {
      const Vec<A> v = load(a + c * strip + x), w = load(b + c * strip + x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<A> value = between<A, FINITE>(v, w, down[r], up[r]);
        const Mask<A> better = FINITE ? value > best[r] : is_better<A>(value, best[r]);
        best[r] = better ? value : best[r];
        at[r] = better ? number : at[r];
      }
      number += splat<A>(1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(index + r * strip + x, at[r]);
    if (probability == nullptr) continue;
    Vec<A> sum[R] = {};
    for (int64_t c = 0; c < classes; ++c) {
      const Vec<A> v = load(a + c * strip + x), w = load(b + c * strip + x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] += exp<true>(between<A, FINITE>(v, w, down[r], up[r]) - best[r]);
    }
    for (int r = 0; r < R; ++r) store(probability + r * strip + x, splat<A>(1) / sum[r]);
  }
}

template <class A>
void argmax_rows(const A* a, const A* b, const A* h0, const A* h1, int64_t rows, bool finite, int64_t classes, int64_t strip,
                 A* index, A* probability) {
  constexpr int R = lanes<float> == 16 ? 8 : 4;
  int64_t r = 0;
  const auto next = [&] { return probability == nullptr ? nullptr : probability + r * strip; };
  if (!finite) {
    for (; r < rows; ++r) argmax_of<A, 1, false>(a, b, h0 + r, h1 + r, classes, strip, index + r * strip, next());
    return;
  }
  for (; r + R <= rows; r += R) argmax_of<A, R, true>(a, b, h0 + r, h1 + r, classes, strip, index + r * strip, next());
  for (; r + 2 <= rows; r += 2) argmax_of<A, 2, true>(a, b, h0 + r, h1 + r, classes, strip, index + r * strip, next());
  for (; r < rows; ++r) argmax_of<A, 1, true>(a, b, h0 + r, h1 + r, classes, strip, index + r * strip, next());
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("upsample_argmax");
constexpr int64_t kRows = 16;  // output rows whose results wait to be stored

template <class A>
void upsample_argmax(const Source& source, const Axis& rows, const Axis& across, const Tensor& classes, int64_t bytes,
                     A* probability) {
  const Columns<A> columns(across, strip_width<A>(source.classes, 2, across.out));
  const Weights<A> weights(rows);
  const std::vector<Chunk> chunks = chunks_of(rows);
  const int64_t count = static_cast<int64_t>(chunks.size()), width = columns.width;
  parallel_for(0, source.images * count, 1, [&](int64_t from, int64_t to) {
    Scratch<A> scratch(Rows<A>::size(source, columns) + 2 * kRows * width);
    Rows<A> pair(source, columns, 1, scratch);
    A* const index = scratch.take(kRows * width);
    A* const best = scratch.take(kRows * width);
    for (int64_t task = from; task < to; ++task) {
      const int64_t image = task / count;
      const Chunk& chunk = chunks[task % count];
      for (const Strip& strip : columns.strips) {
        pair.start(image, strip);
        for (int64_t row = chunk.begin, run; row < chunk.end; row += run) {
          run = std::min(run_of(rows, row, chunk.end), kRows);
          pair.want(rows.i0[row], rows.i1[row]);
          SEGFAST_CALL(argmax_rows<A>)
          (pair.a(), pair.b(), weights.w0.data() + row, weights.w1.data() + row, run, pair.finite(), source.classes, width, index,
           probability == nullptr ? nullptr : best);
          for (int64_t r = 0; r < run; ++r) {
            const int64_t at = (image * rows.out + row + r) * across.out + strip.begin;
            const A* const line = index + r * width;
            SEGFAST_CALL(store_classes<A>)(line, strip.count, bytes, classes.data_ptr(), at);
            if (probability != nullptr) std::copy(best + r * width, best + r * width + strip.count, probability + at);
          }
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> upsample_argmax_cpu(const Tensor& logits, std::vector<int64_t> size, bool align_corners, int64_t bytes,
                                               bool probability) {
  counter.add();
  const Source source(logits);
  const Axis rows(source.height, size[0], align_corners, logits.scalar_type());
  const Axis across(source.width, size[1], align_corners, logits.scalar_type());
  const bool wide = source.x.scalar_type() == ScalarType::Double;
  const ScalarType floating = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor classes = empty({source.images, size[0], size[1]}, integer_of("upsample_argmax", bytes), source.x);
  const Tensor best = probability ? empty({source.images, size[0], size[1]}, floating, source.x) : empty({0}, floating, source.x);
  if (wide) {
    upsample_argmax<double>(source, rows, across, classes, bytes, probability ? data<double>(best) : nullptr);
  } else {
    upsample_argmax<float>(source, rows, across, classes, bytes, probability ? data<float>(best) : nullptr);
  }
  return {classes, best};
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("upsample_argmax", TORCH_BOX(&segfast::upsample_argmax_cpu)); }
#endif
