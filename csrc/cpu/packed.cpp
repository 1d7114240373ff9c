// Inference over weights packed once, channels_last, float32 or bfloat16: dense (also by Winograd's filtering), grouped 1 x 1,
// depthwise and transposed convolution, the depthwise-separable block and the inverted residual, with their activations, most
// with a tensor added before the last one. Sums, biases and depthwise weights are float32; in bfloat16 the maps between the
// convolutions of a block are, and the weights of the products.
//
// A packed weight is an opaque byte tensor: Header, then sections at multiples of 64 bytes. Panels are 32 columns wide (the last
// may be 16) whatever the kernel set, so that what one set packed another can run. Their elements are words of 4 bytes: a float,
// or two bfloat16 that follow one another in depth, the last of a tap with a zero after an odd number of channels.
//
// Every output element is one sum in one order, whatever thread it falls to: results are bitwise the same on any number of
// threads. In bfloat16 on matrix tiles the rows that are left over at a tile's end are summed in the vectors' order.
#define SEGFAST_FILE "packed.cpp"
#define SEGFAST_LOW
#define SEGFAST_TILES
#include "axis.h"
#include "each_isa.h"
#include "fused_conv.h"
#include "max_class.h"
#include "max_rows.h"
#include "product.h"

#ifndef SEGFAST_PACKED_TYPES
#define SEGFAST_PACKED_TYPES
namespace segfast {

// Geometry::c is what the depthwise (or dense) convolution reads, `ci` what the expansion reads.
template <class T>
struct PackedArgs {
  Geometry g;
  int64_t ci, cp, kp;   // cp, kp: c and k padded
  int64_t lda;          // elements a row of the map between depthwise and pointwise
  int64_t strip, tile;  // output columns a strip, pixels a tile
  bool deep;            // rows of products are filled up with zeros to deep_words
  const T *x, *add;     // add may be null
  T* y;
  const T* more;   // of Winograd's: the channels from `first` on, where x has no more; null
  int64_t first;   // channels of x
  int64_t fy, fx;  // x is repeated so often, down and across
  bool planar;     // x is contiguous, N C H W: the dense convolution takes an image, and pixels of no whole number of words, so
  const float *expand, *expand_shift, *dw, *dw_shift, *pw, *pw_shift;  // expand and pw: words
  int64_t expand_act, dw_act, act;
};

// Pixels at an end of a row that are gathered at a time, of so many elements each, and room for those of up to `most` elements.
inline int64_t edge_pixels(int64_t elements) { return elements >= 4096 ? 1 : (elements <= 256 ? 16 : 4096 / elements); }
inline int64_t edge_room(int64_t most) { return most > 4096 ? most : 4096; }

// Which rows of an image a ring holds: those before `next`, as many as it has slots.
struct Held {
  int64_t image = -1, next = 0;
  // fill(y) for the rows from iy to before `bottom` that it does not hold. iy grows from call to call within an image.
  template <class F>
  void until(int64_t n, int64_t iy, int64_t bottom, F fill) {
    if (n != image) next = 0, image = n;
    for (next = next > iy ? next : iy; next < bottom; ++next) fill(next);
  }
};

}  // namespace segfast
#endif

#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// Where results go: row i, columns from col on, of a matrix with `cols` columns, `ld` apart.
//   to = act(value + more), more, if Add, of the same layout; act is a clamp to [low, high] if Clamp.
template <class T, bool Clamp, bool Add>
struct Out {
  T* to;
  int64_t ld, cols;
  const float* shift;
  int64_t act;
  float low, high;
  const T* more;  // it may lie where the results go
  static constexpr bool clamps = Clamp, once = Add;
  SEGFAST_INLINE Vec<float> value(Vec<float> v) const {
    if constexpr (Clamp) return clamp<float>(v, splat(low), splat(high));
    return activate<float>(v, act);
  }
  SEGFAST_INLINE void soon(int64_t i, int64_t col) const { prefetch_to(to + i * ld + col); }
  // The value has the shift: a product's micro-kernel adds it.
  SEGFAST_INLINE void put(int64_t i, int64_t col, Vec<float> v) const {
    if constexpr (Add) v += load(more + i * ld + col);
    store(to + i * ld + col, value(v));
  }
  SEGFAST_INLINE void put_pair(int64_t i, int64_t col, Vec<float> v, Vec<float> w) const {
    if constexpr (Add) {
      v += load(more + i * ld + col);
      w += load(more + i * ld + col + lanes<float>);
    }
    store_pair(to + i * ld + col, value(v), value(w));
  }
  SEGFAST_INLINE void put_part(int64_t i, int64_t col, Vec<float> v) const {
    if (col >= cols) return;
    const int left = static_cast<int>(cols - col);
    if constexpr (Add) v += load_n(more + i * ld + col, left);
    store_n(to + i * ld + col, value(v), left);
  }
  SEGFAST_INLINE void operator()(int64_t i, int64_t col, Vec<float> v) const { put(i, col, v + load(shift + col)); }
  SEGFAST_INLINE void part(int64_t i, int64_t col, Vec<float> v) const { put_part(i, col, v + load(shift + col)); }
};

// f(put) for the rows from `offset` on of the result, each `step` rows after the last: the kind of epilogue is chosen once a
// tile.
template <class T, class F>
SEGFAST_INLINE void with_put(T* to, const T* add, int64_t offset, int64_t k, const float* shift, int64_t act, F f,
                             int64_t step = 1) {
  const float low = low_of<float>(act), high = high_of<float>(act);
  const int64_t ld = k * step;
  to += offset * k;
  if (add) {
    if (is_clamp(act)) return f(Out<T, true, true>{to, ld, k, shift, act, low, high, add + offset * k});
    return f(Out<T, false, true>{to, ld, k, shift, act, low, high, add + offset * k});
  }
  if (is_clamp(act)) return f(Out<T, true, false>{to, ld, k, shift, act, low, high, nullptr});
  f(Out<T, false, false>{to, ld, k, shift, act, low, high, nullptr});
}
// The map between two convolutions: `cols` columns, `ld` apart.
template <class T, class F>
SEGFAST_INLINE void with_middle(T* to, int64_t ld, int64_t cols, const float* shift, int64_t act, F f) {
  const float low = low_of<float>(act), high = high_of<float>(act);
  if (is_clamp(act)) return f(Out<T, true, false>{to, ld, cols, shift, act, low, high, nullptr});
  f(Out<T, false, false>{to, ld, cols, shift, act, low, high, nullptr});
}

// Depthwise convolution and pointwise product over tiles of output pixels [begin, end); `buffer` [tile][lda] is zero before.
template <class T>
void separable_tiles(const PackedArgs<T>& o, int64_t begin, int64_t end, T* buffer) {
  const Tiles tiles;
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    with_middle(buffer, o.lda, o.g.c, o.dw_shift, o.dw_act, [&](const auto& middle) {
      each_row(o.g, t0, t1, [&](int64_t n, int64_t oy, int64_t ox0, int64_t ox1, int64_t offset) {
        depthwise_row(o.g, o.x, o.dw, o.cp, n, oy, ox0, ox1, offset, middle);
      });
    });
    with_put(o.y, o.add, t0, o.g.k, o.pw_shift, o.act, [&](const auto& put) {
      plain_product(t1 - t0, o.g.c, buffer, o.lda, o.pw, o.kp, o.deep, put, DepthwiseAhead<T>(o.g, o.x, t1));
    });
  }
}

// A depthwise convolution alone: rows [begin, end) of N * OH.
template <class T>
void depthwise_rows(const PackedArgs<T>& o, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    with_put(o.y, o.add, r * o.g.ow, o.g.c, o.dw_shift, o.act, [&](const auto& put) {
      depthwise_row(o.g, o.x, o.dw, o.cp, r / o.g.oh, r % o.g.oh, int64_t{0}, o.g.ow, int64_t{0}, put);
    });
  }
}

// Rows of c elements to rows of lda; what is behind them stays.
template <class T>
SEGFAST_INLINE void spread_rows(int64_t rows, int64_t c, const T* from, T* to, int64_t lda) {
  for (int64_t i = 0; i < rows; ++i) memcpy(to + i * lda, from + i * c, c * sizeof(T));
}

// A dense 1 x 1 convolution without stride and padding, of whole words: pixels [begin, end). `buffer` [tile][lda], zero before,
// takes rows that are to be filled up; else it is empty.
template <class T>
void pointwise_tiles(const PackedArgs<T>& o, int64_t begin, int64_t end, T* buffer) {
  const Tiles tiles;
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    const T* from = o.x + t0 * o.g.c;
    if (o.lda != o.g.c) {
      spread_rows(t1 - t0, o.g.c, from, buffer, o.lda);
      from = buffer;
    }
    with_put(o.y, o.add, t0, o.g.k, o.pw_shift, o.act, [&](const auto& put) {
      plain_product(t1 - t0, o.g.c, from, o.lda, o.pw, o.kp, o.deep, put, RowsAhead<T>{o.x + t1 * o.g.c, o.g.c});
    });
  }
}

