// Depthwise convolution of contiguous (N, C, H, W) on CUDA, with what follows it: the folded BatchNorm and the activation, or the
// statistics of a training BatchNorm.
//
// A block makes a tile of one plane, of kDepthwiseRun rows a thread. Its input, halo included, is staged in shared memory, so
// that global memory is read once but for the halo; a thread goes down its column and reads a staged value once for all the taps
// that use it. K and S are the kernel's size and stride (3 and 1, 3 and 2), or 0 for those known at run time only.
#pragma once

#include "launch.cuh"

namespace segfast::cuda {

constexpr int kDepthwiseRun = 8;
constexpr int kMostTaps = 64;
constexpr int kMostDepthwiseThreads = 256;
constexpr int64_t kMostShared = 40 << 10;  // for the staged input; what a block may have without asking is 48 KB

enum class Act : int { none, relu, relu6, silu, hardswish };

static_assert(kMostDepthwiseThreads % kWarp == 0);

// NaN stays NaN.
template <class A>
__device__ A clamp(A x, A low, A high) {
  return x < low ? low : x > high ? high : x;
}

template <class A>
__device__ A activate(A x, Act act) {
  if (act == Act::relu) return clamp<A>(x, 0, INFINITY);
  if (act == Act::relu6) return clamp<A>(x, 0, 6);
  if (act == Act::silu) return x / (1 + exp(-x));
  if (act == Act::hardswish) return x * clamp<A>(x + 3, 0, 6) / 6;
  return x;
}

struct DepthwiseShape {
  int64_t images, channels;
  int h, w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

struct DepthwiseTile {
  int columns, rows;   // of threads; a tile is columns x (rows * kDepthwiseRun)
  int halo_h, halo_w;  // of the staged input; 0: not staged
  int across, down;    // tiles in a plane
};

// n values, their mean and the sum of squares about it.
struct Moments {
  double n, mean, square;
};

__device__ inline Moments merge(const Moments& a, const Moments& b) {
  if (b.n == 0) return a;
  const double n = a.n + b.n, share = b.n / n, apart = b.mean - a.mean;
  return {n, a.mean + apart * share, a.square + b.square + apart * apart * a.n * share};
}

// Over the block, always in the same order. Every thread must call; thread 0 gets it.
__device__ inline Moments block_moments(Moments mine, Shared<Moments> scratch) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const double n = __shfl_down_sync(kFullMask, mine.n, offset), mean = __shfl_down_sync(kFullMask, mine.mean, offset);
    const double square = __shfl_down_sync(kFullMask, mine.square, offset);
    mine = merge(mine, {n, mean, square});
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) mine = merge(mine, scratch[warp]);
  }
  return mine;
}

