#define SEGFAST_FILE "pairwise_loss.cpp"
#include "each_isa.h"
#include "pairwise.h"

#ifndef SEGFAST_KERNELS
namespace segfast {
namespace {

Counter counter("pairwise_loss");

constexpr int64_t kBlock = 256;       // nodes of one pass over the tiles: the accumulators are read and written once a pass
constexpr int64_t kTile = 3 * 64;     // doubles of a tile
constexpr int64_t kBudget = 1 << 22;  // doubles of packed features at a time (32 MB), unless one image needs more

// Gram form. With Z = [A; B], the normalised features of student and teacher stacked, channels x nodes:
//   ||A'A - B'B||^2 = ||AA'||^2 + ||BB'||^2 - 2 ||AB'||^2, all blocks of ZZ', whose upper triangle is all that is computed.
// saved[image][panel of A's channels c][k][8] = AA'[k, c] for k in A, -AB'[c, k] for k in B: the gradient is saved' Z.
double gram_form(const Features& student, const Features& teacher, double eps, const Tensor& saved) {
  const int64_t a = student.panels(), panels = a + teacher.panels(), images = student.images, nodes = student.nodes;
  const std::vector<Tile> tiles = upper_tiles(panels);
  const int64_t count = static_cast<int64_t>(tiles.size());
  const int64_t group = std::max<int64_t>(1, std::min(images, kBudget / (kBlock * 8 * panels)));
  const Scratch packed(group * panels * kBlock * 8), sums(group * count * kTile), squares(images * count);
  double* const weights = data<double>(saved);
  for (int64_t first = 0; first < images; first += group) {
    const int64_t here = std::min(group, images - first);
    for (int64_t begin = 0; begin < nodes; begin += kBlock) {
      const int64_t size = std::min(kBlock, nodes - begin), pieces = (size + kNodes - 1) / kNodes;
      parallel_for(0, here * pieces * 2, 1, [&](int64_t from, int64_t to) {
        double norm[kNodes], inverse[kNodes];
        for (int64_t task = from; task < to; ++task) {
          const int64_t image = task / (2 * pieces), at = task / 2 % pieces * kNodes, length = std::min(kNodes, size - at);
          double* panel = packed.get() + (image * panels + (task % 2 ? a : 0)) * kBlock * 8 + at * 8;
          (task % 2 ? teacher : student).pack(first + image, begin + at, length, length, eps, panel, kBlock * 8, norm, inverse);
        }
      });
      parallel_for(0, here * count, 8, [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; ++task) {
          const Tile& tile = tiles[task % count];
          const double* panel = packed.get() + task / count * panels * kBlock * 8;
          double* sum = sums.get() + task * kTile;
          if (begin == 0) std::fill(sum, sum + kTile, 0.0);
          SEGFAST_CALL(gram_tile)(panel + tile.i * kBlock * 8, panel + tile.j * kBlock * 8, kBlock * 8, size, tile.count, sum);
        }
      });
    }
    parallel_for(0, here * count, 64, [&](int64_t from, int64_t to) {
      for (int64_t task = from; task < to; ++task) {
        const Tile& tile = tiles[task % count];
        const int64_t i = tile.i, image = first + task / count;
        double* weight = weights + image * a * panels * 64;
        double total = 0;
        for (int p = 0; p < tile.count; ++p) {
          const double* sum = sums.get() + task * kTile + p * 64;
          const int64_t j = tile.j + p;
          const bool across = i < a && j >= a;
          double square = 0;
          for (int k = 0; k < 64; ++k) square += sum[k] * sum[k];
          total += across ? -2 * square : (i == j ? square : 2 * square);
          for (int k = 0; k < 64 && i < a; ++k) {
            weight[i * panels * 64 + j * 64 + k % 8 * 8 + k / 8] = across ? -sum[k] : sum[k];
            if (!across && i != j) weight[j * panels * 64 + i * 64 + k] = sum[k];
          }
        }
        squares.get()[first * count + task] = total;
      }
    });
  }
  double total = 0;
  for (int64_t i = 0; i < images * count; ++i) total += squares.get()[i];
  return total < 0 ? 0 : total;  // rounding, where student and teacher are the same
}

// Direct form: D = A'A - B'B itself, saved[image][panel of nodes n][m][8] = D[m, n]; for nodes fewer than channels.
double direct_form(const Features& student, const Features& teacher, double eps, const Tensor& saved) {
  const int64_t images = student.images, panels = (student.nodes + 7) / 8, mine = student.channels;
  const int64_t all = mine + teacher.channels;
  const std::vector<Tile> tiles = upper_tiles(panels);
  const int64_t count = static_cast<int64_t>(tiles.size());
  const Scratch packed(images * panels * all * 8), squares(images * count);
  double* const differences = data<double>(saved);
  parallel_for(0, images * panels, 4, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      double* panel = packed.get() + task * all * 8;
      student.pack_nodes(task / panels, task % panels * 8, eps, panel);
      teacher.pack_nodes(task / panels, task % panels * 8, eps, panel + mine * 8);
    }
  });
  parallel_for(0, images * count, 4, [&](int64_t from, int64_t to) {
    alignas(64) double sum[kTile];
    for (int64_t task = from; task < to; ++task) {
      const Tile& tile = tiles[task % count];
      const int64_t image = task / count;
      const double* left = packed.get() + (image * panels + tile.i) * all * 8;
      const double* right = packed.get() + (image * panels + tile.j) * all * 8;
      std::fill(sum, sum + kTile, 0.0);
      SEGFAST_CALL(gram_tile)(left + mine * 8, right + mine * 8, all * 8, all - mine, tile.count, sum);
      for (double& value : sum) value = -value;
      SEGFAST_CALL(gram_tile)(left, right, all * 8, mine, tile.count, sum);
      double* difference = differences + image * panels * panels * 64;
      double total = 0;
      for (int p = 0; p < tile.count; ++p) {
        const int64_t i = tile.i, j = tile.j + p;
        double square = 0;
        for (int k = 0; k < 64; ++k) {
          const double value = sum[p * 64 + k];
          square += value * value;
          difference[j * panels * 64 + i * 64 + k] = value;
          if (i != j) difference[i * panels * 64 + j * 64 + k % 8 * 8 + k / 8] = value;
        }
        total += i == j ? square : 2 * square;
      }
      squares.get()[task] = total;
    }
  });
  double total = 0;
  for (int64_t i = 0; i < images * count; ++i) total += squares.get()[i];
  return total;
}

