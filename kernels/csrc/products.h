// Products of bfloat16 matrices: how their factors are laid out, and by which instructions they are multiplied. Empty where
// the compiler's target multiplies no bfloat16: then the functions that need them return NO_HARDWARE.
#pragma once

#include "kernel.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define FASTMIM_HAS_PRODUCTS 1
// GCC 12 takes its own headers' deliberately undefined vectors for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace fastmim {

constexpr int64_t BLOCK = 32;  // rows and columns of one step of a product, and its depth
constexpr int64_t HALF = 16;   // rows of half a block: floats of a vector, rows of a tile
constexpr int64_t PAIR = 2;    // values of one column that lie side by side in the right factor of a product

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t blocks_up(int64_t n) { return up(n, BLOCK); }

// The rows of a product whose sums fit the vector registers, 32 columns of them.
constexpr int64_t ROWS = 8;

struct Sums {
  __m512 left[ROWS], right[ROWS];
};

// sums (8, 32) += a (8, k) b (k, 32), k even. word(r, p): the values p and p + 1 of row r of a; pairs of rows of b lie b_pair
// values apart.
template <class Word>
__attribute__((always_inline)) inline void add_product(Sums& sums, Word&& word, const bfloat16* b, int64_t b_pair, int64_t k) {
  for (int64_t p = 0; p < k; p += PAIR, b += b_pair) {
    const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)),
               right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + BLOCK));
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word(r, p)));
      sums.left[r] = _mm512_dpbf16_ps(sums.left[r], both, left);
      sums.right[r] = _mm512_dpbf16_ps(sums.right[r], both, right);
    }
  }
}

// Two values that lie side by side.
inline int32_t word_at(const bfloat16* x) {
  int32_t word;
  std::memcpy(&word, x, sizeof(word));
  return word;
}

// Transposes 16 vectors of 16 words in place.
inline void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  // v[4 g + c] now holds, in its four lanes, column c, c + 4, c + 8, c + 12 of the rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xDD), f = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xDD);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xDD);
    t[4 + c] = _mm512_shuffle_i32x4(e, f, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(e, f, 0xDD);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

}  // namespace fastmim

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include "tiles.h"
#else
#include "vectors.h"
#endif

namespace fastmim {

// The mask of the first n of 32 values; n may lie outside 0 .. 32.
inline __mmask32 first32(int64_t n) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(n, 0, BLOCK)) - 1);
}

// Writes the first `count` of 16 floats, rounded, all if there are more. No mask where none is needed: one store after another
// takes a quarter longer with it.
inline void store_rounded(__m512 x, int64_t count, bfloat16* out) {
  const auto half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  if (count < HALF)
    _mm256_mask_storeu_epi16(out, static_cast<__mmask16>(first32(count)), half);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
}

// out (padded_rows, padded_width) = rows of x, `stride` values apart, and zeros around them.
inline void copy_rows(const bfloat16* x, int64_t stride, int64_t rows, int64_t width, int64_t padded_rows, int64_t padded_width,
               bfloat16* out) {
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t j = 0; j < padded_width; j += BLOCK) {
      const __mmask32 mask = r < rows ? first32(width - j) : 0;
      _mm512_storeu_si512(out + r * padded_width + j, _mm512_maskz_loadu_epi16(mask, x + r * stride + j));
    }
  }
}

// Two rows of 32 values side by side: even[0], odd[0], even[1], odd[1] ...
class Zip {
 public:
  Zip() {
    alignas(64) uint16_t order[2][32];
    for (uint16_t i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
    }
    low_ = _mm512_load_si512(order[0]);
    high_ = _mm512_load_si512(order[1]);
  }
  void operator()(__m512i even, __m512i odd, void* out) const {
    auto* to = static_cast<bfloat16*>(out);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low_, odd));
    _mm512_storeu_si512(to + BLOCK, _mm512_permutex2var_epi16(even, high_, odd));
  }

 private:
  __m512i low_, high_;
};

// 32 columns of a row of x (rows, width), as zeros outside. Asks for those of the next but one block: a row is a page of its own
// for the CPU, which does not see that its columns follow.
inline __m512i columns(const bfloat16* x, int64_t rows, int64_t width, int64_t r, int64_t j) {
  if (r >= rows) return _mm512_setzero_si512();
  const bfloat16* here = x + r * width + j;
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(here) + 2 * BLOCK * sizeof(*x)), _MM_HINT_T0);
  return _mm512_maskz_loadu_epi16(first32(width - j), here);
}

// (32 / 2, 32, 2): 32 rows and 32 columns of x (rows, width) from r and j on, as zeros outside.
inline void pack_block(const Zip& zip, const bfloat16* x, int64_t rows, int64_t width, int64_t r, int64_t j, bfloat16* out) {
  for (int64_t i = 0; i < BLOCK; i += PAIR)
    zip(columns(x, rows, width, r + i, j), columns(x, rows, width, r + i + 1, j), out + i * BLOCK);
}

// Panels `begin` to `end` of 32 columns of x (rows, width), `depth` rows from `start` on: each is (depth / 2, 32, 2), the right
// factor of a product; depth a multiple of 32. By rows, as x lies in memory: a column of blocks would touch a page per row.
inline void pack_panels(const bfloat16* x, int64_t rows, int64_t width, int64_t start, int64_t depth, int64_t begin, int64_t end,
                        bfloat16* out) {
  const Zip zip;
  for (int64_t r = 0; r < depth; r += BLOCK)
    for (int64_t p = begin; p < end; ++p)
      pack_block(zip, x, rows, width, start + r, p * BLOCK, out + (p * depth + r) * BLOCK);
}

// (rows, width) -> (rows / 2, width, 2): what the right factor of a product looks like.
inline void pair_rows(const bfloat16* x, int64_t rows, int64_t width, bfloat16* out) {
  const Zip zip;
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t j = 0; j < width; j += BLOCK)
      zip(_mm512_loadu_si512(x + r * width + j), _mm512_loadu_si512(x + (r + 1) * width + j),
          out + (r / 2 * width + j) * PAIR);
}

// (rows, columns) words -> (columns, rows); both multiples of 16.
inline void transpose_words(const void* x, int64_t rows, int64_t columns, void* out) {
  const auto* from = static_cast<const uint32_t*>(x);
  auto* to = static_cast<uint32_t*>(out);
  __m512i v[16];
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(from + (r + i) * columns + c);
      transpose16(v);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + (c + i) * rows + r, v[i]);
    }
  }
}

}  // namespace fastmim
#endif
