// Max-pooling of channels_last maps without the indices, which PyTorch's computes and keeps in any case: of float32 twice the
// bytes of the result. For inference; float32 and bfloat16. NaN wins, as in PyTorch.
#define SEGFAST_FILE "max_pool.cpp"
#include "each_isa.h"

#ifndef SEGFAST_MAX_POOL_TYPES
#define SEGFAST_MAX_POOL_TYPES
namespace segfast {

struct Windows {
  int64_t channels, height, width;  // of the image
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
};

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// The pixel whose window begins at row `top` and column `left` of an image; both may lie outside it.
template <class T>
void max_pixel(const Windows& o, const T* image, int64_t top, int64_t left, T* y) {
  constexpr int L = lanes<float>;
  const auto vector = [&](int64_t c, auto read, auto write) {
    Vec<float> best = splat(-INFINITY);
    for (int64_t i = 0, row = top; i < o.kh; ++i, row += o.dh) {
      if (row < 0 || row >= o.height) continue;
      for (int64_t j = 0, column = left; j < o.kw; ++j, column += o.dw) {
        if (column < 0 || column >= o.width) continue;
        const Vec<float> v = read(image + (row * o.width + column) * o.channels + c);
        best = (v > best) | (v != v) ? v : best;
      }
    }
    write(y + c, best);
  };
  int64_t c = 0;
  for (; c + L <= o.channels; c += L) {
    vector(c, [](const T* from) { return load(from); }, [](T* to, Vec<float> v) { store(to, v); });
  }
  if (const int rest = static_cast<int>(o.channels - c); rest > 0) {
    vector(c, [rest](const T* from) { return load_n(from, rest); }, [rest](T* to, Vec<float> v) { store_n(to, v, rest); });
  }
}

template <class T>
void max_row(const Windows& o, const T* image, int64_t row, int64_t columns, T* y) {
  for (int64_t j = 0; j < columns; ++j) max_pixel(o, image, row * o.sh - o.ph, j * o.sw - o.pw, y + j * o.channels);
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("max_pool");

template <class T>
void max_pool(const Windows& o, const Tensor& x, const Tensor& y) {
  const int64_t rows = y.size(2), columns = y.size(3);
  parallel_for(0, y.size(0) * rows, 1, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      const T* const image = data<T>(x) + r / rows * o.height * o.width * o.channels;
      SEGFAST_CALL(max_row<T>)(o, image, r % rows, columns, data<T>(y) + r * columns * o.channels);
    }
  });
}

using Ints = std::vector<int64_t>;

Tensor max_pool_cpu(const Tensor& input, const Ints& size, const Ints& kernel, const Ints& stride, const Ints& padding,
                    const Ints& dilation) {
  counter.add();
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "max_pool: want a map (N, C, H, W) on the CPU in float32 or bfloat16");
  for (const Ints* pair : {&size, &kernel, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "max_pool: want two numbers in size, kernel, stride, padding and dilation");
  }
  const Tensor x = contiguous_as(input, true);
  const Windows o{x.size(1), x.size(2),  x.size(3),  kernel[0],   kernel[1],  stride[0],
                  stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  const Tensor y = empty({x.size(0), x.size(1), size[0], size[1]}, dtype, x, true);
  if (y.numel() == 0) return y;
  dtype == ScalarType::Float ? max_pool<float>(o, x, y) : max_pool<BFloat16>(o, x, y);
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) { m.impl("max_pool", TORCH_BOX(&segfast::max_pool_cpu)); }
#endif
