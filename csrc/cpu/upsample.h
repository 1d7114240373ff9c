// What the heads at image size share: bilinear interpolation, row by row, and its transpose. No include guard, as vec.h.
//
// A strip is a range of output columns whose buffers fit in the L1 cache. For a strip, a row of logits becomes
//   pixels[slot][class]    the source columns that the strip needs, in the compute type                       load_row
//   row[class][column]     those interpolated horizontally                                                    expand_row
// and an output row is the mix of two such rows, formed in registers by the kernel that needs it. Gradients take the way back:
// g[class][column] for each of the two source rows, then contract_row and store_row. All four go by square blocks of a vector's
// lanes, transposed in registers: both memory formats, and any ratio of sizes, take the same code.
#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

// The value between a and b. In the short form a + h1 (b - a), which wants finite and not too large numbers; else as eager does.
template <class A, bool FINITE>
SEGFAST_INLINE Vec<A> between(Vec<A> a, Vec<A> b, Vec<A> h0, Vec<A> h1) {
  return FINITE ? a + h1 * (b - a) : a * h0 + b * h1;
}

// Columns column[0 .. count) of a row of logits, over `divisor`, to pixels[slot][padded]. Whether the short form will do.
template <class T, class A>
bool load_row(const T* x, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t padded, const int32_t* column,
              int64_t count, A divisor, A* pixels) {
  constexpr int L = lanes<A>;
  Vec<A> probe{};
  const Vec<A> over = splat(divisor);
  const bool divide = divisor != 1;
  if (class_stride == 1) {
    for (int64_t s = 0; s < count; ++s) {
      const T* from = x + column[s] * pixel_stride;
      for (int64_t c = 0; c < classes; c += L) {
        Vec<A> v = load_n(from + c, static_cast<int>(classes - c < L ? classes - c : L));
        if (divide) v /= over;
        probe += v * A(1e8) * A(0);
        store(pixels + s * padded + c, v);
      }
    }
  } else {
    for (int64_t s = 0; s < count; s += L) {
      const int n = static_cast<int>(count - s < L ? count - s : L);
      const bool dense = pixel_stride == 1 && column[s + n - 1] - column[s] == n - 1;
      for (int64_t c = 0; c < classes; c += L) {
        const int m = static_cast<int>(classes - c < L ? classes - c : L);
        Vec<A> rows[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          rows[i] = Vec<A>{};
          if (i < m && dense) {
            rows[i] = load_n(x + (c + i) * class_stride + column[s], n);
          } else if (i < m) {
            for (int j = 0; j < n; ++j) {
              lane<A>(rows[i], j) = widen(x[(c + i) * class_stride + column[s + j] * pixel_stride]);
            }
          }
          if (divide) rows[i] /= over;
          probe += rows[i] * A(1e8) * A(0);
        }
        transpose<A>(rows);
        for (int i = 0; i < n; ++i) store(pixels + (s + i) * padded + c, rows[i]);
      }
    }
  }
  return sum_lanes<A>(probe) == 0;
}

// row[class][x] = w0[x] pixels[slot0[x]][class] + w1[x] pixels[slot1[x]][class] for the strip's columns x.
template <class A>
void expand_row(const A* pixels, int64_t padded, int64_t classes, const int32_t* slot0, const int32_t* slot1, const A* w0,
                const A* w1, int64_t strip, A* row) {
  constexpr int L = lanes<A>;
  for (int64_t x = 0; x < strip; x += L) {
    for (int64_t c = 0; c < classes; c += L) {
      Vec<A> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        rows[i] = load(pixels + slot0[x + i] * padded + c) * splat(w0[x + i]) +
                  load(pixels + slot1[x + i] * padded + c) * splat(w1[x + i]);
      }
      transpose<A>(rows);
      const int m = static_cast<int>(classes - c < L ? classes - c : L);
      for (int i = 0; i < m; ++i) store(row + (c + i) * strip + x, rows[i]);
    }
  }
}

// The transpose of expand_row: sums[column][class] += ..., packed; past the last class of a pixel it adds zeros to what follows.
template <class A>
void contract_row(const A* g, int64_t strip, int64_t classes, const int32_t* i0, const int32_t* i1, const A* w0, const A* w1,
                  int64_t count, A* sums) {
  constexpr int L = lanes<A>;
  for (int64_t c = 0; c < classes; c += L) {
    const int m = static_cast<int>(classes - c < L ? classes - c : L);
    int32_t left = i0[0], right = i1[0];
    Vec<A> at_left{}, at_right{};
    const auto add = [&](int32_t column, Vec<A> sum) {
      A* const to = sums + column * classes + c;
      store(to, load(to) + sum);
    };
    for (int64_t x = 0; x < count; x += L) {
      Vec<A> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] = i < m ? load(g + (c + i) * strip + x) : Vec<A>{};
      transpose<A>(rows);
      const int n = static_cast<int>(count - x < L ? count - x : L);
      for (int i = 0; i < n; ++i) {
        if (i0[x + i] != left || i1[x + i] != right) {
          add(left, at_left);
          if (i0[x + i] == right) {
            at_left = at_right;
          } else {
            add(right, at_right);
            at_left = Vec<A>{};
          }
          at_right = Vec<A>{};
          left = i0[x + i];
          right = i1[x + i];
        }
        at_left += rows[i] * splat(w0[x + i]);
        at_right += rows[i] * splat(w1[x + i]);
      }
    }
    add(left, at_left);
    add(right, at_right);
  }
}