// A 1 x 1 convolution in `ci` groups, without stride and padding, of whole words: pixels [begin, end).
template <class T>
void grouped_tiles(const PackedArgs<T>& o, int64_t begin, int64_t end) {
  const Tiles tiles;
  const int64_t groups = o.ci, c = o.g.c / groups, k = o.g.k / groups, panels = o.kp * deep_words<T>(c);
  for (int64_t t0 = begin; t0 < end; t0 += o.tile) {
    const int64_t t1 = t0 + o.tile < end ? t0 + o.tile : end;
    for (int64_t group = 0; group < groups; ++group) {
      with_put(
          o.y, o.add, t0 * groups + group, k, o.pw_shift + group * o.kp, o.act,
          [&](const auto& put) {
            plain_product(t1 - t0, c, o.x + t0 * o.g.c + group * c, o.g.c, o.pw + group * panels, o.kp, false, put);
          },
          groups);
    }
  }
}

// A transposed convolution whose stride is its kernel: what the pixels [x0, x1) of a row of x give in row r, of N * H * kh, of
// the result. They are one product, whose columns count (kx, k).
template <class T>
SEGFAST_INLINE void transposed_run(const PackedArgs<T>& o, int64_t r, int64_t x0, int64_t x1, T* to, const T* add,
                                   int64_t offset) {
  const Geometry& g = o.g;
  const int64_t lda = words<T>(g.c) * kPerWord<T>, panels = o.kp * deep_words<T>(g.c);
  const bool deep = o.deep && deep_words<T>(g.c) == words<T>(g.c);
  const T* x = o.x + (r / g.kh * g.w + x0) * g.c;
  with_put(to, add, offset, g.kw * g.k, o.pw_shift, o.act,
           [&](const auto& put) { plain_product(x1 - x0, g.c, x, lda, o.pw + r % g.kh * panels, o.kp, deep, put); });
}

template <class T>
void transposed_rows(const PackedArgs<T>& o, int64_t begin, int64_t end) {
  const Tiles tiles;
  for (int64_t r = begin; r < end; ++r) transposed_run(o, r, 0, o.g.w, o.y, o.add, r * o.g.w);
}

// The best classes alone of such a result: a run of pixels at a time is in `run`, [tile][kw][k].
template <class T>
void transposed_classes(const PackedArgs<T>& o, int64_t begin, int64_t end, int64_t bytes, void* classes, T* run, float* index) {
  const Tiles tiles;
  const Geometry& g = o.g;
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t x = 0; x < g.w; x += o.tile) {
      const int64_t stop = x + o.tile < g.w ? x + o.tile : g.w, pixels = (stop - x) * g.kw;
      transposed_run(o, r, x, stop, run, static_cast<const T*>(nullptr), 0);
      argmax_pixels<T, float>(run, run + pixels * g.k, 1, g.k, g.k, pixels, index);
      store_classes(index, pixels, bytes, classes, r * g.ow + x * g.kw);
    }
  }
}

// The taps of output pixel (oy, ox), [kh][kw][c], zero outside the image.
template <class T>
SEGFAST_INLINE void gather(const Geometry& g, const T* image, int64_t iy, int64_t ox, T* to) {
  for (int64_t ky = 0; ky < g.kh; ++ky) {
    const int64_t y = iy + ky * g.dh;
    for (int64_t kx = 0; kx < g.kw; ++kx, to += g.c) {
      const int64_t xx = ox * g.sw - g.pw + kx * g.dw;
      const bool inside = y >= 0 && y < g.h && xx >= 0 && xx < g.w;
      const T* from = image + y * g.w * g.c + xx * g.c;
      for (int64_t c = 0; c < g.c; ++c) to[c] = inside ? from[c] : T(0);
    }
  }
}

// Row y of an image, its pixels whole words: to [w][c], or with a zero after an odd number of channels [w][c + 1].
template <class T>
SEGFAST_INLINE void even_row(const PackedArgs<T>& o, int64_t n, int64_t y, T* to) {
  const Geometry& g = o.g;
  const int64_t even = words<T>(g.c) * kPerWord<T>;
  const int64_t step = o.planar ? 1 : g.c, plane = o.planar ? g.h * g.w : 1;
  const T* from = o.planar ? o.x + (n * g.c * g.h + y) * g.w : o.x + (n * g.h + y) * g.w * g.c;
  if (g.c == 3 && sizeof(T) == 2) {
    const auto* word = reinterpret_cast<const uint16_t*>(from);
    for (int64_t x = 0; x < g.w; ++x) {
      const uint64_t a = word[x * step], b = word[x * step + plane], c = word[x * step + 2 * plane];
      const uint64_t pixel = a | b << 16 | c << 32;
      memcpy(to + 4 * x, &pixel, sizeof pixel);
    }
    return;
  }
  if (g.c == 3 && even == 3 && step == 1) {
    const T *red = from, *green = from + plane, *blue = from + 2 * plane;
    for (int64_t x = 0; x < g.w; ++x) {
      to[3 * x] = red[x];
      to[3 * x + 1] = green[x];
      to[3 * x + 2] = blue[x];
    }
    return;
  }
  for (int64_t x = 0; x < g.w; ++x) {
    for (int64_t c = 0; c < g.c; ++c) to[x * even + c] = from[x * step + c * plane];
    if (even > g.c) to[x * even + g.c] = T(0);
  }
}

// A dense convolution of pixels that are no whole number of words, or of an image's planes: rows [begin, end) of N * OH. The rows
// under the kernel are kept in a ring, zero before the first call, as in inverted_rows, between as many zero pixels as the kernel
// reaches out; a later call's rows come after those of the one before. `patch` is what short_runs_product asks for.
template <class T>
void odd_rows(const PackedArgs<T>& o, int64_t begin, int64_t end, T* ring, T* patch, Held& held) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t even = words<T>(g.c) * kPerWord<T>, slots = g.dh * (g.kh - 1) + 1, slot = (g.w + 2 * g.pw) * even;
  int64_t from[64], panel[64];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.oh, iy = r % g.oh * g.sh - g.ph;
    held.until(n, iy, iy + slots < g.h ? iy + slots : g.h,
               [&](int64_t y) { even_row(o, n, y, ring + y % slots * slot + g.pw * even); });
    int64_t parts = 0;
    const int64_t wide = g.dw == 1 ? g.kw : 1;
    for (int64_t ky = 0; ky < g.kh; ++ky) {
      const int64_t y = iy + ky * g.dh;
      if (y < 0 || y >= g.h) continue;
      for (int64_t kx = 0; kx < g.kw; kx += wide) {
        from[parts] = y % slots * slot + kx * g.dw * even;
        panel[parts++] = (ky * g.kw + kx) * words<T>(g.c);
      }
    }
    const Runs runs{parts, wide * words<T>(g.c), from, panel};
    for (int64_t ox = 0; ox < g.ow; ox += o.tile) {
      const int64_t stop = ox + o.tile < g.ow ? ox + o.tile : g.ow;
      with_put(o.y, o.add, r * g.ow + ox, g.k, o.pw_shift, o.act, [&](const auto& put) {
        short_runs_product(stop - ox, runs, g.kh * ((g.kw + wide - 1) / wide), ring + ox * g.sw * even, g.sw * even, o.pw,
                           panel_rows<T>(g.c, g.kh * g.kw), o.kp, patch, put);
      });
    }
  }
}

// A dense convolution: rows [begin, end) of N * OH. The taps are part of the product's depth: where all of a pixel's columns lie
// inside, its values are read where they are, else (the ends of a row) from a copy `patch` with zeros outside, [kh * kw * c] for
// each of edge_pixels.
template <class T>
void dense_rows(const PackedArgs<T>& o, int64_t begin, int64_t end, T* patch) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t line = g.w * g.c, total = g.kh * g.kw * g.c, rows = panel_rows<T>(g.c, g.kh * g.kw);
  const int64_t reach = (g.kw - 1) * g.dw;
  int64_t first = (g.pw + g.sw - 1) / g.sw, last = g.w - 1 - reach + g.pw < 0 ? 0 : (g.w - 1 - reach + g.pw) / g.sw + 1;
  first = first < g.ow ? first : g.ow;
  last = last < first ? first : (last < g.ow ? last : g.ow);
  const int64_t zero = 0, edge = edge_pixels(total);
  const Runs all{1, words<T>(total), &zero, &zero};
  int64_t from[64], panel[64];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.oh, iy = r % g.oh * g.sh - g.ph;
    const T* image = o.x + n * g.h * line;
    int64_t parts = 0;
    const int64_t wide = g.dw == 1 ? g.kw : 1;  // taps side by side are one run
    for (int64_t ky = 0; ky < g.kh; ++ky) {
      const int64_t y = iy + ky * g.dh;
      if (y < 0 || y >= g.h) continue;
      for (int64_t kx = 0; kx < g.kw; kx += wide) {
        from[parts] = y * line + kx * g.dw * g.c;
        panel[parts++] = words<T>((ky * g.kw + kx) * g.c);
      }
    }
    const Runs runs{parts, words<T>(wide * g.c), from, panel};
    const auto pixels = [&](int64_t ox0, int64_t ox1) {
      with_put(o.y, o.add, r * g.ow + ox0, g.k, o.pw_shift, o.act, [&](const auto& put) {
        runs_product(ox1 - ox0, runs, image + (ox0 * g.sw - g.pw) * g.c, g.sw * g.c, o.pw, rows, o.kp, put);
      });
    };
    for (int64_t ox = first; ox < last; ox += o.tile) pixels(ox, ox + o.tile < last ? ox + o.tile : last);
    const auto edges = [&](int64_t ox0, int64_t ox1) {
      for (int64_t ox = ox0; ox < ox1; ox += edge) {
        const int64_t count = ox + edge < ox1 ? edge : ox1 - ox;
        for (int64_t i = 0; i < count; ++i) gather(g, image, iy, ox + i, patch + i * total);
        with_put(o.y, o.add, r * g.ow + ox, g.k, o.pw_shift, o.act,
                 [&](const auto& put) { runs_product(count, all, patch, total, o.pw, rows, o.kp, put); });
      }
    };
    edges(0, first);
    edges(last, g.ow);
  }
}

