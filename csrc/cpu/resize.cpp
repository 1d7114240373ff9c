// Interpolation of whole maps, for inference: bilinear to channels_last, or to N C H W past the caches, as a network's own result
// is; nearest, by whole factors, to channels_last. float32 and bfloat16.
#define SEGFAST_FILE "resize.cpp"
#include "each_isa.h"
#include "upsample.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// `rows` output rows of a strip, `step` apart, between the source rows a and b [class][column]; planes are `plane` apart.
template <class T, bool FINITE>
SEGFAST_INLINE void mix_rows(const float* a, const float* b, const float* h0, const float* h1, int64_t rows, int64_t classes,
                             int64_t width, int64_t count, T* out, int64_t plane, int64_t step) {
  constexpr int L = lanes<float>;
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<float> down = splat(h0[r]), up = splat(h1[r]);
      T* const to = out + c * plane + r * step;
      const bool past = std::is_same_v<T, float> && reinterpret_cast<uintptr_t>(to) % SEGFAST_BYTES == 0;
      int64_t x = 0;
      for (; x + L <= count; x += L) {
        const Vec<float> v = between<float, FINITE>(load(a + c * width + x), load(b + c * width + x), down, up);
        if constexpr (std::is_same_v<T, float>) {
          if (past) {
            stream(to + x, v);
            continue;
          }
        }
        store(to + x, v);
      }
      if (x < count) {
        const Vec<float> v = between<float, FINITE>(load(a + c * width + x), load(b + c * width + x), down, up);
        store_n(to + x, v, static_cast<int>(count - x));
      }
    }
  }
}
template <class T>
void mix(const float* a, const float* b, const float* h0, const float* h1, int64_t rows, bool finite, int64_t classes,
         int64_t width, int64_t count, T* out, int64_t plane, int64_t step) {
  if (finite) return mix_rows<T, true>(a, b, h0, h1, rows, classes, width, count, out, plane, step);
  mix_rows<T, false>(a, b, h0, h1, rows, classes, width, count, out, plane, step);
}
template <class T>
void finish(T*) {
  fence();
}

// One output row [ow][c] between the source rows a and b [w][c], whose mix is formed in `line`.
template <class T>
void resize_row(const T* a, const T* b, float h0, float h1, int64_t w, int64_t c, int64_t ow, const int32_t* i0,
                const int32_t* i1, const float* w0, const float* w1, float* line, T* out) {
  constexpr int L = lanes<float>;
  const Vec<float> down = splat(h0), up = splat(h1);
  for (int64_t i = 0; i < w * c; i += L) {
    const int n = static_cast<int>(w * c - i < L ? w * c - i : L);
    store_n(line + i, load_n(a + i, n) * down + load_n(b + i, n) * up, n);
  }
  for (int64_t x = 0; x < ow; ++x) {
    const float *left = line + i0[x] * c, *right = line + i1[x] * c;
    const Vec<float> from = splat(w0[x]), to = splat(w1[x]);
    T* const pixel = out + x * c;
    int64_t j = 0;
    for (; j + L <= c; j += L) store(pixel + j, load(left + j) * from + load(right + j) * to);
    if (j < c) {
      const int n = static_cast<int>(c - j);
      store_n(pixel + j, load_n(left + j, n) * from + load_n(right + j, n) * to, n);
    }
  }
}

