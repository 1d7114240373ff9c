// Pixel-wise KL divergence on CUDA: loss and gradient in one pass over the logits.
//
// A pixel is served by ROWS threads, each of which holds R classes in registers: class c belongs to row c % ROWS. Where pixels
// are contiguous a warp's threads are neighbouring pixels; where classes are, its threads are neighbouring classes. Up to ROWS *
// R classes every logit is read once. More go by in chunks of ROWS * R (the online softmax), and are read again for the gradient.
#pragma once

#include "launch.cuh"

namespace segfast::cuda {

constexpr int kMostKlThreads = 256;

struct Logits {
  const void* data;
  Dtype dtype;
};

enum class Divisor : int { one, images, pixels };  // of the sum: "sum" and "none", "batchmean", "mean"

struct KlCall {
  Logits student, teacher;
  const bool* valid;              // of each pixel, or null
  int64_t images, classes, area;  // logits: images * classes * area, class-major or pixel-major
  double temperature;
  Divisor divisor;
  void* saved;                // the student's gradient, of its dtype and format, or null
  void* losses;               // of each pixel, or null
  void* loss;                 // the reduced loss, or null
  void* scale;                // 1 / divisor
  double* partials;           // kl_tiles() of them
  unsigned long long* count;  // of valid pixels: scratch, needed with `valid`
};

__host__ __device__ inline double kl_divisor(Divisor divisor, int64_t images, int64_t pixels, int64_t valid) {
  if (divisor == Divisor::images) return static_cast<double>(images);
  if (divisor == Divisor::one) return 1;
  return static_cast<double>(pixels == 0 || valid > 0 ? valid : 1);
}

// Maxima of logits, and sums of their exp(x - maximum). Of no logits: -inf and 0.
template <class A>
struct Softmaxes {
  A max_s, max_t, sum_s, sum_t;
};

// What logits are measured from: their maximum, or 0 where all are -inf, so that -inf - -inf stays out of the sums.
template <class A>
__device__ A base(A max) {
  return max == -static_cast<A>(INFINITY) ? A{} : max;
}

template <class A>
__device__ A rescale(A from, A to) {
  return from == to ? static_cast<A>(1) : exp(from - to);
}

template <class A>
__device__ Softmaxes<A> merge(const Softmaxes<A>& a, const Softmaxes<A>& b) {
  const A max_s = b.max_s > a.max_s ? b.max_s : a.max_s, max_t = b.max_t > a.max_t ? b.max_t : a.max_t;
  return {max_s, max_t, a.sum_s * rescale(a.max_s, max_s) + b.sum_s * rescale(b.max_s, max_s),
          a.sum_t * rescale(a.max_t, max_t) + b.sum_t * rescale(b.max_t, max_t)};
}

// KL = sum of p_t (exp(x) - 1 - x) with x = log p_s - log p_t, since both p sum to 1: no term is negative, and an error of the
// sums that x is made of cancels to first order, where a sum of p_t x would show it in full. Leaves p_s - p_t in `excess`.
template <class A>
__device__ A divergence(A p_s, A p_t, A x, A& excess) {
  const A limit = sizeof(A) == 8 ? static_cast<A>(0.03125) : static_cast<A>(0.5);
  if (x > -limit && x < limit) {
    A series = static_cast<A>(1. / 362880);
    series = series * x + static_cast<A>(1. / 40320);
    series = series * x + static_cast<A>(1. / 5040);
    series = series * x + static_cast<A>(1. / 720);
    series = series * x + static_cast<A>(1. / 120);
    series = series * x + static_cast<A>(1. / 24);
    series = series * x + static_cast<A>(1. / 6);
    series = series * x + static_cast<A>(1. / 2);
    const A rest = series * x * x;
    excess = p_t * (x + rest);
    return p_t * rest;
  }
  excess = p_s - p_t;
  return excess - p_t * x;
}

template <class T, int ROWS, int R, class A>
__device__ void load_typed(const void* data, int64_t offset, int64_t step, int64_t first, int64_t classes, A temperature,
                           bool multiply, A (&out)[R]) {
  const Global<const T> from = static_cast<const T*>(data);
#pragma unroll
  for (int k = 0; k < R; ++k) {
    const int64_t c = first + k * ROWS;
    if (c < classes) {
      const A x = static_cast<A>(widen(load(from, offset + c * step)));
      out[k] = multiply ? x * temperature : x / temperature;
    }
  }
}

// The kind is chosen once for all R loads: they stay in flight together.
template <int ROWS, int R, class A>
__device__ void load_logits(const Logits& x, int64_t offset, int64_t step, int64_t first, int64_t classes, A temperature,
                            bool multiply, A (&out)[R]) {
  if constexpr (sizeof(A) == 8) {
    load_typed<double, ROWS>(x.data, offset, step, first, classes, temperature, multiply, out);
  } else if (x.dtype == Dtype::float32) {
    load_typed<float, ROWS>(x.data, offset, step, first, classes, temperature, multiply, out);
  } else if (x.dtype == Dtype::float16) {
    load_typed<__half, ROWS>(x.data, offset, step, first, classes, temperature, multiply, out);
  } else {
    load_typed<__nv_bfloat16, ROWS>(x.data, offset, step, first, classes, temperature, multiply, out);
  }
}

template <class T, int ROWS, int R, class A>
__device__ void store_typed(void* data, int64_t offset, int64_t step, int64_t first, int64_t classes, const A (&values)[R]) {
  const Global<T> to = static_cast<T*>(data);
#pragma unroll
  for (int k = 0; k < R; ++k) {
    const int64_t c = first + k * ROWS;
    if (c < classes) store(to, offset + c * step, narrow<T>(values[k]));
  }
}

template <int ROWS, int R, class A>
__device__ void store_gradient(void* data, Dtype dtype, int64_t offset, int64_t step, int64_t first, int64_t classes,
                               const A (&values)[R]) {
  if constexpr (sizeof(A) == 8) {
    store_typed<double, ROWS>(data, offset, step, first, classes, values);
  } else if (dtype == Dtype::float32) {
    store_typed<float, ROWS>(data, offset, step, first, classes, values);
  } else if (dtype == Dtype::float16) {
    store_typed<__half, ROWS>(data, offset, step, first, classes, values);
  } else {
    store_typed<__nv_bfloat16, ROWS>(data, offset, step, first, classes, values);
  }
}

// Of the classes first, first + ROWS, ...
template <int ROWS, int R, class A>
__device__ Softmaxes<A> softmaxes(int64_t first, int64_t classes, const A (&s)[R], const A (&t)[R]) {
  Softmaxes<A> chunk{-static_cast<A>(INFINITY), -static_cast<A>(INFINITY)};
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (first + k * ROWS < classes) {
      chunk.max_s = s[k] > chunk.max_s ? s[k] : chunk.max_s;
      chunk.max_t = t[k] > chunk.max_t ? t[k] : chunk.max_t;
    }
  }
  const A base_s = base(chunk.max_s), base_t = base(chunk.max_t);
  A sum_s[4] = {}, sum_t[4] = {};  // four sums each: shorter chains, smaller errors
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (first + k * ROWS < classes) {
      sum_s[k % 4] += exp(s[k] - base_s);
      sum_t[k % 4] += exp(t[k] - base_t);
    }
  }
  chunk.sum_s = (sum_s[0] + sum_s[1]) + (sum_s[2] + sum_s[3]);
  chunk.sum_t = (sum_t[0] + sum_t[1]) + (sum_t[2] + sum_t[3]);
  return chunk;
}