// Any other transposed convolution: rows [begin, end) of N * OH. Row oy of the result reads those rows iy of x, and column ox
// those columns ix, for which oy + ph = iy sh + ky dh and ox + pw = ix sw + kx dw. So the pixels of every sw-th column are a
// convolution of neighbours, whose taps are a part of the kernel. `patch` is dense_rows's.
template <class T>
void overlapping_rows(const PackedArgs<T>& o, int64_t begin, int64_t end, T* patch) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t line = g.w * g.c, rows = panel_rows<T>(g.c, g.kh * g.kw);
  int64_t from[64], panel[64], at[64], source[64], column[64];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.oh, oy = r % g.oh;
    const T* image = o.x + n * g.h * line;
    for (int64_t ox = 0; ox < g.sw && ox < g.ow; ++ox) {
      const int64_t count = (g.ow - ox + g.sw - 1) / g.sw;  // of its pixels
      int64_t parts = 0, first = 0, last = count;           // those pixels whose taps all lie inside
      for (int64_t ky = 0; ky < g.kh; ++ky) {
        const int64_t down = oy + g.ph - ky * g.dh;
        if (down < 0 || down % g.sh != 0 || down / g.sh >= g.h) continue;
        for (int64_t kx = 0; kx < g.kw; ++kx) {
          const int64_t across = ox + g.pw - kx * g.dw;
          if (across % g.sw != 0) continue;
          const int64_t left = across / g.sw;
          first = first > -left ? first : -left;
          last = last < g.w - left ? last : g.w - left;
          source[parts] = down / g.sh * line, column[parts] = left;
          from[parts] = source[parts] + left * g.c, at[parts] = parts * g.c;
          panel[parts++] = (ky * g.kw + kx) * words<T>(g.c);
        }
      }
      first = first < count ? first : count;
      last = last > first ? last : first;
      const auto pixels = [&](int64_t j, const Runs& runs, int64_t rows_of_a, const T* a, int64_t row) {
        with_put(
            o.y, o.add, r * g.ow + ox + j * g.sw, g.k, o.pw_shift, o.act,
            [&](const auto& put) { runs_product(rows_of_a, runs, a, row, o.pw, rows, o.kp, put); }, g.sw);
      };
      for (int64_t j = first; j < last; j += o.tile) {
        pixels(j, Runs{parts, words<T>(g.c), from, panel}, j + o.tile < last ? o.tile : last - j, image + j * g.c, g.c);
      }
      const int64_t total = parts * g.c, most = edge_pixels(total);
      const auto edges = [&](int64_t j0, int64_t j1) {
        for (int64_t j = j0; j < j1; j += most) {
          const int64_t some = j + most < j1 ? most : j1 - j;
          for (int64_t i = 0; i < some; ++i) {
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t x = j + i + column[part];
              T* const to = patch + i * total + part * g.c;
              const T* const value = image + source[part] + x * g.c;
              for (int64_t c = 0; c < g.c; ++c) to[c] = x >= 0 && x < g.w ? value[c] : T(0);
            }
          }
          pixels(j, Runs{parts, words<T>(g.c), at, panel}, some, patch, total);
        }
      };
      edges(0, first);
      edges(last, count);
    }
  }
}

// Either of them.
template <class T>
void dense_or_odd_rows(const PackedArgs<T>& o, bool odd, int64_t begin, int64_t end, T* rows, T* patch, Held& held) {
  if (odd) {
    odd_rows(o, begin, end, rows, patch, held);
  } else {
    dense_rows(o, begin, end, rows);
  }
}

// A dense convolution whose rows go to max-pooling at once: rows [begin, end) of N * the rows of y. `band` holds the rows of the
// convolution that `together` rows of y need; what the next ones need too is kept. `ring` and `patch` are odd_rows's, or
// dense_rows's.
template <class T>
void pooled_rows(const PackedArgs<T>& o, const Windows& p, int64_t rows, int64_t columns, int64_t together, bool odd,
                 int64_t begin, int64_t end, T* y, T* band, T* ring, T* patch) {
  const int64_t line = p.width * p.channels;
  int64_t image = -1, first = 0, last = 0;  // the rows in the band
  Held held;
  for (int64_t r = begin; r < end;) {
    const int64_t n = r / rows, top = r % rows;
    int64_t stop = top + together < rows ? top + together : rows;
    if (stop - top > end - r) stop = top + end - r;
    const int64_t from = p.first(top), to = p.last(stop - 1);
    if (n != image || from >= last) {
      last = from;
    } else {
      memmove(band, band + (from - first) * line, (last - from) * line * sizeof(T));
    }
    image = n, first = from;
    if (last < to) {
      PackedArgs<T> part = o;
      part.y = band - (n * p.height + first) * line;
      dense_or_odd_rows(part, odd, n * p.height + last, n * p.height + to, ring, patch, held);
      last = to;
    }
    for (int64_t row = top; row < stop; ++row, ++r) max_row(p, band - first * line, row, columns, y + r * columns * p.channels);
  }
}

// The rows of a ring that lie under the kernel at row iy of the image; null outside it.
template <class T>
SEGFAST_INLINE void under_kernel(const Geometry& g, int64_t iy, const T* ring, int64_t slot, const T** rows) {
  const int64_t slots = g.dh * (g.kh - 1) + 1;
  for (int64_t ky = 0; ky < g.kh; ++ky) {
    const int64_t y = iy + ky * g.dh;
    rows[ky] = y >= 0 && y < g.h ? ring + y % slots * slot : nullptr;
  }
}

// A dense convolution `s` and the separable block o that alone reads it: rows [begin, end) of N * OH. Its rows under the kernel
// of the block are kept in a ring, zero before, as in inverted_rows; each is computed once, but for the first ones of a range.
template <class T>
void conv_separable_rows(const PackedArgs<T>& s, const PackedArgs<T>& o, bool odd, int64_t begin, int64_t end, T* ring, T* middle,
                         T* gathered, T* patch) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t slots = g.dh * (g.kh - 1) + 1, slot = (g.w + 2 * g.pw) * g.c;
  Held held, inputs;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n = r / g.oh, iy = r % g.oh * g.sh - g.ph;
    held.until(n, iy, iy + slots < g.h ? iy + slots : g.h, [&](int64_t y) {
      PackedArgs<T> part = s;
      const int64_t row = n * g.h + y;
      part.y = ring + y % slots * slot + (g.pw - row * g.w) * g.c;
      dense_or_odd_rows(part, odd, row, row + 1, gathered, patch, inputs);
    });
    const T* rows[64];
    under_kernel(g, iy, ring, slot, rows);
    for (int64_t ox = 0; ox < g.ow; ox += o.tile) {
      const int64_t count = ox + o.tile < g.ow ? o.tile : g.ow - ox;
      with_middle(middle, o.lda, g.c, o.dw_shift, o.dw_act,
                  [&](const auto& put) { depthwise_inside(g, rows, o.dw, g.c, count, put); });
      with_put(o.y, o.add, r * g.ow + ox, g.k, o.pw_shift, o.act,
               [&](const auto& put) { plain_product(count, g.c, middle, o.lda, o.pw, o.kp, o.deep, put); });
      for (int64_t ky = 0; ky < g.kh; ++ky) rows[ky] += rows[ky] ? o.tile * g.sw * g.c : 0;
    }
  }
}