// `times` output rows [w * factor][c], one after the other, of a source row [w][c].
template <class T>
void repeat_row(const T* x, int64_t w, int64_t c, int64_t factor, int64_t times, T* out) {
  for (int64_t t = 0; t < times; ++t) {
    for (int64_t i = 0; i < w; ++i) {
      for (int64_t k = 0; k < factor; ++k, out += c) memcpy(out, x + i * c, c * sizeof(T));
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("resize"), repeat_counter("repeat_pixels");

template <class T>
void to_planes(const Source& source, const Axis& rows, const Axis& across, const Tensor& y) {
  const Columns<float> columns(across, strip_width<float>(source.classes, 2, across.out));
  const Weights<float> weights(rows);
  const std::vector<Chunk> chunks = chunks_of(rows);
  const int64_t count = static_cast<int64_t>(chunks.size()), plane = rows.out * across.out;
  parallel_for(0, source.images * count, 1, [&](int64_t from, int64_t to) {
    Scratch<float> scratch(Rows<float>::size(source, columns));
    Rows<float> pair(source, columns, 1, scratch);
    for (int64_t task = from; task < to; ++task) {
      const int64_t image = task / count;
      const Chunk& chunk = chunks[task % count];
      for (const Strip& strip : columns.strips) {
        pair.start(image, strip);
        for (int64_t row = chunk.begin, run; row < chunk.end; row += run) {
          run = run_of(rows, row, chunk.end);
          pair.want(rows.i0[row], rows.i1[row]);
          T* const out = data<T>(y) + image * source.classes * plane + row * across.out + strip.begin;
          SEGFAST_CALL(mix<T>)
          (pair.a(), pair.b(), weights.w0.data() + row, weights.w1.data() + row, run, pair.finite(), source.classes,
           columns.width, strip.count, out, plane, across.out);
        }
      }
    }
    SEGFAST_CALL(finish<T>)(data<T>(y));
  });
}

template <class T>
void to_pixels(const Source& source, const Axis& rows, const Axis& across, const Tensor& y) {
  const Columns<float> columns(across, across.out);
  const Weights<float> weights(rows);
  const int64_t c = source.classes, line = source.width * c;
  parallel_for(0, source.images * rows.out, 4, [&](int64_t from, int64_t to) {
    Scratch<float> scratch(line);
    float* const mixed = scratch.take(line);
    for (int64_t task = from; task < to; ++task) {
      const int64_t row = task % rows.out;
      const T* const image = data<T>(source.x) + task / rows.out * source.height * line;
      SEGFAST_CALL(resize_row<T>)
      (image + rows.i0[row] * line, image + rows.i1[row] * line, weights.w0[row], weights.w1[row], source.width, c, across.out,
       columns.i0.data(), columns.i1.data(), columns.w0.data(), columns.w1.data(), mixed, data<T>(y) + task * across.out * c);
    }
  });
}

void want_map(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16),
                  "resize: want x (N, C, H, W) in float32 or bfloat16 on the CPU");
}

Tensor resized(const Tensor& x, const std::vector<int64_t>& size, bool align_corners, bool channels_last) {
  const Source source(channels_last ? contiguous_as(x, true) : x);
  const Axis rows(source.height, size[0], align_corners, x.scalar_type());
  const Axis across(source.width, size[1], align_corners, x.scalar_type());
  const Tensor y = empty({source.images, source.classes, size[0], size[1]}, x.scalar_type(), source.x, channels_last);
  if (y.numel() == 0) return y;
  const bool wide = x.scalar_type() == ScalarType::Float;
  if (channels_last) {
    wide ? to_pixels<float>(source, rows, across, y) : to_pixels<BFloat16>(source, rows, across, y);
  } else {
    wide ? to_planes<float>(source, rows, across, y) : to_planes<BFloat16>(source, rows, across, y);
  }
  return y;
}

Tensor resize_cpu(const Tensor& x, std::vector<int64_t> size, bool align_corners, bool channels_last) {
  counter.add();
  want_map(x);
  STD_TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0 && x.size(2) > 0 && x.size(3) > 0,
                  "resize: want sizes of 1 and more, from and to");
  // Of a planar map and its smaller result, such as an image's, the result is the cheaper one to turn.
  const bool turned = channels_last && !is_channels_last(x) && size[0] * size[1] < x.size(2) * x.size(3);
  return turned ? contiguous_as(resized(x, size, align_corners, false), true) : resized(x, size, align_corners, channels_last);
}

template <class T>
void repeat(const Tensor& x, int64_t fy, int64_t fx, const Tensor& y) {
  const int64_t c = x.size(1), w = x.size(3);
  parallel_for(0, x.size(0) * x.size(2), 1, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      SEGFAST_CALL(repeat_row<T>)(data<T>(x) + row * w * c, w, c, fx, fy, data<T>(y) + row * fy * w * fx * c);
    }
  });
}

Tensor repeat_cpu(const Tensor& input, int64_t fy, int64_t fx) {
  repeat_counter.add();
  want_map(input);
  STD_TORCH_CHECK(fy > 0 && fx > 0, "repeat_pixels: want factors of 1 and more");
  const Tensor x = contiguous_as(input, true);
  const Tensor y = empty({x.size(0), x.size(1), x.size(2) * fy, x.size(3) * fx}, x.scalar_type(), x, true);
  if (y.numel() == 0) return y;
  x.scalar_type() == ScalarType::Float ? repeat<float>(x, fy, fx, y) : repeat<BFloat16>(x, fy, fx, y);
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("resize", TORCH_BOX(&segfast::resize_cpu));
  m.impl("repeat_pixels", TORCH_BOX(&segfast::repeat_cpu));
}
#endif
