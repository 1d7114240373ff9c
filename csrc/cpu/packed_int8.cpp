// Quantised inference over weights packed once, channels_last: dense and depthwise convolution, the depthwise-separable block and
// the inverted residual on uint8 maps (affine, a scale and a zero point a map) with int8 weights (symmetric, a scale an output
// channel). Every convolution gives, with s its sum of (x - x_zero) * w and bias in 32 bits, m the ratio of the scales in
// float32,
//   y = y_zero + round(clamp(float(s) * m [+ float(add - add_zero) * add_m])), halves to the even integer;
// the clamp is that of the dtype and the activation. Nothing depends on the kernel set, the tile or the thread.
//
// The zero point of x is folded into the bias, so a map is padded with it. Depthwise sums are taken in float32, in which sums of
// at most 64 products of 8 bits are exact.
#define SEGFAST_FILE "packed_int8.cpp"
#define SEGFAST_LOW
#define SEGFAST_TILES
#include "each_isa.h"
#include "fused_conv.h"
#include "product.h"

#ifndef SEGFAST_INT8_TYPES
#define SEGFAST_INT8_TYPES
namespace segfast {

// One convolution: weights as panels of words or, depthwise, floats [taps][cp]; the rest a value an output channel, padded.
struct Stage {
  const float* weight;
  const int32_t* shift;
  const float* scale;
  int64_t x_zero, y_zero;
  float low, high;  // of y - y_zero
};

struct Int8Args {
  Geometry g;
  int64_t ci, cp, kp;   // of what comes in, of the depthwise convolution (padded), of the result (padded)
  int64_t strip, tile;  // output columns a strip, pixels a tile
  bool deep;            // rows of products are read up to deep_words, at zero weights
  int64_t add_zero;
  float add_scale;
  const uint8_t *x, *add;  // add may be null
  uint8_t* y;
  Stage expand, dw, last;
};

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// Where requantised sums go: row i, columns from col on, of a map with `cols` columns, `ld` apart.
template <bool Add>
struct Bytes {
  uint8_t* to;
  int64_t ld, cols;
  const int32_t* shift;
  const float* scale;
  float low, high;
  int32_t zero;
  const uint8_t* more;  // it may lie where the results go
  float more_zero, more_scale;
  static constexpr bool clamps = true, once = Add;
  SEGFAST_INLINE I32 value(int64_t col, I32 sum, [[maybe_unused]] Vec<float> more_value) const {
    Vec<float> v = to_float(sum) * load(scale + col);
    if constexpr (Add) v = in_register(v) + in_register((more_value - more_zero) * more_scale);
    return round_to_int(clamp<float>(v, splat(low), splat(high))) + zero;
  }
  SEGFAST_INLINE Vec<float> other(int64_t i, int64_t col) const {
    if constexpr (Add) return load(more + i * ld + col);
    return Vec<float>{};
  }
  SEGFAST_INLINE void put(int64_t i, int64_t col, I32 sum) const { store(to + i * ld + col, value(col, sum, other(i, col))); }
  SEGFAST_INLINE void soon(int64_t i, int64_t col) const { prefetch_to(to + i * ld + col); }
  SEGFAST_INLINE void put_pair(int64_t i, int64_t col, I32 a, I32 b) const {
    put(i, col, a);
    put(i, col + lanes<float>, b);
  }
  SEGFAST_INLINE void put_part(int64_t i, int64_t col, I32 sum) const {
    if (col >= cols) return;
    const int left = cols - col < lanes<float> ? static_cast<int>(cols - col) : lanes<float>;
    Vec<float> added{};
    if constexpr (Add) added = load_n(more + i * ld + col, left);
    uint8_t all[lanes<float>];
    store(all, value(col, sum, added));
    for (int j = 0; j < left; ++j) to[i * ld + col + j] = all[j];
  }
  // Of a depthwise convolution: a whole number, and without the shift.
  SEGFAST_INLINE I32 whole(int64_t col, Vec<float> v) const { return to_int(v) + Dot<uint8_t>::start(shift + col); }
  SEGFAST_INLINE void operator()(int64_t i, int64_t col, Vec<float> v) const {
    if (col + lanes<float> <= cols) return put(i, col, whole(col, v));
    put_part(i, col, whole(col, v));
  }
  SEGFAST_INLINE void part(int64_t i, int64_t col, Vec<float> v) const { put_part(i, col, whole(col, v)); }
};

SEGFAST_INLINE Bytes<false> middle_bytes(const Stage& s, uint8_t* to, int64_t cp) {
  return {to, cp, cp, s.shift, s.scale, s.low, s.high, static_cast<int32_t>(s.y_zero), nullptr, 0.0f, 0.0f};
}
// f(put) for the rows of the result from `offset` on.
template <class F>
SEGFAST_INLINE void with_bytes(const Int8Args& o, int64_t offset, F f) {
  const Stage& s = o.last;
  const int64_t k = o.g.k;
  const auto zero = static_cast<int32_t>(s.y_zero);
  if (o.add) {
    return f(Bytes<true>{o.y + offset * k, k, k, s.shift, s.scale, s.low, s.high, zero, o.add + offset * k,
                         static_cast<float>(o.add_zero), o.add_scale});
  }
  f(Bytes<false>{o.y + offset * k, k, k, s.shift, s.scale, s.low, s.high, zero, nullptr, 0.0f, 0.0f});
}

// A 1 x 1 convolution without stride and padding, of whole words: pixels [begin, end).
template <class T>
void pointwise_bytes(const Int8Args& o, int64_t begin, int64_t end) {
  const Tiles tiles;
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    const bool deep = o.deep && (t1 - 1) * o.g.c + deep_words<T>(o.g.c) * 4 <= o.g.pixels() * o.g.c;
    with_bytes(o, t0, [&](const auto& put) {
      plain_product<T>(t1 - t0, o.g.c, o.x + t0 * o.g.c, o.g.c, o.last.weight, o.kp, deep, put,
                       RowsAhead<T>{o.x + t1 * o.g.c, o.g.c});
    });
  }
}