// Inverted residuals: output rows of column strips, [begin, end) of N * strips * OH. Going down a strip, the expanded rows under
// the kernel are kept in a ring (row iy in slot iy % (dh * (kh - 1) + 1)) with columns of zeros where the strip leaves the image:
// each expanded value is computed once, but for the columns that two strips share and the first rows of a range. `line`, zero
// before, takes a row of x whose pixels are to be filled up.
template <class T>
void inverted_rows(const PackedArgs<T>& o, int64_t begin, int64_t end, T* ring, T* middle, T* line) {
  const Tiles tiles;
  const Geometry& g = o.g;
  const int64_t strips = (g.ow + o.strip - 1) / o.strip, slots = g.dh * (g.kh - 1) + 1;
  const int64_t slot = ((o.strip - 1) * g.sw + g.dw * (g.kw - 1) + 1) * o.cp;
  const int64_t lda = (o.deep ? deep_words<T>(o.ci) : words<T>(o.ci)) * kPerWord<T>;
  for (int64_t r = begin; r < end;) {
    const int64_t oy0 = r % g.oh, n = r / g.oh / strips, ox0 = r / g.oh % strips * o.strip;
    const int64_t oy1 = oy0 + (end - r) < g.oh ? oy0 + (end - r) : g.oh;
    const int64_t ox1 = ox0 + o.strip < g.ow ? ox0 + o.strip : g.ow, count = ox1 - ox0;
    r += oy1 - oy0;
    const int64_t left = ox0 * g.sw - g.pw, right = left + (count - 1) * g.sw + g.dw * (g.kw - 1) + 1;
    int64_t x0 = left < 0 ? 0 : left, x1 = right < g.w ? right : g.w;
    if (x0 > x1) x0 = x1 = left;  // all of it outside
    for (int64_t s = 0; s < slots; ++s) {
      T* to = ring + s * slot;
      for (int64_t i = 0; i < (x0 - left) * o.cp; ++i) to[i] = T(0);
      for (int64_t i = (x1 - left) * o.cp; i < (right - left) * o.cp; ++i) to[i] = T(0);
    }
    Held held;
    for (int64_t oy = oy0; oy < oy1; ++oy) {
      const int64_t iy = oy * g.sh - g.ph;
      held.until(n, iy, iy + slots < g.h ? iy + slots : g.h, [&](int64_t next) {
        const T* from = o.x + ((n * g.h + next) * g.w + x0) * o.ci;
        if (lda != o.ci) {
          spread_rows(x1 - x0, o.ci, from, line, lda);
          from = line;
        }
        with_middle(ring + next % slots * slot + (x0 - left) * o.cp, o.cp, o.cp, o.expand_shift, o.expand_act,
                    [&](const auto& put) {
                      plain_product(x1 - x0, o.ci, from, lda, o.expand, o.cp, o.deep, put,
                                    RowsAhead<T>{o.x + ((n * g.h + next + 1) * g.w + x0) * o.ci, o.ci});
                    });
      });
      const T* rows[64];
      under_kernel(g, iy, ring, slot, rows);
      with_middle(middle, o.lda, o.cp, o.dw_shift, o.dw_act,
                  [&](const auto& put) { depthwise_inside(g, rows, o.dw, o.cp, count, put); });
      with_put(o.y, o.add, (n * g.oh + oy) * g.ow + ox0, g.k, o.pw_shift, o.act,
               [&](const auto& put) { plain_product(count, g.c, middle, o.lda, o.pw, o.kp, o.deep, put); });
    }
  }
}

}  // namespace segfast::SEGFAST_ISA
#endif
#include "taps.h"
#include "winograd.h"
#ifndef SEGFAST_KERNELS
namespace segfast {
namespace {

Counter conv_counter("packed_conv"), winograd_counter("packed_winograd"), transpose_counter("packed_conv_transpose"),
    classes_counter("packed_conv_transpose_argmax"), overlap_counter("packed_conv_transpose_overlap"),
    pool_counter("packed_conv_pool"), first_counter("packed_conv_ds_conv"), ds_counter("packed_ds_conv"),
    chain_counter("packed_ds_conv_chain"), inverted_counter("packed_inverted_residual");

using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
enum Kind : int64_t { kDense, kDepthwise, kSeparable, kInverted, kWinograd, kTransposed, kOverlapping, kGrouped };
constexpr int64_t kWinogradBytes = 524288;  // of the input tiles at a time, most of L2
constexpr int64_t kMagic = 0x3276636b70666773;

struct Header {
  int64_t magic, kind, bfloat16, bytes, ci, c, k, kh, kw;
  int64_t expand, expand_shift, dw, dw_shift, pw, pw_shift;  // offsets in bytes
};

// The kernels of a dtype: those of bfloat16 have a kernel set more.
#define SEGFAST_PACKED_CALL(T, kernel, ...)                              \
  do {                                                                   \
    if constexpr (std::is_same_v<T, BFloat16>) {                         \
      SEGFAST_TILES_OR(SEGFAST_CALL_LOW, kernel<BFloat16>)(__VA_ARGS__); \
    } else {                                                             \
      SEGFAST_CALL(kernel<float>)(__VA_ARGS__);                          \
    }                                                                    \
  } while (false)

// Pixels a tile of a product, whole blocks of matrix tiles where there are any.
template <class T>
int64_t product_pixels(int64_t bytes_a_pixel, int64_t bytes, int64_t most) {
  const int64_t pixels = tile_pixels(bytes_a_pixel, bytes, most);
  return std::is_same_v<T, BFloat16> && isa() == Isa::amx ? std::max<int64_t>(pixels / 32 * 32, 32) : pixels;
}

bool is_bfloat16(const char* op, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(!dtype || *dtype == ScalarType::Float || *dtype == ScalarType::BFloat16, op, ": want float32 or bfloat16");
  return dtype && *dtype == ScalarType::BFloat16;
}

void want_weight(const char* op, const Tensor& w, const Tensor& bias, int64_t per_group) {
  STD_TORCH_CHECK(w.is_cpu() && bias.is_cpu(), op, ": want tensors on the CPU");
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float && bias.scalar_type() == ScalarType::Float, op, ": want float32 weights");
  STD_TORCH_CHECK(w.dim() == 4 && w.numel() > 0 && (per_group < 0 || w.size(1) == per_group) && w.size(2) * w.size(3) <= 64, op,
                  ": want weights (K, C / groups, kh, kw) of at most 64 taps that fit one another");
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == w.size(0), op, ": want a bias for every output channel");
}

// Lays the sections out and fills them.
class Packer {
 public:
  explicit Packer(Header header) : h_(header) { h_.magic = kMagic, h_.bytes = (sizeof(Header) + 63) / 64 * 64; }
  // Panels of [k, depth] in which d counts (ky, kx, c).
  void panels(int64_t Header::* where, int64_t Header::* shift, const Tensor& weight, const Tensor& bias) {
    const Tensor w = torch::stable::contiguous(weight);
    const int64_t k = w.size(0), c = w.size(1), taps = w.size(2) * w.size(3);
    fill(section(where, panel_words(k, c, taps)), k, c, taps,
         [&](int64_t j, int64_t i, int64_t t) { return data<float>(w)[(j * c + i) * taps + t]; });
    vector(shift, bias);
  }
  // For every group panels of [k / groups, c / groups].
  void grouped(const Tensor& weight, const Tensor& bias, int64_t groups) {
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bias);
    const int64_t k = w.size(0) / groups, c = w.size(1), words = panel_words(k, c, 1);
    float* to = section(&Header::pw, groups * words);
    for (int64_t group = 0; group < groups; ++group) {
      fill(to + group * words, k, c, 1, [&](int64_t j, int64_t i, int64_t) { return data<float>(w)[(group * k + j) * c + i]; });
    }
    float* shift = section(&Header::pw_shift, groups * padded(k));
    for (int64_t j = 0; j < groups * k; ++j) shift[j / k * padded(k) + j % k] = data<float>(b)[j];
  }
  // For every row of the kernel panels of [(kx, k), c].
  void transposed(const Tensor& weight, const Tensor& bias) {
    const Tensor w = torch::stable::contiguous(weight), b = torch::stable::contiguous(bias);
    const int64_t c = w.size(0), k = w.size(1), kh = w.size(2), kw = w.size(3), row = panel_words(kw * k, c, 1);
    float* to = section(&Header::pw, kh * row);
    for (int64_t ky = 0; ky < kh; ++ky) {
      fill(to + ky * row, kw * k, c, 1,
           [&](int64_t j, int64_t i, int64_t) { return data<float>(w)[((i * k + j % k) * kh + ky) * kw + j / k]; });
    }
    float* shift = section(&Header::pw_shift, padded(kw * k));
    for (int64_t j = 0; j < kw * k; ++j) shift[j] = data<float>(b)[j % k];
  }
  // Panels of [16][c][k]: the numbers of a tile that are multiplied with those of an input tile.
  void winograd(const Tensor& weight, const Tensor& bias) {
    const Tensor w = torch::stable::contiguous(weight);
    const int64_t k = w.size(0), c = w.size(1), kp = padded(k);
    float* to = section(&Header::pw, kp * c * 16);
    const double rows[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    for (int64_t j = 0; j < k; ++j) {
      const int64_t col0 = j / 32 * 32, width = std::min<int64_t>(32, kp - col0);
      for (int64_t i = 0; i < c; ++i) {
        const float* from = data<float>(w) + (j * c + i) * 9;
        for (int64_t y = 0; y < 4; ++y) {
          for (int64_t x = 0; x < 4; ++x) {
            double sum = 0;
            for (int64_t tap = 0; tap < 9; ++tap) sum += rows[y][tap / 3] * rows[x][tap % 3] * static_cast<double>(from[tap]);
            to[col0 * 16 * c + ((y * 4 + x) * c + i) * width + j - col0] = static_cast<float>(sum);
          }
        }
      }
    }
    vector(&Header::pw_shift, bias);
  }
  void depthwise(const Tensor& weight, const Tensor& bias) {
    const Tensor w = torch::stable::contiguous(weight);
    const int64_t c = w.size(0), taps = w.size(2) * w.size(3), cp = padded(c);
    float* to = section(&Header::dw, taps * cp);
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t t = 0; t < taps; ++t) to[t * cp + i] = data<float>(w)[i * taps + t];
    }
    vector(&Header::dw_shift, bias);
  }
  Tensor finish(const Tensor& like) {
    const Tensor out = empty({h_.bytes}, ScalarType::Byte, like);
    auto* to = data<uint8_t>(out);
    std::fill(to, to + h_.bytes, uint8_t(0));
    memcpy(to, &h_, sizeof h_);
    for (const auto& [offset, values] : sections_) memcpy(to + offset, values.data(), values.size() * sizeof(float));
    return out;
  }

 private:
  int64_t a_tap(int64_t c) const { return h_.bfloat16 ? words<BFloat16>(c) : c; }
  int64_t a_panel(int64_t c, int64_t taps) const { return h_.bfloat16 ? panel_rows<BFloat16>(c, taps) : c * taps; }
  int64_t panel_words(int64_t k, int64_t c, int64_t taps) const { return padded(k) * a_panel(c, taps); }
  // value(column, channel, tap)
  template <class F>
  void fill(float* to, int64_t k, int64_t c, int64_t taps, F value) {
    const int64_t kp = padded(k), total = a_panel(c, taps);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t col0 = j / 32 * 32, width = std::min<int64_t>(32, kp - col0);
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t i = 0; i < c; ++i) {
          const float v = value(j, i, t);
          if (h_.bfloat16) {
            const BFloat16 low(v);
            memcpy(reinterpret_cast<char*>(to + col0 * total + (t * a_tap(c) + i / 2) * width + j - col0) + i % 2 * sizeof low,
                   &low, sizeof low);
          } else {
            to[col0 * total + (t * c + i) * width + j - col0] = v;
          }
        }
      }
    }
  }
  float* section(int64_t Header::* where, int64_t n) {
    h_.*where = h_.bytes;
    h_.bytes += (n * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    return sections_.emplace_back(h_.*where, std::vector<float>(n)).second.data();
  }
  void vector(int64_t Header::* where, const Tensor& bias) {
    const Tensor b = torch::stable::contiguous(bias);
    std::copy(data<float>(b), data<float>(b) + b.size(0), section(where, padded(b.size(0))));
  }
  Header h_;
  std::vector<std::pair<int64_t, std::vector<float> > > sections_;
};