template <class A, int ROWS, int R, bool kClassesInner>
__global__ void __launch_bounds__(kMostKlThreads, sizeof(A) == 4 && R <= 20 ? 2 : 1)
    pixelwise_kl_tile(KlCall call, A temperature, bool multiply) {
  SEGFAST_SHARED(A, max_s, kMostKlThreads);
  SEGFAST_SHARED(A, max_t, kMostKlThreads);
  SEGFAST_SHARED(A, sum_s, kMostKlThreads);
  SEGFAST_SHARED(A, sum_t, kMostKlThreads);
  SEGFAST_SHARED(A, parts, kMostKlThreads);
  SEGFAST_SHARED(double, scratch, kMostKlThreads / kWarp);
  SEGFAST_SHARED(double, divisor, 1);
  const Global<const bool> valid = call.valid;
  const int64_t pixels = call.images * call.area, classes = call.classes;
  if (threadIdx.x == 0) {
    const Global<const unsigned long long> count = call.count;
    divisor[0] = kl_divisor(call.divisor, call.images, pixels, valid ? static_cast<int64_t>(load(count, 0)) : pixels);
  }
  const int slots = static_cast<int>(blockDim.x) / ROWS, thread = static_cast<int>(threadIdx.x);
  const int row = kClassesInner ? thread % ROWS : thread / slots, slot = kClassesInner ? thread / ROWS : thread % slots;
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * slots + slot;
  const bool inside = pixel < pixels, keep = inside && (!valid || load(valid, pixel));
  const int64_t image = pixel / call.area, step = kClassesInner ? 1 : call.area;
  const int64_t offset = kClassesInner ? pixel * classes : image * classes * call.area + (pixel - image * call.area);

  A s[R], t[R];
  Softmaxes<A> mine{-static_cast<A>(INFINITY), -static_cast<A>(INFINITY)};
  if (keep) {
    for (int64_t first = row; first < classes; first += ROWS * R) {
      load_logits<ROWS>(call.student, offset, step, first, classes, temperature, multiply, s);
      load_logits<ROWS>(call.teacher, offset, step, first, classes, temperature, multiply, t);
      const Softmaxes<A> chunk = softmaxes<ROWS>(first, classes, s, t);
      mine = classes <= ROWS * R ? chunk : merge(mine, chunk);
    }
  }
  Softmaxes<A> all = mine;
  if constexpr (ROWS != 1) {
    max_s[thread] = mine.max_s, max_t[thread] = mine.max_t;
    sum_s[thread] = mine.sum_s, sum_t[thread] = mine.sum_t;
  }
  __syncthreads();
  if constexpr (ROWS != 1) {
    for (int r = 0; r < ROWS; ++r) {
      const int other = kClassesInner ? slot * ROWS + r : r * slots + slot;
      const Softmaxes<A> one{max_s[other], max_t[other], sum_s[other], sum_t[other]};
      all = r == 0 ? one : merge(all, one);
    }
  }

  // Half has too few small numbers for a gradient divided by the number of pixels: that factor is applied at the end.
  const bool half = call.student.dtype == Dtype::float16;
  const A factor = static_cast<A>(half ? call.temperature : call.temperature / divisor[0]);
  const A base_s = base(all.max_s), base_t = base(all.max_t);
  const A over_s = 1 / all.sum_s, over_t = 1 / all.sum_t, ratio = log(all.sum_s / all.sum_t);
  A value = 0;
  if (inside && (keep || call.saved != nullptr)) {
    for (int64_t first = row; first < classes; first += ROWS * R) {
      if (keep && classes > ROWS * R) {
        load_logits<ROWS>(call.student, offset, step, first, classes, temperature, multiply, s);
        load_logits<ROWS>(call.teacher, offset, step, first, classes, temperature, multiply, t);
      }
#pragma unroll
      for (int k = 0; k < R; ++k) {
        A excess = 0;
        if (keep && first + k * ROWS < classes) {
          const A a = s[k] - base_s, b = t[k] - base_t;
          value += divergence(exp(a) * over_s, exp(b) * over_t, a - b - ratio, excess);
        }
        s[k] = excess * factor;
      }
      if (call.saved != nullptr) store_gradient<ROWS>(call.saved, call.student.dtype, offset, step, first, classes, s);
    }
  }
  if constexpr (ROWS != 1) {
    parts[thread] = value;
    __syncthreads();
    value = 0;
    for (int r = 0; r < (row == 0 ? ROWS : 0); ++r) value += parts[kClassesInner ? slot * ROWS + r : r * slots + slot];
  }
  value *= static_cast<A>(call.temperature * call.temperature);
  if (call.losses != nullptr && inside && row == 0) store<A>(static_cast<A*>(call.losses), pixel, value);
  const double total = block_sum<double>(value, scratch);
  const Global<double> partials = call.partials;
  if (threadIdx.x == 0) store(partials, blockIdx.x, total);
}

