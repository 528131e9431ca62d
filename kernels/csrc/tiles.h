// Products of bfloat16 matrices on the tiles of a CPU (AMX), and how their factors are laid out. Empty where the compiler's
// target has no tiles: then the functions that need them return NO_HARDWARE.
#pragma once

#include "kernel.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define FASTMIM_HAS_TILES 1
// GCC 12 takes its own headers' deliberately undefined vectors for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastmim {

constexpr int64_t BLOCK = 32;  // rows and columns of one step of a product, and its depth
constexpr int64_t PAIR = 2;    // values of one column that lie side by side in the right factor of a product

inline int64_t blocks_up(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// Linux hands out the tile registers on request, per process.
inline bool ask_for_tiles() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// All eight tiles have 16 rows of 64 bytes.
inline void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// c (m, n) = a (m, k) b (k, n); m, n, k multiples of 32. a by rows; b in pairs of rows: (k / 2, n, 2).
inline void product(const bfloat16* a, int64_t a_stride, const bfloat16* b, int64_t b_columns, int64_t m, int64_t n, int64_t k,
             float* c, int64_t c_stride) {
  const size_t a_bytes = static_cast<size_t>(a_stride) * 2, b_bytes = static_cast<size_t>(b_columns) * 4,
               c_bytes = static_cast<size_t>(c_stride) * 4;
  for (int64_t i = 0; i < m; i += BLOCK) {
    for (int64_t j = 0; j < n; j += BLOCK) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t p = 0; p < k; p += BLOCK) {
        const bfloat16* left = a + i * a_stride + p;
        const bfloat16* right = b + (p / 2 * b_columns + j) * PAIR;
        _tile_loadd(4, left, a_bytes);
        _tile_loadd(6, right, b_bytes);
        _tile_loadd(7, right + 16 * PAIR, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * a_stride, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* out = c + i * c_stride + j;
      _tile_stored(0, out, c_bytes);
      _tile_stored(1, out + 16, c_bytes);
      _tile_stored(2, out + 16 * c_stride, c_bytes);
      _tile_stored(3, out + 16 * c_stride + 16, c_bytes);
    }
  }
}

// The mask of the first n of 32 values; n may lie outside 0 .. 32.
inline __mmask32 first32(int64_t n) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(n, 0, BLOCK)) - 1);
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

// (rows, width) -> (rows / 2, width, 2): what the right factor of a product looks like.
inline void pair_rows(const bfloat16* x, int64_t rows, int64_t width, bfloat16* out) {
  const Zip zip;
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t j = 0; j < width; j += BLOCK)
      zip(_mm512_loadu_si512(x + r * width + j), _mm512_loadu_si512(x + (r + 1) * width + j),
          out + (r / 2 * width + j) * PAIR);
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