// y = act(scale u + shift); with statistics y = u = dw(x) + shift, and the moments of each tile of u. scale and shift may be
// null.
template <class T, int K, int S, bool kStatistics>
__global__ void __launch_bounds__(kMostDepthwiseThreads, 2)
    depthwise_tile(DepthwiseShape shape, DepthwiseTile tile, Global<const T> x, Global<const T> weight,
                   Global<const typename Wide<T>::type> scale, Global<const typename Wide<T>::type> shift, Act act, Global<T> y,
                   Global<double> partials) {
  using A = typename Wide<T>::type;
  SEGFAST_DYNAMIC_SHARED(A, staged, tile.halo_h * tile.halo_w);
  SEGFAST_SHARED(A, taps, kMostTaps);
  SEGFAST_SHARED(A, affine, 2);
  SEGFAST_SHARED(Moments, scratch, kMostDepthwiseThreads / kWarp);
  const int tiles = tile.across * tile.down;
  const int64_t plane = blockIdx.x / tiles, channel = plane % shape.channels;
  const int index = static_cast<int>(blockIdx.x - plane * tiles), thread = static_cast<int>(threadIdx.x);
  const int column = thread % tile.columns, row = thread / tile.columns;
  const int top = index / tile.across * tile.rows * kDepthwiseRun, left = index % tile.across * tile.columns;
  constexpr bool kFixed = K != 0;
  const int stride_h = kFixed ? S : shape.stride_h, stride_w = kFixed ? S : shape.stride_w;
  const int kernel_h = kFixed ? K : shape.kernel_h, kernel_w = kFixed ? K : shape.kernel_w;
  const int in_top = top * stride_h - shape.padding_h, in_left = left * stride_w - shape.padding_w;
  const int64_t input = plane * shape.h * shape.w;

  const auto read = [&](int r, int c) {
    const bool inside = r >= 0 && r < shape.h && c >= 0 && c < shape.w;
    return inside ? static_cast<A>(widen(load(x, input + static_cast<int64_t>(r) * shape.w + c))) : static_cast<A>(0);
  };
  for (int k = thread; k < kernel_h * kernel_w; k += static_cast<int>(blockDim.x)) {
    taps[k] = static_cast<A>(widen(load(weight, channel * kernel_h * kernel_w + k)));
  }
  if (thread == 0) {
    affine[0] = scale ? load(scale, channel) : static_cast<A>(1);
    affine[1] = shift ? load(shift, channel) : static_cast<A>(0);
  }
  for (int r = row; r < tile.halo_h; r += tile.rows) {
    for (int c = column; c < tile.halo_w; c += tile.columns) staged[r * tile.halo_w + c] = read(in_top + r, in_left + c);
  }
  __syncthreads();

  A u[kDepthwiseRun] = {};
  const int first = row * kDepthwiseRun;
  if constexpr (kFixed) {
    A w[K * K];
#pragma unroll
    for (int k = 0; k < K * K; ++k) w[k] = taps[k];
#pragma unroll
    for (int r = 0; r < (kDepthwiseRun - 1) * S + K; ++r) {
#pragma unroll
      for (int kw = 0; kw < K; ++kw) {
        const A value = staged[(first * S + r) * tile.halo_w + column * S + kw];
#pragma unroll
        for (int o = 0; o < kDepthwiseRun; ++o) {
          if (r >= o * S && r < o * S + K) u[o] += w[(r - o * S) * K + kw] * value;
        }
      }
    }
  } else {
#pragma unroll
    for (int o = 0; o < kDepthwiseRun; ++o) {
      for (int kh = 0; kh < kernel_h; ++kh) {
        for (int kw = 0; kw < kernel_w; ++kw) {
          const int r = (first + o) * stride_h + kh * shape.dilation_h, c = column * stride_w + kw * shape.dilation_w;
          u[o] += taps[kh * kernel_w + kw] * (tile.halo_h != 0 ? staged[r * tile.halo_w + c] : read(in_top + r, in_left + c));
        }
      }
    }
  }

  const A scale_ = affine[0], shift_ = affine[1];
  const int64_t output = plane * shape.out_h * shape.out_w;
  int n = 0;
  A mean{}, square{};
#pragma unroll
  for (int o = 0; o < kDepthwiseRun; ++o) {
    const int r = top + first + o, c = left + column;
    if (r < shape.out_h && c < shape.out_w) {
      const A value = u[o] * scale_ + shift_;
      const T rounded = narrow<T>(kStatistics ? value : activate(value, act));
      store(y, output + static_cast<int64_t>(r) * shape.out_w + c, rounded);
      if constexpr (kStatistics) {  // of what is stored, as a BatchNorm that follows would take them
        const A apart = static_cast<A>(widen(rounded)) - mean;
        mean += apart / static_cast<A>(++n);
        square += apart * (static_cast<A>(widen(rounded)) - mean);
      }
    }
  }
  if constexpr (kStatistics) {
    const Moments all = block_moments({static_cast<double>(n), static_cast<double>(mean), static_cast<double>(square)}, scratch);
    if (thread == 0) {
      const int64_t at = static_cast<int64_t>(blockIdx.x) * 3;
      store(partials, at, all.n), store(partials, at + 1, all.mean), store(partials, at + 2, all.square);
    }
  }
}

// A block a channel: merges the tiles' moments into the batch's mean and biased variance.
template <class A>
__global__ void __launch_bounds__(kMostDepthwiseThreads, 2)
    depthwise_statistics(Global<const double> partials, int64_t images, int64_t channels, int tiles, Global<A> mean,
                         Global<A> var) {
  SEGFAST_SHARED(Moments, scratch, kMostDepthwiseThreads / kWarp);
  Moments mine{};
  for (int64_t i = threadIdx.x; i < images * tiles; i += blockDim.x) {
    const int64_t image = i / tiles, at = ((image * channels + blockIdx.x) * tiles + (i - image * tiles)) * 3;
    mine = merge(mine, {load(partials, at), load(partials, at + 1), load(partials, at + 2)});
  }
  mine = block_moments(mine, scratch);
  if (threadIdx.x == 0) {
    store(mean, blockIdx.x, static_cast<A>(mine.mean));
    store(var, blockIdx.x, static_cast<A>(mine.square / mine.n));
  }
}