// sums[column][class], packed, to a row of the gradient. Reads up to a vector past the last of them.
template <class T, class A>
void store_row(const A* sums, int64_t class_stride, int64_t classes, int64_t columns, T* out) {
  constexpr int L = lanes<A>;
  if (class_stride == 1) {
    const int64_t all = columns * classes;
    for (int64_t i = 0; i < all; i += L) store_n(out + i, load(sums + i), static_cast<int>(all - i < L ? all - i : L));
    return;
  }
  for (int64_t x = 0; x < columns; x += L) {
    const int n = static_cast<int>(columns - x < L ? columns - x : L);
    for (int64_t c = 0; c < classes; c += L) {
      Vec<A> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] = i < n ? load(sums + (x + i) * classes + c) : Vec<A>{};
      transpose<A>(rows);
      const int m = static_cast<int>(classes - c < L ? classes - c : L);
      for (int i = 0; i < m; ++i) store_n(out + (c + i) * class_stride + x, rows[i], n);
    }
  }
}

template <class A>
void add_row(const A* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// In eight sums: the same order whatever the vector's width.
template <class A>
double sum_row(const A* x, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += x[i + k];
  }
  for (int k = 0; i < count; ++i, ++k) sums[k] += x[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace segfast::SEGFAST_ISA
#else
#include <algorithm>
#include <cmath>
#include <vector>

#include "axis.h"

namespace segfast {
namespace {

// A multiple of every set's lanes.
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Output rows that are done in one go, whatever the number of threads, and the source rows that they touch.
struct Chunk {
  int64_t begin, end, first, last;
  int64_t rows() const { return last - first + 1; }
};

// About four source rows each, so that the rows that two chunks share are few; at least eight chunks where there are few rows.
inline std::vector<Chunk> chunks_of(const Axis& rows) {
  const int64_t out = rows.out;
  const int64_t four = std::max<int64_t>(4, 4 * out / rows.in), step = std::min(four, (out + 7) / 8);
  std::vector<Chunk> chunks;
  for (int64_t begin = 0; begin < out;) {
    int64_t end = std::min(begin + step, out);
    while (end < out && end < begin + 2 * step && rows.i0[end] == rows.i0[end - 1]) ++end;
    chunks.push_back({begin, end, rows.i0[begin], rows.i1[end - 1]});
    begin = end;
  }
  return chunks;
}

struct Strip {
  int64_t begin, count, slots, columns;  // output columns; how many source columns they need, and where those are listed
};

template <class A>
struct Columns {
  int64_t width;  // of a strip, a multiple of every vector
  std::vector<int32_t> i0, i1, slot0, slot1, list;
  std::vector<A> w0, w1;
  std::vector<Strip> strips;
  int64_t most_slots = 0;

  Columns(const Axis& axis, int64_t width) : width(width) {
    const int64_t padded = round_up(axis.out, width);
    for (auto* v : {&i0, &i1, &slot0, &slot1}) v->resize(padded);
    for (auto* v : {&w0, &w1}) v->resize(padded);
    for (int64_t x = 0; x < padded; ++x) {
      const int64_t from = std::min(x, axis.out - 1);
      i0[x] = axis.i0[from];
      i1[x] = axis.i1[from];
      w0[x] = static_cast<A>(1 - axis.w1[from]);
      w1[x] = static_cast<A>(axis.w1[from]);
    }
    for (int64_t begin = 0; begin < axis.out; begin += width) {
      const int64_t columns = static_cast<int64_t>(list.size());
      const auto slot = [&](int32_t column) {  // both i0 and i1 grow: a column that is there is one of the last two
        const int64_t here = static_cast<int64_t>(list.size()) - columns;
        for (int64_t s = here - 1; s >= std::max<int64_t>(here - 2, 0); --s) {
          if (list[columns + s] == column) return static_cast<int32_t>(s);
        }
        list.push_back(column);
        return static_cast<int32_t>(here);
      };
      for (int64_t x = begin; x < begin + width; ++x) {
        slot0[x] = slot(i0[x]);
        slot1[x] = slot(i1[x]);
      }
      const int64_t slots = static_cast<int64_t>(list.size()) - columns;
      strips.push_back({begin, std::min(width, axis.out - begin), slots, columns});
      most_slots = std::max(most_slots, slots);
    }
  }
};

// Columns of a strip such that `rows` rows of all classes take about 24 KB.
template <class A>
int64_t strip_width(int64_t classes, int64_t rows, int64_t out) {
  const int64_t fit = 24576 / (rows * classes * static_cast<int64_t>(sizeof(A)));
  const int64_t width = std::clamp(fit / kLanes<A> * kLanes<A>, kLanes<A>, 32 * kLanes<A>);
  return std::min(width, round_up(out, kLanes<A>));
}

// Logits as [image][class][row][column], dense in either memory format.
struct Source {
  Tensor x;
  bool channels_last;
  int64_t images, classes, height, width, class_stride, pixel_stride;
  explicit Source(const Tensor& t)
      : x(contiguous_as(t, is_channels_last(t))),
        channels_last(is_channels_last(x)),
        images(t.size(0)),
        classes(t.size(1)),
        height(t.size(2)),
        width(t.size(3)),
        class_stride(channels_last ? 1 : height * width),
        pixel_stride(channels_last ? classes : 1) {}
  int64_t offset(int64_t image, int64_t row) const { return image * classes * height * width + row * width * pixel_stride; }
};

// Cache-aligned pieces of one allocation.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size) : buffer_(size + 64 * kLanes<A>) {
    next_ = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(buffer_.data()) + 63) / 64 * 64);
  }
  A* take(int64_t size) {
    A* const piece = next_;
    next_ += round_up(size, kLanes<A>);
    return piece;
  }

 private:
  std::vector<A> buffer_;
  A* next_;
};