// `count` pixels of `c` bytes, `lda` apart in `to`, which keeps what it had behind each.
SEGFAST_INLINE void copy_pixels(const uint8_t* from, int64_t count, int64_t c, int64_t lda, uint8_t* to) {
  if (c == lda) {
    memcpy(to, from, static_cast<size_t>(count * c));
    return;
  }
  if (c == 3 && lda == 4) {  // an image
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t pixel =
          from[3 * i] | static_cast<uint32_t>(from[3 * i + 1]) << 8 | static_cast<uint32_t>(from[3 * i + 2]) << 16;
      memcpy(to + 4 * i, &pixel, sizeof pixel);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) memcpy(to + i * lda, from + i * c, static_cast<size_t>(c));
}

// Any dense convolution: rows [begin, end) of N * OH. The rows under the kernel are kept in a ring, padded left and right, each
// pixel with its words whole; one row more in it is nothing but padding. With `Depthwise` the pixels are of cp bytes. `patch` is
// what short_runs_product asks for.
template <class T, bool Depthwise>
void conv_bytes(const Int8Args& o, int64_t begin, int64_t end, T* ring, [[maybe_unused]] T* patch) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t lda = Depthwise ? o.cp : words<T>(g.c) * 4, slots = g.dh * (g.kh - 1) + 1, slot = (g.w + 2 * g.pw) * lda;
  memset(ring, static_cast<int>(o.last.x_zero), static_cast<size_t>((slots + 1) * slot));
  int64_t from[64], panel[64];
  const T* rows[64];
  int64_t next = 0, image = -1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.oh, iy = r % g.oh * g.sh - g.ph, bottom = iy + slots < g.h ? iy + slots : g.h;
    if (n != image) next = 0, image = n;
    next = next > iy ? next : iy;
    for (; next < bottom; ++next) {
      copy_pixels(o.x + (n * g.h + next) * g.w * g.c, g.w, g.c, lda, ring + next % slots * slot + g.pw * lda);
    }
    const auto row_of = [&](int64_t ky) {
      const int64_t y = iy + ky * g.dh;
      return (y >= 0 && y < g.h ? y % slots : slots) * slot;
    };
    if constexpr (Depthwise) {
      for (int64_t ky = 0; ky < g.kh; ++ky) rows[ky] = ring + row_of(ky);
      with_bytes(o, r * g.ow, [&](const auto& put) { depthwise_inside(g, rows, o.last.weight, o.cp, g.ow, put); });
    } else {
      int64_t parts = 0;
      const int64_t wide = g.dw == 1 ? g.kw : 1;
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        for (int64_t kx = 0; kx < g.kw; kx += wide) {
          from[parts] = row_of(ky) + kx * g.dw * lda;
          panel[parts++] = (ky * g.kw + kx) * words<T>(g.c);
        }
      }
      const Runs runs{parts, wide * words<T>(g.c), from, panel};
      for (int64_t ox = 0; ox < g.ow; ox += o.tile) {
        const int64_t stop = ox + o.tile < g.ow ? ox + o.tile : g.ow;
        with_bytes(o, r * g.ow + ox, [&](const auto& put) {
          short_runs_product(stop - ox, runs, parts, ring + ox * g.sw * lda, g.sw * lda, o.last.weight,
                             panel_rows<T>(g.c, g.kh * g.kw), o.kp, patch, put);
        });
      }
    }
  }
}

