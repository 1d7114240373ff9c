#define SEGFAST_FILE "pairwise_cosine.cpp"
#include "each_isa.h"
#include "pairwise.h"

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// A tile of the product and its mirror image, into the (M, M) matrix.
template <class T>
void store_tile(const double* tile, T* matrix, int64_t nodes, int64_t row, int64_t column) {
  const int64_t rows = nodes - row < 8 ? nodes - row : 8, columns = nodes - column < 8 ? nodes - column : 8;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      matrix[(row + r) * nodes + column + c] = static_cast<T>(static_cast<compute<T>>(tile[r * 8 + c]));
    }
  }
  for (int64_t c = 0; c < columns && row != column; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      matrix[(column + c) * nodes + row + r] = static_cast<T>(static_cast<compute<T>>(tile[r * 8 + c]));
    }
  }
}

// grad + grad', rows [row, row + 8) of all columns: panel[n / 8][m - row][n % 8].
template <class T>
void pack_symmetric(const T* grad, int64_t nodes, int64_t row, double* panels) {
  for (int64_t n = 0; n < (nodes + 7) / 8 * 8; ++n) {
    for (int64_t m = row; m < row + 8; ++m) {
      const bool inside = n < nodes && m < nodes;
      panels[n / 8 * 64 + (m - row) * 8 + n % 8] =
          inside ? static_cast<double>(widen(grad[m * nodes + n])) + widen(grad[n * nodes + m]) : 0;
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#else

namespace segfast {
namespace {

Counter counter("pairwise_cosine");

Tensor pairwise_cosine_cpu(const Tensor& x, double eps) {
  counter.add();
  const Features features(x);
  const int64_t images = features.images, nodes = features.nodes, panels = (nodes + 7) / 8, channels = features.channels;
  const Tensor out = empty({images, nodes, nodes}, x.scalar_type(), x);
  const std::vector<Tile> tiles = upper_tiles(panels);
  const int64_t count = static_cast<int64_t>(tiles.size());
  const Scratch packed(images * panels * channels * 8);
  parallel_for(0, images * panels, 4, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      features.pack_nodes(task / panels, task % panels * 8, eps, packed.get() + task * channels * 8);
    }
  });
  parallel_for(0, images * count, 4, [&](int64_t from, int64_t to) {
    alignas(64) double sum[3 * 64];
    for (int64_t task = from; task < to; ++task) {
      const Tile& tile = tiles[task % count];
      const double* panel = packed.get() + task / count * panels * channels * 8;
      std::fill(sum, sum + 3 * 64, 0.0);
      SEGFAST_CALL(gram_tile)
      (panel + tile.i * channels * 8, panel + tile.j * channels * 8, channels * 8, channels, tile.count, sum);
      dispatch_float("pairwise_cosine", x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        T* matrix = data<T>(out) + task / count * nodes * nodes;
        for (int p = 0; p < tile.count; ++p) {
          SEGFAST_CALL(store_tile<T>)(sum + p * 64, matrix, nodes, tile.i * 8, (tile.j + p) * 8);
        }
      });
    }
  });
  return out;
}

Tensor pairwise_cosine_backward_cpu(const Tensor& grad, const Tensor& x, double eps) {
  counter.add();
  const Features features(x);
  const int64_t nodes = features.nodes, padded = (nodes + 7) / 8 * 8, a = features.panels();
  const Tensor matrices = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  const Tensor out = features.empty_gradient();
  const Scratch y(a * padded * 8), norm(padded), inverse(padded);
  for (int64_t image = 0; image < features.images; ++image) {
    parallel_for(0, padded / 8, 8, [&](int64_t from, int64_t to) {
      features.pack(image, from * 8, std::min(nodes, to * 8) - from * 8, (to - from) * 8, eps, y.get() + from * 64, padded * 8,
                    norm.get() + from * 8, inverse.get() + from * 8);
    });
    parallel_for(0, padded / 8, 1, [&](int64_t from, int64_t to) {
      const Scratch both(padded * 8), g(a * 64);
      for (int64_t panel = from; panel < to; ++panel) {
        dispatch_float("pairwise_cosine", x.scalar_type(), [&](auto type) {
          using T = decltype(type);
          SEGFAST_CALL(pack_symmetric<T>)(data<T>(matrices) + image * nodes * nodes, nodes, panel * 8, both.get());
        });
        SEGFAST_CALL(mix)(both.get(), 64, y.get(), padded / 8, a, 8, g.get(), 64);
        features.unpack(out, image, panel * 8, std::min<int64_t>(8, nodes - panel * 8), y.get() + panel * 64, padded * 8, g.get(),
                        64, norm.get() + panel * 8, inverse.get() + panel * 8, 1, false);
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("pairwise_cosine", TORCH_BOX(&segfast::pairwise_cosine_cpu));
  m.impl("pairwise_cosine_backward", TORCH_BOX(&segfast::pairwise_cosine_backward_cpu));
}
#endif