// The last two source rows that a strip needed, expanded.
template <class A>
class Rows {
 public:
  static int64_t size(const Source& source, const Columns<A>& columns) {
    return 2 * source.classes * columns.width + columns.most_slots * round_up(source.classes, kLanes<A>);
  }
  Rows(const Source& source, const Columns<A>& columns, A divisor, Scratch<A>& scratch)
      : source_(source), columns_(columns), divisor_(divisor), padded_(round_up(source.classes, kLanes<A>)) {
    for (A*& row : row_) row = scratch.take(source.classes * columns.width);
    pixels_ = scratch.take(columns.most_slots * padded_);
  }
  void start(int64_t image, const Strip& strip) {
    image_ = image;
    strip_ = strip;
    held_[0] = held_[1] = -1;
  }
  // Makes row `i0` and row `i1` (the same or the next) available as a() and b().
  void want(int64_t i0, int64_t i1) {
    if (held_[1] == i0 && held_[0] != i0) {
      std::swap(held_[0], held_[1]);
      std::swap(row_[0], row_[1]);
      std::swap(finite_[0], finite_[1]);
    }
    expand(0, i0);
    if (i1 != i0) expand(1, i1);
    same_ = i0 == i1;
  }
  const A* a() const { return row_[0]; }
  const A* b() const { return row_[same_ ? 0 : 1]; }
  bool finite() const { return finite_[0] && (same_ || finite_[1]); }

 private:
  void expand(int which, int64_t row) {
    if (held_[which] == row) return;
    held_[which] = row;
    dispatch_float("upsample", source_.x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      if constexpr (std::is_same_v<T, double> == std::is_same_v<A, double>) {
        finite_[which] = SEGFAST_CALL(load_row<T, A>)(data<const T>(source_.x) + source_.offset(image_, row),
                                                      source_.class_stride, source_.pixel_stride, source_.classes, padded_,
                                                      columns_.list.data() + strip_.columns, strip_.slots, divisor_, pixels_);
      }
    });
    SEGFAST_CALL(expand_row<A>)
    (pixels_, padded_, source_.classes, columns_.slot0.data() + strip_.begin, columns_.slot1.data() + strip_.begin,
     columns_.w0.data() + strip_.begin, columns_.w1.data() + strip_.begin, columns_.width, row_[which]);
  }

  const Source& source_;
  const Columns<A>& columns_;
  const A divisor_;
  const int64_t padded_;
  A* row_[2];
  A* pixels_;
  int64_t image_ = 0, held_[2] = {-1, -1};
  Strip strip_{};
  bool finite_[2] = {true, true}, same_ = false;
};