Tensor pack_conv_cpu(const Tensor& weight, const Tensor& bias, int64_t groups, std::optional<ScalarType> dtype) {
  want_weight("pack_conv", weight, bias, -1);
  const bool depthwise = groups != 1 && groups == weight.size(0) && weight.size(1) == 1;
  STD_TORCH_CHECK(
      groups == 1 || depthwise || (groups > 0 && weight.size(0) % groups == 0 && weight.size(2) == 1 && weight.size(3) == 1),
      "pack_conv: want groups 1, as many as channels in and out, or 1 x 1 weights of a part of the outputs each");
  Packer packer({.kind = depthwise     ? kDepthwise
                         : groups == 1 ? kDense
                                       : kGrouped,
                 .bfloat16 = is_bfloat16("pack_conv", dtype),
                 .ci = depthwise ? 0 : groups,
                 .c = weight.size(1) * groups,
                 .k = weight.size(0),
                 .kh = weight.size(2),
                 .kw = weight.size(3)});
  if (depthwise) {
    packer.depthwise(weight, bias);
  } else if (groups == 1) {
    packer.panels(&Header::pw, &Header::pw_shift, weight, bias);
  } else {
    packer.grouped(weight, bias, groups);
  }
  return packer.finish(weight);
}

Tensor pack_winograd_cpu(const Tensor& weight, const Tensor& bias, int64_t groups, std::optional<ScalarType> dtype) {
  want_weight("pack_winograd", weight, bias, -1);
  STD_TORCH_CHECK(groups == 1 && weight.size(2) == 3 && weight.size(3) == 3 && !is_bfloat16("pack_winograd", dtype),
                  "pack_winograd: want groups 1, weights (K, C, 3, 3) and float32");
  Packer packer({.kind = kWinograd, .c = weight.size(1), .k = weight.size(0), .kh = 3, .kw = 3});
  packer.winograd(weight, bias);
  return packer.finish(weight);
}

Tensor pack_conv_transpose_cpu(const Tensor& weight, const Tensor& bias, int64_t groups, std::optional<ScalarType> dtype) {
  const char* op = "pack_conv_transpose";
  STD_TORCH_CHECK(groups == 1 && weight.dim() == 4, op, ": want groups 1 and weights (C, K, kh, kw)");
  want_weight(op, torch::stable::transpose(weight, 0, 1), bias, -1);
  Packer packer({.kind = kTransposed,
                 .bfloat16 = is_bfloat16(op, dtype),
                 .c = weight.size(0),
                 .k = weight.size(1),
                 .kh = weight.size(2),
                 .kw = weight.size(3)});
  packer.transposed(weight, bias);
  return packer.finish(weight);
}

Tensor pack_conv_transpose_overlap_cpu(const Tensor& weight, const Tensor& bias, int64_t groups,
                                       std::optional<ScalarType> dtype) {
  const char* op = "pack_conv_transpose_overlap";
  STD_TORCH_CHECK(groups == 1 && weight.dim() == 4, op, ": want groups 1 and weights (C, K, kh, kw)");
  const Tensor turned = torch::stable::transpose(weight, 0, 1);
  want_weight(op, turned, bias, -1);
  Packer packer({.kind = kOverlapping,
                 .bfloat16 = is_bfloat16(op, dtype),
                 .c = weight.size(0),
                 .k = weight.size(1),
                 .kh = weight.size(2),
                 .kw = weight.size(3)});
  packer.panels(&Header::pw, &Header::pw_shift, turned, bias);
  return packer.finish(weight);
}

Tensor pack_ds_conv_cpu(const Tensor& dw_weight, const Tensor& dw_bias, const Tensor& pw_weight, const Tensor& pw_bias,
                        std::optional<ScalarType> dtype) {
  want_weight("pack_ds_conv", dw_weight, dw_bias, 1);
  want_weight("pack_ds_conv", pw_weight, pw_bias, dw_weight.size(0));
  STD_TORCH_CHECK(pw_weight.size(2) == 1 && pw_weight.size(3) == 1, "pack_ds_conv: want pw_weight (K, C, 1, 1)");
  Packer packer({.kind = kSeparable,
                 .bfloat16 = is_bfloat16("pack_ds_conv", dtype),
                 .c = dw_weight.size(0),
                 .k = pw_weight.size(0),
                 .kh = dw_weight.size(2),
                 .kw = dw_weight.size(3)});
  packer.depthwise(dw_weight, dw_bias);
  packer.panels(&Header::pw, &Header::pw_shift, pw_weight, pw_bias);
  return packer.finish(pw_weight);
}

Tensor pack_inverted_residual_cpu(const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& dw_weight,
                                  const Tensor& dw_bias, const Tensor& project_weight, const Tensor& project_bias,
                                  std::optional<ScalarType> dtype) {
  const char* op = "pack_inverted_residual";
  want_weight(op, expand_weight, expand_bias, -1);
  want_weight(op, dw_weight, dw_bias, 1);
  want_weight(op, project_weight, project_bias, dw_weight.size(0));
  STD_TORCH_CHECK(expand_weight.size(0) == dw_weight.size(0) && expand_weight.size(2) == 1 && expand_weight.size(3) == 1 &&
                      project_weight.size(2) == 1 && project_weight.size(3) == 1,
                  "pack_inverted_residual: want 1 x 1 weights to and from the channels of dw_weight");
  Packer packer({.kind = kInverted,
                 .bfloat16 = is_bfloat16(op, dtype),
                 .ci = expand_weight.size(1),
                 .c = dw_weight.size(0),
                 .k = project_weight.size(0),
                 .kh = dw_weight.size(2),
                 .kw = dw_weight.size(3)});
  packer.panels(&Header::expand, &Header::expand_shift, expand_weight, expand_bias);
  packer.depthwise(dw_weight, dw_bias);
  packer.panels(&Header::pw, &Header::pw_shift, project_weight, project_bias);
  return packer.finish(expand_weight);
}

// The image of a convolution: x with every pixel repeated, fy times down and fx across, and the channels of `more` behind its
// own.
struct Joined {
  std::optional<Tensor> more;
  int64_t fy = 1, fx = 1;
};

// What a packed weight begins with.
Header header_of(const char* op, const Tensor& packed, ScalarType dtype) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.numel() >= static_cast<int64_t>(sizeof(Header)),
                  op, ": want weights from the op's own pack function");
  Header h;
  memcpy(&h, data<uint8_t>(packed), sizeof h);
  STD_TORCH_CHECK(h.magic == kMagic && h.bytes == packed.numel(), op, ": want weights from the op's own pack function");
  STD_TORCH_CHECK((h.bfloat16 != 0) == (dtype == ScalarType::BFloat16), op, ": want weights packed for the dtype of x");
  return h;
}

// What the kernels get of packed weights and the geometry of their convolution (in a block, of the depthwise one) of n images of
// this size.
template <class T>
PackedArgs<T> arguments(const char* op, const Header& h, const Tensor& packed, int64_t n, int64_t height, int64_t width,
                        Ints stride, Ints padding, Ints dilation) {
  for (const auto& [value, least] : {std::pair{stride, 1}, {padding, 0}, {dilation, 1}}) {
    STD_TORCH_CHECK(value.size() == 2 && value[0] >= least && value[1] >= least, op,
                    ": want pairs: stride >= 1, padding >= 0, dilation >= 1");
  }
  PackedArgs<T> o{};
  o.g = Geometry{n,    h.c,       height,    width,      h.k,        0,           0,          h.kh,
                 h.kw, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  Geometry& g = o.g;
  if (h.kind == kTransposed) {
    STD_TORCH_CHECK(g.sh == g.kh && g.sw == g.kw && g.ph == 0 && g.pw == 0 && g.dh == 1 && g.dw == 1, op,
                    ": want the stride of the kernel, no padding and no dilation");
    g.oh = g.h * g.kh, g.ow = g.w * g.kw;
  } else if (h.kind == kOverlapping) {  // but for output_padding
    g.oh = (g.h - 1) * g.sh - 2 * g.ph + g.dh * (g.kh - 1) + 1, g.ow = (g.w - 1) * g.sw - 2 * g.pw + g.dw * (g.kw - 1) + 1;
  } else {
    const int64_t room_h = g.h + 2 * g.ph - g.dh * (g.kh - 1) - 1, room_w = g.w + 2 * g.pw - g.dw * (g.kw - 1) - 1;
    STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, op, ": want a kernel that fits the padded input");
    g.oh = room_h / g.sh + 1, g.ow = room_w / g.sw + 1;
  }
  o.deep = std::is_same_v<T, BFloat16> && isa() == Isa::amx;
  o.ci = h.ci, o.cp = o.lda = padded(g.c),
  o.kp = padded(h.kind == kTransposed ? g.k * g.kw
                : h.kind == kGrouped  ? g.k / h.ci
                                      : g.k);
  if (o.deep && (h.kind == kSeparable || h.kind == kInverted)) o.lda = deep_words<T>(g.c) * kPerWord<T>;
  const auto at = [&](int64_t offset) { return reinterpret_cast<const float*>(data<uint8_t>(packed) + offset); };
  o.expand = at(h.expand), o.expand_shift = at(h.expand_shift), o.dw = at(h.dw), o.dw_shift = at(h.dw_shift);
  o.pw = at(h.pw), o.pw_shift = at(h.pw_shift);
  return o;
}