// Separable blocks and, if Expand, inverted residuals: output rows of column strips, [begin, end) of N * strips * OH. Going down
// a strip, the (expanded) rows under the kernel are kept in a ring, padded left and right; one row more is nothing but padding.
template <class T, bool Expand>
void block_bytes(const Int8Args& o, int64_t begin, int64_t end, T* ring, T* middle, T* line) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t strips = (g.ow + o.strip - 1) / o.strip, slots = g.dh * (g.kh - 1) + 1;
  const int64_t slot = ((o.strip - 1) * g.sw + g.dw * (g.kw - 1) + 1) * o.cp;
  const int64_t lda = (o.deep ? deep_words<T>(o.ci) : words<T>(o.ci)) * 4;
  const int padding = static_cast<int>(o.dw.x_zero);
  for (int64_t r = begin; r < end;) {
    const int64_t oy0 = r % g.oh, n = r / g.oh / strips, ox0 = r / g.oh % strips * o.strip;
    const int64_t oy1 = oy0 + (end - r) < g.oh ? oy0 + (end - r) : g.oh;
    const int64_t ox1 = ox0 + o.strip < g.ow ? ox0 + o.strip : g.ow, count = ox1 - ox0;
    r += oy1 - oy0;
    const int64_t left = ox0 * g.sw - g.pw, right = left + (count - 1) * g.sw + g.dw * (g.kw - 1) + 1;
    int64_t x0 = left < 0 ? 0 : left, x1 = right < g.w ? right : g.w;
    if (x0 > x1) x0 = x1 = left;  // all of it outside
    memset(ring, padding, static_cast<size_t>((slots + 1) * slot));
    int64_t next = 0;
    for (int64_t oy = oy0; oy < oy1; ++oy) {
      const int64_t iy = oy * g.sh - g.ph;
      const int64_t bottom = iy + slots < g.h ? iy + slots : g.h;
      next = next > iy ? next : iy;
      for (; next < bottom; ++next) {
        const T* from = o.x + ((n * g.h + next) * g.w + x0) * o.ci;
        T* to = ring + next % slots * slot + (x0 - left) * o.cp;
        if constexpr (Expand) {
          if (lda != o.ci) {
            copy_pixels(from, x1 - x0, o.ci, lda, line);
            from = line;
          }
          plain_product<T>(x1 - x0, o.ci, from, lda, o.expand.weight, o.cp, o.deep, middle_bytes(o.expand, to, o.cp));
        } else {
          copy_pixels(from, x1 - x0, o.ci, o.cp, to);
        }
      }
      const T* rows[64];
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        const int64_t y = iy + ky * g.dh;
        rows[ky] = ring + (y >= 0 && y < g.h ? y % slots : slots) * slot;
      }
      depthwise_inside(g, rows, o.dw.weight, o.cp, count, middle_bytes(o.dw, middle, o.cp));
      with_bytes(o, (n * g.oh + oy) * g.ow + ox0,
                 [&](const auto& put) { plain_product<T>(count, g.c, middle, o.cp, o.last.weight, o.kp, o.deep, put); });
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#else
namespace segfast {
namespace {

Counter counter("packed_int8");

using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
enum Kind : int64_t { kDense, kDepthwise, kSeparable, kInverted };
constexpr int64_t kMagic = 0x3174386970666773;
constexpr int64_t kMostDepth = 32768;  // so that sums with their bias stay within 32 bits

struct StageHeader {
  int64_t weight, shift, scale, x_zero, y_zero;  // the first three: offsets in bytes
  float low, high;
};

struct Header {
  int64_t magic, kind, bytes, ci, c, k, kh, kw;
  double y_scale;
  StageHeader expand, dw, last;
};

class Packer {
 public:
  explicit Packer(const Header& header) : h_(header) { h_.magic = kMagic, h_.bytes = (sizeof(Header) + 63) / 64 * 64; }

  void stage(StageHeader Header::* where, bool depthwise, const Tensor& weight, const Tensor& scale, const Tensor& bias,
             int64_t act, double x_scale, int64_t x_zero, double y_scale, int64_t y_zero) {
    const Tensor w = torch::stable::contiguous(weight), s = torch::stable::contiguous(scale), b = torch::stable::contiguous(bias);
    const int64_t k = w.size(0), c = w.size(1), taps = w.size(2) * w.size(3), kp = padded(k);
    const int64_t a_tap = words<uint8_t>(c), rows = panel_rows<uint8_t>(c, taps);
    const auto* values = data<int8_t>(w);
    StageHeader& stage = h_.*where;
    stage.x_zero = x_zero, stage.y_zero = y_zero;
    stage.low = static_cast<float>(act == kIdentity ? -y_zero : 0);
    const double six = act == kRelu6 ? std::nearbyint(6.0 / y_scale) : 255.0;
    stage.high = static_cast<float>(std::min<double>(255.0 - static_cast<double>(y_zero), six));
    auto* to = section<char>(stage.weight, depthwise ? taps * kp * 4 : kp * rows * 4);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t col0 = j / 32 * 32, width = std::min<int64_t>(32, kp - col0);
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t i = 0; i < c; ++i) {
          const int8_t value = values[(j * c + i) * taps + t];
          if (depthwise) {
            const auto real = static_cast<float>(value);
            memcpy(to + (t * kp + j) * 4, &real, 4);
          } else {
            const int64_t word = col0 * rows + (t * a_tap + i / 4) * width + j - col0;
            memcpy(to + word * 4 + i % 4, &value, 1);
          }
        }
      }
    }
    auto* shift = section<int32_t>(stage.shift, kp);
    for (int64_t j = 0; j < k; ++j) {
      int64_t sum = 0;
      for (int64_t i = 0; i < c * taps; ++i) sum += values[j * c * taps + i];
      const double most = 1 << 30, exact = static_cast<double>(data<float>(b)[j]) / (x_scale * data<float>(s)[j]);
      shift[j] = static_cast<int32_t>(static_cast<int64_t>(std::nearbyint(std::clamp(exact, -most, most))) - x_zero * sum);
    }
    auto* ratio = section<float>(stage.scale, kp);
    for (int64_t j = 0; j < k; ++j) ratio[j] = static_cast<float>(x_scale * data<float>(s)[j] / y_scale);
  }

  Tensor finish(const Tensor& like) {
    const Tensor out = empty({h_.bytes}, ScalarType::Byte, like);
    auto* to = data<uint8_t>(out);
    std::fill(to, to + h_.bytes, uint8_t(0));
    memcpy(to, &h_, sizeof h_);
    for (const auto& [offset, values] : sections_) memcpy(to + offset, values.data(), values.size());
    return out;
  }

 private:
  template <class T>
  T* section(int64_t& offset, int64_t n) {
    const int64_t size = n * static_cast<int64_t>(sizeof(T));
    offset = h_.bytes;
    h_.bytes += (size + 63) / 64 * 64;
    return reinterpret_cast<T*>(sections_.emplace_back(offset, std::vector<char>(size)).second.data());
  }
  Header h_;
  std::vector<std::pair<int64_t, std::vector<char> > > sections_;
};