// The gradient of the logits: each chunk sums its source rows apart, then the chunks are added in order.
template <class A>
class Gradient {
 public:
  Gradient(const Source& source, const Columns<A>& columns, const std::vector<Chunk>& chunks, bool wanted)
      : source_(source), columns_(columns), chunks_(chunks), row_size_(source.width * source.classes) {
    if (!wanted) return;
    for (const Chunk& chunk : chunks) {
      offsets_.push_back(image_size_);
      image_size_ += chunk.rows() * row_size_ + kLanes<A>;
    }
    const ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    sums_ = empty({source.images * image_size_}, dtype, source.x);
  }
  bool wanted() const { return sums_.has_value(); }
  A* of(int64_t image, int64_t chunk) const {
    A* const sums = data<A>(*sums_) + image * image_size_ + offsets_[chunk];
    std::fill(sums, sums + chunks_[chunk].rows() * row_size_ + kLanes<A>, A(0));
    return sums;
  }

  // The piece of one task: two rows of a strip, g[class][column], for the source rows i0 and i1.
  class Piece {
   public:
    static int64_t size(const Source& source, const Columns<A>& columns) { return 2 * source.classes * columns.width; }
    Piece(const Gradient& whole, Scratch<A>& scratch) : whole_(whole), size_(whole.source_.classes * whole.columns_.width) {
      for (A*& row : row_) row = scratch.take(size_);
    }
    void start(int64_t image, int64_t chunk) {
      sums_ = whole_.of(image, chunk);
      first_ = whole_.chunks_[chunk].first;
    }
    void start_strip(const Strip& strip) {
      strip_ = strip;
      held_[0] = held_[1] = -1;
    }
    // As Rows::want: a() and b() may be added to; a row that is no more wanted is summed. They are two also for one source row.
    void want(int64_t i0, int64_t i1) {
      if (held_[1] == i0 && held_[0] != i0) {
        finish(0);
        std::swap(held_[0], held_[1]);
        std::swap(row_[0], row_[1]);
      }
      open(0, i0);
      open(1, i1);
    }
    A* a() const { return row_[0]; }
    A* b() const { return row_[1]; }
    void finish_strip() {
      finish(0);
      finish(1);
    }

   private:
    void open(int which, int64_t row) {
      if (held_[which] == row) return;
      finish(which);
      held_[which] = row;
      std::fill(row_[which], row_[which] + size_, A(0));
    }
    void finish(int which) {
      if (held_[which] < 0) return;
      const Columns<A>& columns = whole_.columns_;
      SEGFAST_CALL(contract_row<A>)
      (row_[which], columns.width, whole_.source_.classes, columns.i0.data() + strip_.begin, columns.i1.data() + strip_.begin,
       columns.w0.data() + strip_.begin, columns.w1.data() + strip_.begin, strip_.count,
       sums_ + (held_[which] - first_) * whole_.row_size_);
      held_[which] = -1;
    }

    const Gradient& whole_;
    const int64_t size_;
    A* row_[2];
    A* sums_ = nullptr;
    int64_t first_ = 0, held_[2] = {-1, -1};
    Strip strip_{};
  };

  Tensor finish(ScalarType dtype) const {
    const Source& s = source_;
    const Tensor out = empty({s.images, s.classes, s.height, s.width}, dtype, s.x, s.channels_last);
    parallel_for(0, s.images * s.height, 4, [&](int64_t from, int64_t to) {
      std::vector<A> sum(row_size_ + kLanes<A>);
      for (int64_t task = from; task < to; ++task) {
        const int64_t image = task / s.height, row = task % s.height;
        std::fill(sum.begin(), sum.end(), A(0));
        for (size_t k = 0; k < chunks_.size(); ++k) {
          if (row < chunks_[k].first || row > chunks_[k].last) continue;
          const A* const here = data<A>(*sums_) + image * image_size_ + offsets_[k] + (row - chunks_[k].first) * row_size_;
          SEGFAST_CALL(add_row<A>)(here, row_size_, sum.data());
        }
        dispatch_float("upsample", dtype, [&](auto type) {
          using T = decltype(type);
          if constexpr (std::is_same_v<T, double> == std::is_same_v<A, double>) {
            SEGFAST_CALL(store_row<T, A>)
            (sum.data(), s.class_stride, s.classes, s.width, data<T>(out) + s.offset(image, row));
          }
        });
      }
    });
    return out;
  }

 private:
  const Source& source_;
  const Columns<A>& columns_;
  const std::vector<Chunk>& chunks_;
  const int64_t row_size_;
  std::vector<int64_t> offsets_;
  int64_t image_size_ = 0;
  std::optional<Tensor> sums_;
};

// How many output rows from `row` on lie between the same two source rows.
inline int64_t run_of(const Axis& rows, int64_t row, int64_t end) {
  int64_t next = row + 1;
  while (next < end && rows.i0[next] == rows.i0[row] && rows.i1[next] == rows.i1[row]) ++next;
  return next - row;
}

}  // namespace
}  // namespace segfast
#endif