// The widest tile that the plane fills; staged where its input fits and is not mostly halo.
inline DepthwiseTile depthwise_tile_of(const DepthwiseShape& s, int64_t bytes) {
  DepthwiseTile tile{};
  tile.columns = s.out_w > 32 ? 64 : 32;
  tile.rows = kThreads / tile.columns;
  const auto halo = [&] {
    tile.halo_h = (tile.rows * kDepthwiseRun - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
    tile.halo_w = (tile.columns - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
    return static_cast<int64_t>(tile.halo_h) * tile.halo_w;
  };
  while (tile.rows > 1 && ((tile.rows - 1) * kDepthwiseRun >= s.out_h || halo() * bytes > kMostShared)) --tile.rows;
  const int64_t used = static_cast<int64_t>(tile.rows) * kDepthwiseRun * s.stride_h * tile.columns * s.stride_w;
  if (halo() * bytes > kMostShared || halo() > 4 * used) tile.halo_h = tile.halo_w = 0;
  tile.across = static_cast<int>(ceil_div(s.out_w, tile.columns));
  tile.down = static_cast<int>(ceil_div(s.out_h, tile.rows * kDepthwiseRun));
  return tile;
}

// Doubles of scratch for the statistics.
template <class T>
int64_t depthwise_partials(const DepthwiseShape& shape) {
  const DepthwiseTile tile = depthwise_tile_of(shape, sizeof(typename Wide<T>::type));
  return 3 * shape.images * shape.channels * tile.across * tile.down;
}

template <class T, int K, int S, bool kStatistics>
void launch_depthwise(const DepthwiseShape& shape, const DepthwiseTile& tile, const T* x, const T* weight,
                      const typename Wide<T>::type* scale, const typename Wide<T>::type* shift, Act act, T* y, double* partials,
                      cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(tile.halo_h) * tile.halo_w * sizeof(typename Wide<T>::type);
  SEGFAST_LAUNCH((depthwise_tile<T, K, S, kStatistics>), shape.images * shape.channels * tile.across * tile.down,
                 tile.columns * tile.rows, bytes, stream, shape, tile, x, weight, scale, shift, act, y, partials);
}

template <class T, bool kStatistics>
void depthwise_any(const DepthwiseShape& s, const T* x, const T* weight, const typename Wide<T>::type* scale,
                   const typename Wide<T>::type* shift, Act act, T* y, double* partials, cudaStream_t stream) {
  const DepthwiseTile tile = depthwise_tile_of(s, sizeof(typename Wide<T>::type));
  // Of these kernels, at strides 1 and 2, every tile is staged.
  const bool plain = s.kernel_h == 3 && s.kernel_w == 3 && s.dilation_h == 1 && s.dilation_w == 1;
  if (plain && s.stride_h == 1 && s.stride_w == 1) {
    launch_depthwise<T, 3, 1, kStatistics>(s, tile, x, weight, scale, shift, act, y, partials, stream);
  } else if (plain && s.stride_h == 2 && s.stride_w == 2) {
    launch_depthwise<T, 3, 2, kStatistics>(s, tile, x, weight, scale, shift, act, y, partials, stream);
  } else {
    launch_depthwise<T, 0, 0, kStatistics>(s, tile, x, weight, scale, shift, act, y, partials, stream);
  }
}

template <class T>
void depthwise(const DepthwiseShape& shape, const T* x, const T* weight, const typename Wide<T>::type* scale,
               const typename Wide<T>::type* shift, Act act, T* y, cudaStream_t stream) {
  depthwise_any<T, false>(shape, x, weight, scale, shift, act, y, nullptr, stream);
}

template <class T>
void depthwise_train(const DepthwiseShape& shape, const T* x, const T* weight, const typename Wide<T>::type* bias, T* u,
                     double* partials, typename Wide<T>::type* mean, typename Wide<T>::type* var, cudaStream_t stream) {
  depthwise_any<T, true>(shape, x, weight, nullptr, bias, Act::none, u, partials, stream);
  const DepthwiseTile tile = depthwise_tile_of(shape, sizeof(typename Wide<T>::type));
  SEGFAST_LAUNCH((depthwise_statistics<typename Wide<T>::type>), shape.channels, kThreads, 0, stream, partials, shape.images,
                 shape.channels, tile.across * tile.down, mean, var);
}

}  // namespace segfast::cuda