// Integers: in whatever order the blocks add them, the sum is the same.
__global__ inline void pixelwise_kl_count(Global<const bool> valid, int64_t pixels, Global<unsigned long long> count) {
  SEGFAST_SHARED(int, scratch, kMostKlThreads / kWarp);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int mine = 0;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < pixels; at += step) {
    mine += load(valid, at);
  }
  const int total = block_sum<int>(mine, scratch);
  if (threadIdx.x == 0) atomic_add(count, 0, static_cast<unsigned long long>(total));
}

// One block adds up the tiles.
template <class A>
__global__ void pixelwise_kl_finish(KlCall call, int64_t tiles) {
  SEGFAST_SHARED(double, scratch, kMostKlThreads / kWarp);
  const Global<const double> partials = call.partials;
  double mine = 0;
  for (int64_t at = threadIdx.x; at < tiles; at += blockDim.x) mine += load(partials, at);
  const double total = block_sum<double>(mine, scratch);
  if (threadIdx.x == 0) {
    const Global<const unsigned long long> count = call.count;
    const int64_t pixels = call.images * call.area;
    const int64_t valid = call.valid != nullptr && pixels > 0 ? static_cast<int64_t>(load(count, 0)) : pixels;
    const double divisor = kl_divisor(call.divisor, call.images, pixels, valid);
    if (call.loss != nullptr) store<A>(static_cast<A*>(call.loss), 0, static_cast<A>(total / divisor));
    store<A>(static_cast<A*>(call.scale), 0, static_cast<A>(1 / divisor));
  }
}

