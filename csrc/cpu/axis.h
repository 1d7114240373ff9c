// Where the pixels of a bilinear interpolation come from, along one axis.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common.h"

namespace segfast {
namespace {

// Output i lies between inputs i0[i] and i1[i], w1[i] of the way, as in ATen's area_pixel_compute_source_index, to the bit: in
// float but for double, multiplied and subtracted in one rounding as compilers do it there. Which shares are exactly 0, and turn
// an infinity into NaN, hangs on that.
struct Axis {
  int64_t in, out;
  std::vector<int32_t> i0, i1;
  std::vector<double> w1;
  Axis(int64_t in, int64_t out, bool align_corners, ScalarType dtype) : in(in), out(out), i0(out), i1(out), w1(out) {
    dtype == ScalarType::Double ? fill<double>(align_corners) : fill<float>(align_corners);
  }

 private:
  template <class A>
  void fill(bool align_corners) {
    const A corners = out > 1 ? static_cast<A>(in - 1) / static_cast<A>(out - 1) : 0;
    const A scale = align_corners ? corners : static_cast<A>(in) / static_cast<A>(out), half = 0.5;
    for (int64_t i = 0; i < out; ++i) {
      const A place = static_cast<A>(i),
              at = align_corners ? scale * place : std::max(std::fma(place + half, scale, -half), A(0));
      i0[i] = in == out ? static_cast<int32_t>(i) : static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(at), in - 1));
      i1[i] = i0[i] + (in != out && i0[i] < in - 1);
      w1[i] = in == out ? 0 : std::min(std::max(at - static_cast<A>(i0[i]), A(0)), A(1));
    }
  }
};

template <class A>
struct Weights {
  std::vector<A> w0, w1;
  explicit Weights(const Axis& axis) : w0(axis.out), w1(axis.out) {
    for (int64_t i = 0; i < axis.out; ++i) {
      w0[i] = static_cast<A>(1 - axis.w1[i]);
      w1[i] = static_cast<A>(axis.w1[i]);
    }
  }
};

}  // namespace
}  // namespace segfast
