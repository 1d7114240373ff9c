// Products of bfloat16 and of bytes in the matrix tiles of AMX; included once per instruction set by product.h. Without AMX there
// is nothing but the name Tiles.
#ifdef SEGFAST_KERNELS
namespace segfast::SEGFAST_ISA {

#if SEGFAST_AMX
// While it lives, the thread's eight tiles are of 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette, start, zero[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsics do not say which memory they read and write
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

constexpr int64_t kTileRows = 32;  // of a block

// Tiles 0 to 3 are sums, 4 and 5 rows of the left side, 6 and 7 columns of the right one.
#define SEGFAST_TILE_DOT(sum, left, right)     \
  if constexpr (std::is_same_v<T, BFloat16>) { \
    _tile_dpbf16ps(sum, left, right);          \
  } else {                                     \
    _tile_dpbusd(sum, left, right);            \
  }
// 16 M rows, `row` bytes apart, times 16 V columns, summed over the runs: to out[32][32].
template <class T, int M, int V>
SEGFAST_NOINLINE void tile_block(const Runs& runs, const T* a, int64_t row, const float* b, int64_t width, void* out) {
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t part = 0; part < runs.parts; ++part) {
    const char* left = reinterpret_cast<const char*>(a + runs.a[part]);
    const float* right = b + runs.b[part] * width;
    for (int64_t d = 0; d < runs.depth; d += kTileWords, left += kTileWords * 4, right += kTileWords * width) {
      _tile_loadd(4, left, row);
      _tile_loadd(6, right, width * 4);
      SEGFAST_TILE_DOT(0, 4, 6)
      if constexpr (V == 2) {
        _tile_loadd(7, right + 16, width * 4);
        SEGFAST_TILE_DOT(1, 4, 7)
      }
      if constexpr (M == 2) {
        _tile_loadd(5, left + 16 * row, row);
        SEGFAST_TILE_DOT(2, 5, 6)
        if constexpr (V == 2) {
          SEGFAST_TILE_DOT(3, 5, 7)
        }
      }
    }
  }
  char* to = static_cast<char*>(out);
  _tile_stored(0, to, 128);
  if constexpr (V == 2) _tile_stored(1, to + 64, 128);
  if constexpr (M == 2) _tile_stored(2, to + 2048, 128);
  if constexpr (M == 2 && V == 2) _tile_stored(3, to + 2112, 128);
  asm volatile("" : : : "memory");
}
#undef SEGFAST_TILE_DOT

constexpr int64_t kPatchWords = 16;  // of a run, at most

// The runs of each row side by side, where the panel has them: [rows][total] words, of which the others stay.
template <class T>
SEGFAST_INLINE void gather_runs(int64_t rows, const Runs& runs, const T* a, int64_t row, int64_t total, T* to) {
  const auto mask = static_cast<__mmask16>((1u << runs.depth) - 1);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t part = 0; part < runs.parts; ++part) {
      const __m512i words = _mm512_maskz_loadu_epi32(mask, a + i * row + runs.a[part]);
      _mm512_mask_storeu_epi32(to + (i * total + runs.b[part]) * kPerWord<T>, mask, words);
    }
  }
}

SEGFAST_INLINE Vec<float> with_shift(const float* sum, const float* shift) { return load(sum) + load(shift); }
SEGFAST_INLINE I32 with_shift(const int32_t* sum, const int32_t* shift) {
  return Dot<uint8_t>::start(sum) + Dot<uint8_t>::start(shift);
}

// rows x runs times panels of 32 columns, whose rows number `total` words; the rows are a multiple of 16, the depth of each run
// is one of kTileWords.
template <class T, class P, class F>
SEGFAST_INLINE void tile_product(int64_t rows, const Runs& runs, const T* a, int64_t row, const float* panels, int64_t total,
                                 int64_t padded, const P& put, const F& ahead) {
  using Sum = std::conditional_t<std::is_same_v<T, BFloat16>, float, int32_t>;
  alignas(64) Sum out[kTileRows * 32];
  for (int64_t col = 0; col < padded; col += 32) {
    const int64_t vectors = padded - col < 32 ? 1 : 2;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t count = rows - i < kTileRows ? 16 : 32;
      const auto block = count == 32 ? (vectors == 2 ? &tile_block<T, 2, 2> : &tile_block<T, 2, 1>)
                                     : (vectors == 2 ? &tile_block<T, 1, 2> : &tile_block<T, 1, 1>);
      if (col == 0) ahead(i, count);
      block(runs, a + i * row, row * static_cast<int64_t>(sizeof(T)), panels + col * total, vectors * 16, out);
      const auto sum = [&](int64_t j, int64_t v) { return with_shift(out + j * 32 + v * 16, put.shift + col + v * 16); };
      if (P::clamps && col + 32 <= put.cols) {
        for (int64_t j = 0; j < count; ++j) put.put_pair(i + j, col, sum(j, 0), sum(j, 1));
        continue;
      }
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t j = 0; j < count; ++j) put.put_part(i + j, col + v * 16, sum(j, v));
      }
    }
  }
}
#else
struct Tiles {
  ~Tiles() {}  // not trivial: an object of it is not unused
};
#endif

}  // namespace segfast::SEGFAST_ISA
#endif