// How many threads serve a pixel: as few as hold its classes, but enough that a warp's loads are whole sectors of 32 bytes.
inline int kl_rows(int64_t classes, bool channels_last) {
  if (!channels_last && classes <= 20) return 1;
  return classes <= 160 ? 8 : 32;
}

inline int64_t kl_tiles(int64_t images, int64_t classes, int64_t area, bool channels_last) {
  return ceil_div(images * area, kThreads / kl_rows(classes, channels_last));
}

template <class A, int ROWS, int R, bool kClassesInner>
void launch_kl_tile(const KlCall& call, cudaStream_t stream) {
  // Powers of two divide exactly through their inverse.
  int exponent;
  const bool exact = frexp(call.temperature, &exponent) == 0.5;
  const A temperature = static_cast<A>(exact ? 1 / call.temperature : call.temperature);
  SEGFAST_LAUNCH((pixelwise_kl_tile<A, ROWS, R, kClassesInner>), kl_tiles(call.images, call.classes, call.area, kClassesInner),
                 kThreads, 0, stream, call, temperature, exact);
}

template <class A, bool kClassesInner>
void launch_kl(const KlCall& call, cudaStream_t stream) {
  if (!kClassesInner && call.classes <= 20) {
    launch_kl_tile<A, 1, 20, false>(call, stream);
  } else if (call.classes <= 32) {
    launch_kl_tile<A, 8, 4, kClassesInner>(call, stream);
  } else if (call.classes <= 160) {
    launch_kl_tile<A, 8, 20, kClassesInner>(call, stream);
  } else if (call.classes <= 640) {
    launch_kl_tile<A, 32, 20, kClassesInner>(call, stream);
  } else {
    launch_kl_tile<A, 32, 32, kClassesInner>(call, stream);
  }
}

// A: double for logits of doubles, float for those of the other dtypes.
template <class A>
void pixelwise_kl(const KlCall& call, bool channels_last, cudaStream_t stream) {
  const int64_t pixels = call.images * call.area;
  const int64_t tiles = kl_tiles(call.images, call.classes, call.area, channels_last);
  if (call.valid != nullptr && pixels > 0) {
    cudaMemsetAsync(call.count, 0, sizeof(*call.count), stream);
    SEGFAST_LAUNCH((pixelwise_kl_count), blocks_for(pixels), kThreads, 0, stream, call.valid, pixels, call.count);
  }
  if (pixels > 0) {
    channels_last ? launch_kl<A, true>(call, stream) : launch_kl<A, false>(call, stream);
  }
  SEGFAST_LAUNCH((pixelwise_kl_finish<A>), 1, kThreads, 0, stream, call, tiles);
}

}  // namespace segfast::cuda