Tensor pack_int8_cpu(std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> biases, int64_t groups,
                     std::vector<int64_t> acts, const Tensor& map_scales, std::vector<int64_t> map_zeros) {
  const char* op = "pack_int8";
  const size_t n = weights.size();
  STD_TORCH_CHECK(n >= 1 && n <= 3 && scales.size() == n && biases.size() == n && acts.size() == n && map_zeros.size() == n + 1,
                  op, ": want one to three convolutions, and a map more");
  STD_TORCH_CHECK(map_scales.is_cpu() && map_scales.scalar_type() == ScalarType::Double && map_scales.is_contiguous() &&
                      map_scales.numel() == static_cast<int64_t>(n) + 1,
                  op, ": want the scales of the maps in float64, one more than convolutions");
  const auto* map = data<double>(map_scales);
  for (size_t i = 0; i <= n; ++i) {
    STD_TORCH_CHECK(map[i] > 0 && std::isfinite(map[i]) && map_zeros[i] >= 0 && map_zeros[i] <= 255, op,
                    ": want scales > 0 and zero points from 0 to 255");
  }
  for (size_t i = 0; i < n; ++i) {
    const Tensor &w = weights[i], &s = scales[i], &b = biases[i];
    STD_TORCH_CHECK(w.is_cpu() && s.is_cpu() && b.is_cpu() && w.scalar_type() == ScalarType::Char &&
                        s.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float,
                    op, ": want int8 weights, float32 scales and biases on the CPU");
    STD_TORCH_CHECK(w.dim() == 4 && w.numel() > 0 && w.size(2) * w.size(3) <= 64 && w.numel() / w.size(0) <= kMostDepth, op,
                    ": want weights (K, C / groups, kh, kw) of at most 64 taps and 32768 values an output");
    STD_TORCH_CHECK(s.dim() == 1 && b.dim() == 1 && s.size(0) == w.size(0) && b.size(0) == w.size(0), op,
                    ": want a scale and a bias for every output channel");
    STD_TORCH_CHECK(acts[i] == kIdentity || acts[i] == kRelu || acts[i] == kRelu6, op, ": want no activation, ReLU or ReLU6");
    const Tensor kept = torch::stable::contiguous(s), bias = torch::stable::contiguous(b);
    for (int64_t j = 0; j < s.size(0); ++j) {
      STD_TORCH_CHECK(data<float>(kept)[j] > 0 && std::isfinite(data<float>(kept)[j]) && std::isfinite(data<float>(bias)[j]), op,
                      ": want weight scales > 0 and finite biases");
    }
  }
  const size_t spatial = n == 3 ? 1 : 0;
  const Tensor& w = weights[spatial];
  const bool depthwise = n > 1 || groups > 1;
  if (depthwise) {
    STD_TORCH_CHECK(w.size(1) == 1 && groups == w.size(0), op, ": want groups 1, or as many as channels in and out");
  }
  const auto plain = [&](size_t i, int64_t c) {
    STD_TORCH_CHECK(weights[i].size(1) == c && weights[i].size(2) == 1 && weights[i].size(3) == 1, op,
                    ": want 1 x 1 weights that fit the depthwise ones");
  };
  if (n > 1) plain(n - 1, groups);
  if (n == 3) {
    plain(0, weights[0].size(1));
    STD_TORCH_CHECK(weights[0].size(0) == groups, op, ": want 1 x 1 weights that fit the depthwise ones");
  }
  Packer packer({.kind = n == 3 ? kInverted : (n == 2 ? kSeparable : (depthwise ? kDepthwise : kDense)),
                 .ci = n == 3 ? weights[0].size(1) : (depthwise ? groups : w.size(1)),
                 .c = depthwise ? groups : w.size(1),
                 .k = weights[n - 1].size(0),
                 .kh = w.size(2),
                 .kw = w.size(3),
                 .y_scale = map[n]});
  for (size_t i = 0; i < n; ++i) {
    StageHeader Header::* const where = i + 1 == n ? &Header::last : (i == spatial ? &Header::dw : &Header::expand);
    packer.stage(where, depthwise && i == spatial, weights[i], scales[i], biases[i], acts[i], map[i], map_zeros[i], map[i + 1],
                 map_zeros[i + 1]);
  }
  return packer.finish(w);
}