double forward(const Features& student, const Features& teacher, double eps, bool gram, Tensor& saved) {
  const int64_t a = student.panels(), nodes = (student.nodes + 7) / 8;
  const int64_t rows = gram ? a : nodes, columns = gram ? a + teacher.panels() : nodes;
  saved = empty({student.images, rows * 8, columns * 8}, ScalarType::Double, student.x);
  return gram ? gram_form(student, teacher, eps, saved) : direct_form(student, teacher, eps, saved);
}

double pairs(const Features& student) {
  return static_cast<double>(student.images) * static_cast<double>(student.nodes) * static_cast<double>(student.nodes);
}

std::tuple<Tensor, Tensor> pairwise_loss_cpu(const Tensor& s, const Tensor& t, double eps, bool gram) {
  counter.add();
  const Features student(s), teacher(t);
  Tensor saved = s;
  const double loss = forward(student, teacher, eps, gram, saved) / pairs(student);
  const bool wide = s.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Double;
  const Tensor out = empty({}, wide ? ScalarType::Double : ScalarType::Float, s);
  if (wide) {
    *data<double>(out) = loss;
  } else {
    *data<float>(out) = static_cast<float>(loss);
  }
  return {out, saved};
}

// The gradient of the first of the two features. Without `saved` it is computed again.
Tensor pairwise_loss_backward_cpu(const Tensor& grad, const Tensor& s, const Tensor& t, std::optional<Tensor> kept, double eps,
                                  bool gram, bool detach_norm) {
  counter.add();
  const Features student(s), teacher(t);
  Tensor saved = kept.has_value() ? *kept : s;
  if (!kept.has_value()) forward(student, teacher, eps, gram, saved);
  const Tensor out = student.empty_gradient();
  double scale = 4 / pairs(student);
  dispatch_float("pairwise_loss", grad.scalar_type(),
                 [&](auto type) { scale *= static_cast<double>(*data<decltype(type)>(grad)); });
  const int64_t a = student.panels(), panels = gram ? a + teacher.panels() : a, nodes = student.nodes;
  const int64_t blocks = (nodes + kNodes - 1) / kNodes, padded = (nodes + 7) / 8 * 8;
  const double* const weights = data<double>(saved);
  for (int64_t image = 0; image < student.images && !gram; ++image) {
    // grad y[m] = sum_n D[m, n] y[n]: D's panels mixed by the features of all nodes
    const Scratch y(a * padded * 8), g(a * padded * 8), norm(padded), inverse(padded);
    student.pack(image, 0, nodes, padded, eps, y.get(), padded * 8, norm.get(), inverse.get());
    parallel_for(0, padded / 8, 1, [&](int64_t from, int64_t to) {
      const double* difference = weights + image * padded * padded + from * 64;
      SEGFAST_CALL(mix)
      (difference, padded * 8, y.get(), padded / 8, a, (to - from) * 8, g.get() + from * 64, padded * 8);
      const int64_t count = std::min(nodes, to * 8) - from * 8;
      student.unpack(out, image, from * 8, count, y.get() + from * 64, padded * 8, g.get() + from * 64, padded * 8,
                     norm.get() + from * 8, inverse.get() + from * 8, scale, detach_norm);
    });
  }
  if (!gram) return out;
  parallel_for(0, student.images * blocks, 1, [&](int64_t from, int64_t to) {
    const Scratch z(panels * kNodes * 8), g(a * kNodes * 8);
    double norm[kNodes], inverse[kNodes], unused[kNodes];
    for (int64_t task = from; task < to; ++task) {
      const int64_t image = task / blocks, begin = task % blocks * kNodes, count = std::min(kNodes, nodes - begin);
      const int64_t rows = (count + 7) / 8 * 8;
      teacher.pack(image, begin, count, rows, eps, z.get() + a * kNodes * 8, kNodes * 8, unused, inverse);
      student.pack(image, begin, count, rows, eps, z.get(), kNodes * 8, norm, inverse);
      SEGFAST_CALL(mix)
      (z.get(), kNodes * 8, weights + image * a * panels * 64, panels, a, rows, g.get(), kNodes * 8);
      student.unpack(out, image, begin, count, z.get(), kNodes * 8, g.get(), kNodes * 8, norm, inverse, scale, detach_norm);
    }
  });
  return out;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("pairwise_loss", TORCH_BOX(&segfast::pairwise_loss_cpu));
  m.impl("pairwise_loss_backward", TORCH_BOX(&segfast::pairwise_loss_backward_cpu));
}
#endif