void want_activations(const char* op, std::initializer_list<int64_t> acts) {
  for (const int64_t act : acts) STD_TORCH_CHECK(act >= kIdentity && act <= kLeakyRelu, op, ": want an activation from 0 to 5");
}

// A checked call: its tensors, and what the kernels get.
template <class T>
struct Call {
  Tensor x, y;
  std::optional<Tensor> add, more;
  PackedArgs<T> o{};
  int64_t kind;

  static constexpr ScalarType dtype = std::is_same_v<T, BFloat16> ? ScalarType::BFloat16 : ScalarType::Float;

  bool is_map(const Tensor& t, int64_t c, int64_t h, int64_t w) const {
    return t.is_cpu() && t.scalar_type() == dtype && t.dim() == 4 && t.size(0) == o.g.n && t.size(1) == c && t.size(2) == h &&
           t.size(3) == w;
  }

  Call(const char* op, const Tensor& input, const Tensor& packed, Ints stride, Ints padding, Ints dilation,
       std::initializer_list<int64_t> acts, const std::optional<Tensor>& added, const Joined& joined = {}, bool result = true)
      : x(input), y(input) {
    STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && input.scalar_type() == dtype, op,
                    ": want x (N, C, H, W) in float32 or bfloat16 on the CPU");
    const Header h = header_of(op, packed, dtype);
    kind = h.kind;
    want_activations(op, acts);
    const int64_t channels = h.kind == kInverted ? h.ci : h.c;
    const int64_t behind = joined.more ? joined.more->size(1) : 0;
    STD_TORCH_CHECK(input.size(1) + behind == channels, op, ": want as many channels in x as the weights have");
    o = arguments<T>(op, h, packed, input.size(0), input.size(2) * joined.fy, input.size(3) * joined.fx, stride, padding,
                     dilation);
    const Geometry& g = o.g;
    o.planar = kind == kDense && (g.c % kPerWord<T> != 0 || g.c == 3) && input.is_contiguous();
    if (!o.planar) x = contiguous_as(input, true);
    if (result) y = empty({g.n, g.k, g.oh, g.ow}, dtype, x, true);
    if (added) {
      STD_TORCH_CHECK(is_map(*added, g.k, g.oh, g.ow), op, ": want add of the shape and dtype of the result");
      add = contiguous_as(*added, true);
      o.add = data<T>(*add);
    }
    if (joined.more) {
      STD_TORCH_CHECK(is_map(*joined.more, behind, g.h, g.w), op, ": want more of the size and dtype of x repeated");
      more = contiguous_as(*joined.more, true);
      o.more = data<T>(*more);
    }
    o.x = data<T>(x), o.y = data<T>(y), o.first = g.c - behind, o.fy = joined.fy, o.fx = joined.fx;
  }
};

// What dense_rows, or odd_rows, needs beside the map.
template <class T>
struct Gathered {
  bool odd;
  int64_t rows, patch;  // elements
  explicit Gathered(const PackedArgs<T>& o) {
    const Geometry& g = o.g;
    const int64_t even = words<T>(g.c) * kPerWord<T>;
    odd = g.c % kPerWord<T> != 0 || o.planar;
    rows = odd ? (g.dh * (g.kh - 1) + 1) * (g.w + 2 * g.pw) * even : edge_room(g.kh * g.kw * g.c);
    patch = o.deep && g.c % kPerWord<T> != 0 ? o.tile * panel_rows<T>(g.c, g.kh * g.kw) * kPerWord<T> : 0;
  }
};

template <class T>
Tensor packed_conv(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                   const std::optional<Tensor>& add) {
  Call<T> call("packed_conv", x, packed, stride, padding, dilation, {act}, add);
  STD_TORCH_CHECK(call.kind == kDense || call.kind == kDepthwise || call.kind == kGrouped,
                  "packed_conv: want weights from pack_conv");
  PackedArgs<T>& o = call.o;
  const Geometry& g = o.g;
  o.act = act, o.tile = product_pixels<T>(g.c * sizeof(T), 65536, 192);
  const bool plain = g.sh == 1 && g.sw == 1 && g.ph == 0 && g.pw == 0;
  STD_TORCH_CHECK(call.kind != kGrouped || (plain && g.c / o.ci % kPerWord<T> == 0),
                  "packed_conv: want stride 1, no padding and, in bfloat16, an even number of channels a group");
  if (call.y.numel() == 0) return call.y;
  if (call.kind == kGrouped) {
    const int64_t pixels = g.pixels(), tiles = (pixels + o.tile - 1) / o.tile;
    parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      SEGFAST_PACKED_CALL(T, grouped_tiles, o, begin * o.tile, std::min(end * o.tile, pixels));
    });
  } else if (call.kind == kDepthwise) {
    parallel_for(0, g.n * g.oh, 1, [&](int64_t begin, int64_t end) { SEGFAST_PACKED_CALL(T, depthwise_rows, o, begin, end); });
  } else if (g.c % kPerWord<T> == 0 && !o.planar && g.kh * g.kw == 1 && plain) {
    const int64_t pixels = g.pixels(), tiles = (pixels + o.tile - 1) / o.tile;
    o.lda = o.deep ? deep_words<T>(g.c) * kPerWord<T> : g.c;
    parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> buffer(o.lda == g.c ? 0 : o.tile * o.lda);
      SEGFAST_PACKED_CALL(T, pointwise_tiles, o, begin * o.tile, std::min(end * o.tile, pixels), buffer.p);
    });
  } else {
    const Gathered<T> sizes(o);
    parallel_for(0, g.n * g.oh, 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> rows(sizes.rows, sizes.odd), patch(sizes.patch);
      Held held;
      SEGFAST_PACKED_CALL(T, dense_or_odd_rows, o, sizes.odd, begin, end, rows.p, sizes.patch ? patch.p : nullptr, held);
    });
  }
  return call.y;
}

template <class T>
Tensor packed_conv_pool(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                        const std::array<Ints, 5>& pooling) {
  const char* op = "packed_conv_pool";
  Call<T> call(op, x, packed, stride, padding, dilation, {act}, {}, {}, false);
  STD_TORCH_CHECK(call.kind == kDense, op, ": want dense weights from pack_conv");
  PackedArgs<T>& o = call.o;
  const Geometry& g = o.g;
  const Windows p = windows(op, g.k, g.oh, g.ow, pooling);
  const int64_t rows = pooling[0][0], columns = pooling[0][1];
  STD_TORCH_CHECK(rows > 0 && columns > 0 && p.first(rows - 1) < p.last(rows - 1), op, ": want windows that touch the map");
  const Tensor y = empty({g.n, g.k, rows, columns}, Call<T>::dtype, call.x, true);
  o.act = act, o.tile = product_pixels<T>(g.c * sizeof(T), 65536, 192);
  if (y.numel() == 0) return y;
  // A band of about half a megabyte, which stays in L2.
  const int64_t line = g.ow * g.k, reach = (p.kh - 1) * p.dh + 1;
  const int64_t together = std::clamp<int64_t>((524288 / (line * static_cast<int64_t>(sizeof(T))) - reach) / p.sh + 1, 1, 8);
  const Gathered<T> sizes(o);
  parallel_for(0, g.n * rows, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> gathered(sizes.rows, sizes.odd), patch(sizes.patch), band((reach + (together - 1) * p.sh) * line, false);
    SEGFAST_PACKED_CALL(T, pooled_rows, o, p, rows, columns, together, sizes.odd, begin, end, data<T>(y), band.p, gathered.p,
                        sizes.patch ? patch.p : nullptr);
  });
  return y;
}

