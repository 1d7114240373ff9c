// Max-pooling of a channels_last map, row by row. Included by max_pool.cpp and packed.cpp once per instruction set.
#ifndef SEGFAST_MAX_ROWS_TYPES
#define SEGFAST_MAX_ROWS_TYPES
namespace segfast {

struct Windows {
  int64_t channels, height, width;  // of the image
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  // The rows of the image under output row `row`: from first to before last.
  int64_t first(int64_t row) const { return row * sh - ph < 0 ? 0 : row * sh - ph; }
  int64_t last(int64_t row) const {
    const int64_t below = row * sh - ph + (kh - 1) * dh + 1;
    return below < height ? below : height;
  }
};

// `pairs`: size of the result, kernel, stride, padding, dilation.
inline Windows windows(const char* op, int64_t channels, int64_t height, int64_t width,
                       std::array<torch::headeronly::IntHeaderOnlyArrayRef, 5> pairs) {
  for (const auto& pair : pairs) {
    STD_TORCH_CHECK(pair.size() == 2, op, ": want two numbers in size, kernel, stride, padding and dilation");
  }
  const auto& [size, kernel, stride, padding, dilation] = pairs;
  return {channels, height, width, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

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
#endif