Tensor packed_int8_cpu(const Tensor& input, const Tensor& packed, Ints shape, Ints stride, Ints padding, Ints dilation,
                       const std::optional<Tensor>& more, double add_scale, int64_t add_zero) {
  const char* op = "packed_int8";
  counter.add();
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && input.scalar_type() == ScalarType::Byte, op,
                  ": want x (N, C, H, W) in uint8 on the CPU");
  STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.numel() >= static_cast<int64_t>(sizeof(Header)),
                  op, ": want weights from pack_int8");
  const auto* bytes = data<uint8_t>(packed);
  Header h;
  memcpy(&h, bytes, sizeof h);
  STD_TORCH_CHECK(h.magic == kMagic && h.bytes == packed.numel(), op, ": want weights from pack_int8");
  STD_TORCH_CHECK(shape.size() == 3 && shape[0] == h.k && shape[1] == h.kh && shape[2] == h.kw, op,
                  ": want the shape that the weights have: output channels, rows and columns");
  for (const auto& [value, least] : {std::pair{stride, 1}, {padding, 0}, {dilation, 1}}) {
    STD_TORCH_CHECK(value.size() == 2 && value[0] >= least && value[1] >= least, op,
                    ": want pairs: stride >= 1, padding >= 0, dilation >= 1");
  }
  STD_TORCH_CHECK(input.size(1) == h.ci, op, ": want as many channels in x as the weights have");
  Int8Args o{};
  o.g = Geometry{input.size(0), h.c,       input.size(2), input.size(3), h.k,        0,           0,          h.kh,
                 h.kw,          stride[0], stride[1],     padding[0],    padding[1], dilation[0], dilation[1]};
  Geometry& g = o.g;
  const int64_t room_h = g.h + 2 * g.ph - g.dh * (g.kh - 1) - 1, room_w = g.w + 2 * g.pw - g.dw * (g.kw - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, op, ": want a kernel that fits the padded input");
  g.oh = room_h / g.sh + 1, g.ow = room_w / g.sw + 1;
  o.ci = h.ci, o.cp = padded(g.c), o.kp = padded(g.k);
  const auto stage = [&](const StageHeader& s) {
    return Stage{reinterpret_cast<const float*>(bytes + s.weight),
                 reinterpret_cast<const int32_t*>(bytes + s.shift),
                 reinterpret_cast<const float*>(bytes + s.scale),
                 s.x_zero,
                 s.y_zero,
                 s.low,
                 s.high};
  };
  o.expand = stage(h.expand), o.dw = stage(h.dw), o.last = stage(h.last);
  const Tensor x = contiguous_as(input, true), y = empty({g.n, g.k, g.oh, g.ow}, ScalarType::Byte, x, true);
  std::optional<Tensor> add;
  if (more) {
    STD_TORCH_CHECK(more->is_cpu() && more->scalar_type() == ScalarType::Byte && more->dim() == 4 && more->size(0) == g.n &&
                        more->size(1) == g.k && more->size(2) == g.oh && more->size(3) == g.ow,
                    op, ": want add of the shape and dtype of the result");
    STD_TORCH_CHECK(add_scale > 0 && std::isfinite(add_scale) && add_zero >= 0 && add_zero <= 255, op,
                    ": want a scale > 0 and a zero point from 0 to 255 of add");
    add = contiguous_as(*more, true);
    o.add = data<uint8_t>(*add), o.add_zero = add_zero, o.add_scale = static_cast<float>(add_scale / h.y_scale);
  }
  o.x = data<uint8_t>(x), o.y = data<uint8_t>(y), o.deep = isa() == Isa::amx;
  if (y.numel() == 0) return y;
  const int64_t slots = g.dh * (g.kh - 1) + 1;
  if (h.kind == kDense && g.c % 4 == 0 && g.kh * g.kw == 1 && g.sh == 1 && g.sw == 1 && g.ph == 0 && g.pw == 0) {
    o.tile = tile_pixels(g.c, 24576, 192);
    const int64_t pixels = g.pixels(), tiles = (pixels + o.tile - 1) / o.tile;
    parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      SEGFAST_TILES_OR(SEGFAST_CALL_LOW, pointwise_bytes<uint8_t>)(o, begin * o.tile, std::min(end * o.tile, pixels));
    });
    return y;
  }
  if (h.kind == kDense || h.kind == kDepthwise) {
    const bool dense = h.kind == kDense, patched = o.deep && dense && g.c % 4 != 0;
    const int64_t lda = dense ? words<uint8_t>(g.c) * 4 : o.cp;
    o.tile = tile_pixels(g.c, 24576, 192);
    parallel_for(0, g.n * g.oh, 1, [&](int64_t begin, int64_t end) {
      const Buffer<uint8_t> ring((slots + 1) * (g.w + 2 * g.pw) * lda + 64, false),
          patches(patched ? o.tile * panel_rows<uint8_t>(g.c, g.kh * g.kw) * 4 : 0);
      uint8_t* patch = patched ? patches.p : nullptr;
      if (dense) {
        SEGFAST_TILES_OR(SEGFAST_CALL_LOW, conv_bytes<uint8_t, false>)(o, begin, end, ring.p, patch);
      } else {
        SEGFAST_TILES_OR(SEGFAST_CALL_LOW, conv_bytes<uint8_t, true>)(o, begin, end, ring.p, patch);
      }
    });
    return y;
  }
  const int64_t fits = std::max<int64_t>(262144 / (slots * g.sw * o.cp), 12), strips = (g.ow + fits - 1) / fits;
  o.strip = (g.ow + strips - 1) / strips;
  const int64_t columns = (o.strip - 1) * g.sw + g.dw * (g.kw - 1) + 1;
  parallel_for(0, g.n * ((g.ow + o.strip - 1) / o.strip) * g.oh, 1, [&](int64_t begin, int64_t end) {
    const Buffer<uint8_t> ring((slots + 1) * columns * o.cp + 64, false), middle(o.strip * o.cp + 64, false),
        line(columns * deep_words<uint8_t>(o.ci) * 4 + 64, true);
    if (h.kind == kInverted) {
      SEGFAST_TILES_OR(SEGFAST_CALL_LOW, block_bytes<uint8_t, true>)(o, begin, end, ring.p, middle.p, line.p);
    } else {
      SEGFAST_TILES_OR(SEGFAST_CALL_LOW, block_bytes<uint8_t, false>)(o, begin, end, ring.p, middle.p, line.p);
    }
  });
  return y;
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("pack_int8", TORCH_BOX(&segfast::pack_int8_cpu));
  m.impl("packed_int8", TORCH_BOX(&segfast::packed_int8_cpu));
}
#endif