template <class T>
Tensor packed_conv_ds_conv(const Tensor& x, const Tensor& first, Ints first_stride, Ints first_padding, Ints first_dilation,
                           int64_t first_act, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t dw_act,
                           int64_t act) {
  const char* op = "packed_conv_ds_conv";
  Call<T> call(op, x, first, first_stride, first_padding, first_dilation, {first_act, dw_act, act}, {}, {}, false);
  PackedArgs<T>& s = call.o;
  const Header h = header_of(op, packed, Call<T>::dtype);
  STD_TORCH_CHECK(
      call.kind == kDense && h.kind == kSeparable && h.c == s.g.k && h.c % kPad == 0, op,
      ": want dense weights from pack_conv, and weights from pack_ds_conv for the channels that they give, a multiple of 16");
  s.act = first_act, s.tile = product_pixels<T>(s.g.c * sizeof(T), 65536, 192);
  PackedArgs<T> o = arguments<T>(op, h, packed, s.g.n, s.g.oh, s.g.ow, stride, padding, dilation);
  const Geometry& g = o.g;
  const Tensor y = empty({g.n, g.k, g.oh, g.ow}, Call<T>::dtype, call.x, true);
  o.y = data<T>(y), o.dw_act = dw_act, o.act = act, o.tile = product_pixels<T>(o.cp * sizeof(T), 49152, 96);
  if (y.numel() == 0) return y;
  const Gathered<T> sizes(s);
  const int64_t ring = (g.dh * (g.kh - 1) + 1) * (g.w + 2 * g.pw) * g.c;
  parallel_for(0, g.n * g.oh, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> gathered(sizes.rows, sizes.odd), patch(sizes.patch), rows(ring), middle(o.tile * o.lda, o.deep);
    SEGFAST_PACKED_CALL(T, conv_separable_rows, s, o, sizes.odd, begin, end, rows.p, middle.p, gathered.p,
                        sizes.patch ? patch.p : nullptr);
  });
  return y;
}

template <class T>
Tensor packed_conv_transpose(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                             const std::optional<Tensor>& add) {
  Call<T> call("packed_conv_transpose", x, packed, stride, padding, dilation, {act}, add);
  STD_TORCH_CHECK(call.kind == kTransposed, "packed_conv_transpose: want weights from pack_conv_transpose");
  PackedArgs<T>& o = call.o;
  STD_TORCH_CHECK(o.g.c % kPerWord<T> == 0, "packed_conv_transpose: want an even number of channels in bfloat16");
  o.act = act;
  if (call.y.numel() == 0) return call.y;
  parallel_for(0, o.g.n * o.g.h * o.g.kh, 1,
               [&](int64_t begin, int64_t end) { SEGFAST_PACKED_CALL(T, transposed_rows, o, begin, end); });
  return call.y;
}

template <class T>
Tensor packed_conv_transpose_overlap(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation,
                                     Ints output_padding, int64_t act) {
  const char* op = "packed_conv_transpose_overlap";
  Call<T> call(op, x, packed, stride, padding, dilation, {act}, {}, {}, false);
  STD_TORCH_CHECK(call.kind == kOverlapping, op, ": want weights from pack_conv_transpose_overlap");
  PackedArgs<T>& o = call.o;
  Geometry& g = o.g;
  STD_TORCH_CHECK(g.c % kPerWord<T> == 0, op, ": want an even number of channels in bfloat16");
  STD_TORCH_CHECK(output_padding.size() == 2 && output_padding[0] >= 0 && output_padding[1] >= 0, op,
                  ": want two numbers of output_padding, 0 or more");
  g.oh += output_padding[0], g.ow += output_padding[1];
  STD_TORCH_CHECK(g.h > 0 && g.w > 0 && g.oh > 0 && g.ow > 0, op, ": want a map that leaves some of the result");
  const Tensor y = empty({g.n, g.k, g.oh, g.ow}, Call<T>::dtype, call.x, true);
  o.y = data<T>(y), o.act = act, o.tile = product_pixels<T>(g.c * sizeof(T), 65536, 192);
  if (y.numel() == 0) return y;
  parallel_for(0, g.n * g.oh, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> patch(edge_room(g.kh * g.kw * g.c), false);
    SEGFAST_PACKED_CALL(T, overlapping_rows, o, begin, end, patch.p);
  });
  return y;
}

template <class T>
Tensor packed_conv_transpose_argmax(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                                    int64_t bytes) {
  const char* op = "packed_conv_transpose_argmax";
  Call<T> call(op, x, packed, stride, padding, dilation, {act}, {}, {}, false);
  STD_TORCH_CHECK(call.kind == kTransposed, op, ": want weights from pack_conv_transpose");
  PackedArgs<T>& o = call.o;
  const Geometry& g = o.g;
  STD_TORCH_CHECK(g.c % kPerWord<T> == 0, op, ": want an even number of channels in bfloat16");
  const Tensor classes = empty({g.n, g.oh, g.ow}, integer_of(op, bytes), call.x);
  o.act = act, o.tile = product_pixels<T>(g.kw * g.k * sizeof(T), 24576, 192);
  if (classes.numel() == 0) return classes;
  parallel_for(0, g.n * g.h * g.kh, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> run(o.tile * g.kw * g.k, false);
    const Buffer<float> index(o.tile * g.kw, false);
    SEGFAST_PACKED_CALL(T, transposed_classes, o, begin, end, bytes, classes.data_ptr(), run.p, index.p);
  });
  return classes;
}

Tensor packed_winograd(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                       const std::optional<Tensor>& add, const std::optional<Tensor>& more, Ints repeat) {
  STD_TORCH_CHECK(repeat.size() == 2 && repeat[0] > 0 && repeat[1] > 0, "packed_winograd: want two factors of 1 and more");
  STD_TORCH_CHECK(!more || more->dim() == 4, "packed_winograd: want more (N, C, H, W)");
  Call<float> call("packed_winograd", x, packed, stride, padding, dilation, {act}, add, {more, repeat[0], repeat[1]});
  STD_TORCH_CHECK(call.kind == kWinograd, "packed_winograd: want weights from pack_winograd");
  PackedArgs<float>& o = call.o;
  STD_TORCH_CHECK(o.g.sh == 1 && o.g.sw == 1, "packed_winograd: want stride 1");
  o.act = act, o.tile = std::clamp<int64_t>(kWinogradBytes / (64 * o.cp) / 12 * 12, 12, kMostTiles);
  if (call.y.numel() == 0) return call.y;
  const int64_t count = winograd_count(o.g), blocks = (count + o.tile - 1) / o.tile;
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> inputs(16 * o.tile * o.cp, false), sums(16 * o.tile * 32, false), zero(o.cp);
    SEGFAST_CALL(winograd_tiles<float>)(o, begin * o.tile, std::min(end * o.tile, count), inputs.p, sums.p, zero.p);
  });
  return call.y;
}

template <class T>
Tensor packed_ds_conv(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t dw_act,
                      int64_t act, const std::optional<Tensor>& add) {
  Call<T> call("packed_ds_conv", x, packed, stride, padding, dilation, {dw_act, act}, add);
  STD_TORCH_CHECK(call.kind == kSeparable, "packed_ds_conv: want weights from pack_ds_conv");
  PackedArgs<T>& o = call.o;
  o.dw_act = dw_act, o.act = act, o.tile = product_pixels<T>(o.cp * sizeof(T), 49152, 96);
  if (call.y.numel() == 0) return call.y;
  const int64_t pixels = o.g.pixels(), tiles = (pixels + o.tile - 1) / o.tile;
  parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> buffer(o.tile * o.lda, o.deep || o.g.c % kPerWord<T> != 0);
    SEGFAST_PACKED_CALL(T, separable_tiles, o, begin * o.tile, std::min(end * o.tile, pixels), buffer.p);
  });
  return call.y;
}

// A separable block between what may come before and after it, a band of rows at a time: before it, added to its sums, the part
// of its result that an enlarged map gives (taps.h), behind it a 1 x 1 convolution. Neither is written whole.
template <class T>
Tensor packed_ds_conv_chain(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t dw_act,
                            int64_t act, const std::optional<Tensor>& low, bool align_corners, const std::optional<Tensor>& last,
                            int64_t last_act) {
  const char* op = "packed_ds_conv_chain";
  Call<T> call(op, x, packed, stride, padding, dilation, {dw_act, act, last_act}, {}, {}, !last);
  STD_TORCH_CHECK(call.kind == kSeparable, op, ": want weights from pack_ds_conv");
  PackedArgs<T>& o = call.o;
  const Geometry& g = o.g;
  o.dw_act = dw_act, o.act = act, o.tile = product_pixels<T>(o.cp * sizeof(T), 49152, 96);
  PackedArgs<T> behind{};
  if (last) {
    const Header h = header_of(op, *last, Call<T>::dtype);
    STD_TORCH_CHECK(h.kind == kDense && h.kh * h.kw == 1 && h.c == g.k && g.k % kPerWord<T> == 0, op,
                    ": want last from pack_conv, 1 x 1, with an even number of inputs, those that the block gives");
    const std::array<int64_t, 2> one{1, 1}, zero{0, 0};
    behind = arguments<T>(op, h, *last, g.n, g.oh, g.ow, one, zero, one);
    behind.lda = o.deep ? deep_words<T>(g.k) * kPerWord<T> : g.k;
    behind.act = last_act, behind.tile = product_pixels<T>(g.k * sizeof(T), 65536, 192);
    call.y = empty({g.n, h.k, g.oh, g.ow}, Call<T>::dtype, call.x, true);
    behind.y = data<T>(call.y);
  }
  if (call.y.numel() == 0) return call.y;
  Tensor z = call.x;
  Taps taps{};
  std::optional<Axis> down, across;
  std::optional<Weights<float> > by_row, by_column;
  if (low) {
    STD_TORCH_CHECK((std::is_same_v<T, float>) && low->is_cpu() && low->scalar_type() == ScalarType::Float && low->dim() == 4 &&
                        low->numel() > 0 && low->size(0) == g.n && low->size(1) == g.kh * g.kw * g.k && g.k % 16 == 0 &&
                        g.kh <= kMostTaps && g.kw <= kMostTaps && g.sh * g.sw * g.dh * g.dw == 1,
                    op, ": want low (N, kh kw K, h, w) in float32, K a multiple of 16, stride 1 and dilation 1");
    z = contiguous_as(*low, true);
    down.emplace(z.size(2), g.h, align_corners, ScalarType::Float), by_row.emplace(*down);
    across.emplace(z.size(3), g.w, align_corners, ScalarType::Float), by_column.emplace(*across);
    taps = {data<float>(z),
            z.size(2),
            z.size(3),
            g.k,
            down->i0.data(),
            down->i1.data(),
            across->i0.data(),
            across->i1.data(),
            by_row->w0.data(),
            by_row->w1.data(),
            by_column->w0.data(),
            by_column->w1.data()};
  }
  // A band has enough pixels for whole tiles of both products and stays in L2.
  const int64_t rows = g.n * g.oh, band = std::clamp<int64_t>(192 / g.ow, 1, rows), bands = (rows + band - 1) / band;
  parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> buffer(o.tile * o.lda, o.deep || g.c % kPerWord<T> != 0), line(low ? taps.w * g.kw * g.k : 0, false);
    const Buffer<T> base(low ? band * g.ow * g.k : 0, false), middle(last ? band * g.ow * g.k : 0, false);
    const Buffer<T> spread(last && behind.lda != g.k ? behind.tile * behind.lda : 0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t r0 = b * band, r1 = std::min(r0 + band, rows), pixels = (r1 - r0) * g.ow;
      PackedArgs<T> part = o;
      const int64_t first = r0 * g.ow;  // buffers begin at this pixel
      if constexpr (std::is_same_v<T, float>) {
        if (low) {
          for (int64_t r = r0; r < r1; ++r) {
            SEGFAST_CALL(taps_row<float>)(taps, g, r / g.oh, r % g.oh, line.p, base.p + (r - r0) * g.ow * g.k);
          }
          part.add = base.p - first * g.k;
        }
      }
      if (last) part.y = middle.p - first * g.k;
      SEGFAST_PACKED_CALL(T, separable_tiles, part, first, first + pixels, buffer.p);
      if (last) {
        PackedArgs<T> next = behind;
        next.x = middle.p - first * g.k;
        SEGFAST_PACKED_CALL(T, pointwise_tiles, next, first, first + pixels, spread.p);
      }
    }
  });
  return call.y;
}

template <class T>
Tensor packed_inverted_residual(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation,
                                int64_t expand_act, int64_t dw_act, int64_t act, const std::optional<Tensor>& add) {
  Call<T> call("packed_inverted_residual", x, packed, stride, padding, dilation, {expand_act, dw_act, act}, add);
  STD_TORCH_CHECK(call.kind == kInverted, "packed_inverted_residual: want weights from pack_inverted_residual");
  PackedArgs<T>& o = call.o;
  const Geometry& g = o.g;
  o.expand_act = expand_act, o.dw_act = dw_act, o.act = act;
  if (call.y.numel() == 0) return call.y;
  // The ring of a strip takes about half of L2, in strips of equal width.
  const int64_t slots = g.dh * (g.kh - 1) + 1, fits = 393216 / (slots * g.sw * o.cp * static_cast<int64_t>(sizeof(T)));
  const int64_t strips = (g.ow + std::max<int64_t>(fits, 12) - 1) / std::max<int64_t>(fits, 12);
  o.strip = (g.ow + strips - 1) / strips;
  const int64_t columns = (o.strip - 1) * g.sw + g.dw * (g.kw - 1) + 1;
  const int64_t ci = (o.deep ? deep_words<T>(o.ci) : words<T>(o.ci)) * kPerWord<T>, spread = ci == o.ci ? 0 : columns * ci;
  parallel_for(0, g.n * ((g.ow + o.strip - 1) / o.strip) * g.oh, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> ring(slots * columns * o.cp, false), middle(o.strip * o.lda, o.deep), line(spread);
    SEGFAST_PACKED_CALL(T, inverted_rows, o, begin, end, ring.p, middle.p, line.p);
  });
  return call.y;
}

// A call that counts, in the dtype of its map.
template <class F>
Tensor counted(Counter& counter, const Tensor& x, F run) {
  counter.add();
  return x.scalar_type() == ScalarType::BFloat16 ? run(BFloat16{}) : run(float{});
}

Tensor packed_conv_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                       const std::optional<Tensor>& add) {
  return counted(conv_counter, x,
                 [&](auto t) { return packed_conv<decltype(t)>(x, packed, stride, padding, dilation, act, add); });
}

Tensor packed_conv_pool_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                            Ints size, Ints kernel, Ints pool_stride, Ints pool_padding, Ints pool_dilation) {
  return counted(pool_counter, x, [&](auto t) {
    return packed_conv_pool<decltype(t)>(x, packed, stride, padding, dilation, act,
                                         {size, kernel, pool_stride, pool_padding, pool_dilation});
  });
}

Tensor packed_conv_transpose_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                                 const std::optional<Tensor>& add) {
  return counted(transpose_counter, x,
                 [&](auto t) { return packed_conv_transpose<decltype(t)>(x, packed, stride, padding, dilation, act, add); });
}

Tensor packed_conv_transpose_argmax_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation,
                                        int64_t act, int64_t bytes) {
  return counted(classes_counter, x, [&](auto t) {
    return packed_conv_transpose_argmax<decltype(t)>(x, packed, stride, padding, dilation, act, bytes);
  });
}

Tensor packed_conv_transpose_overlap_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation,
                                         Ints output_padding, int64_t act) {
  return counted(overlap_counter, x, [&](auto t) {
    return packed_conv_transpose_overlap<decltype(t)>(x, packed, stride, padding, dilation, output_padding, act);
  });
}

Tensor packed_conv_ds_conv_cpu(const Tensor& x, const Tensor& first, Ints first_stride, Ints first_padding, Ints first_dilation,
                               int64_t first_act, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t dw_act,
                               int64_t act) {
  return counted(first_counter, x, [&](auto t) {
    return packed_conv_ds_conv<decltype(t)>(x, first, first_stride, first_padding, first_dilation, first_act, packed, stride,
                                            padding, dilation, dw_act, act);
  });
}

Tensor packed_winograd_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t act,
                           const std::optional<Tensor>& add, const std::optional<Tensor>& more, Ints repeat) {
  winograd_counter.add();
  return packed_winograd(x, packed, stride, padding, dilation, act, add, more, repeat);
}

Tensor packed_ds_conv_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t dw_act,
                          int64_t act, const std::optional<Tensor>& add) {
  return counted(ds_counter, x,
                 [&](auto t) { return packed_ds_conv<decltype(t)>(x, packed, stride, padding, dilation, dw_act, act, add); });
}

Tensor packed_ds_conv_chain_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation, int64_t dw_act,
                                int64_t act, const std::optional<Tensor>& low, bool align_corners,
                                const std::optional<Tensor>& last, int64_t last_act) {
  return counted(chain_counter, x, [&](auto t) {
    return packed_ds_conv_chain<decltype(t)>(x, packed, stride, padding, dilation, dw_act, act, low, align_corners, last,
                                             last_act);
  });
}

Tensor packed_inverted_residual_cpu(const Tensor& x, const Tensor& packed, Ints stride, Ints padding, Ints dilation,
                                    int64_t expand_act, int64_t dw_act, int64_t act, const std::optional<Tensor>& add) {
  return counted(inverted_counter, x, [&](auto t) {
    return packed_inverted_residual<decltype(t)>(x, packed, stride, padding, dilation, expand_act, dw_act, act, add);
  });
}

}  // namespace
}  // namespace segfast

STABLE_TORCH_LIBRARY_IMPL(segfast, CPU, m) {
  m.impl("pack_conv", TORCH_BOX(&segfast::pack_conv_cpu));
  m.impl("pack_conv_transpose", TORCH_BOX(&segfast::pack_conv_transpose_cpu));
  m.impl("pack_conv_transpose_overlap", TORCH_BOX(&segfast::pack_conv_transpose_overlap_cpu));
  m.impl("pack_winograd", TORCH_BOX(&segfast::pack_winograd_cpu));
  m.impl("pack_ds_conv", TORCH_BOX(&segfast::pack_ds_conv_cpu));
  m.impl("pack_inverted_residual", TORCH_BOX(&segfast::pack_inverted_residual_cpu));
  m.impl("packed_conv", TORCH_BOX(&segfast::packed_conv_cpu));
  m.impl("packed_conv_pool", TORCH_BOX(&segfast::packed_conv_pool_cpu));
  m.impl("packed_conv_transpose", TORCH_BOX(&segfast::packed_conv_transpose_cpu));
  m.impl("packed_conv_transpose_argmax", TORCH_BOX(&segfast::packed_conv_transpose_argmax_cpu));
  m.impl("packed_conv_transpose_overlap", TORCH_BOX(&segfast::packed_conv_transpose_overlap_cpu));
  m.impl("packed_conv_ds_conv", TORCH_BOX(&segfast::packed_conv_ds_conv_cpu));
  m.impl("packed_winograd", TORCH_BOX(&segfast::packed_winograd_cpu));
  m.impl("packed_ds_conv", TORCH_BOX(&segfast::packed_ds_conv_cpu));
  m.impl("packed_ds_conv_chain", TORCH_BOX(&segfast::packed_ds_conv_chain_cpu));
  m.impl("packed_inverted_residual", TORCH_BOX(&segfast::packed_inverted_residual_cpu));
}
#endif
