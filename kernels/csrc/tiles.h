// The products of products.h on the matrix tiles of a CPU (AMX).
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

namespace fastmim {

// Linux hands out the tile registers on request, per process.
inline bool can_multiply() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
}

// A thread multiplies while it has one. All eight tiles get 16 rows of 64 bytes: others use them, too, and torch's products
// configure them anew when they need to.
class Multiplier {
 public:
  Multiplier() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Multiplier() { _tile_release(); }
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;
};

// What rows and depth of a product must be multiples of.
constexpr int64_t LEFT_ROWS = BLOCK, DEPTHS = BLOCK;

// c (m, n) = a (m, k) b (k, n); m, n, k multiples of 32. a by rows; b in pairs of rows: (k / 2, n, 2), of b_columns.
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
        _tile_loadd(7, right + HALF * PAIR, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + HALF * a_stride, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* out = c + i * c_stride + j;
      _tile_stored(0, out, c_bytes);
      _tile_stored(1, out + HALF, c_bytes);
      _tile_stored(2, out + HALF * c_stride, c_bytes);
      _tile_stored(3, out + HALF * c_stride + HALF, c_bytes);
    }
  }
}

// The first rows, or all, of c (16, n) = a (16, k) b (k, n); n, k multiples of 32. b in pairs of rows, as in `product`.
inline void short_product(const bfloat16* a, int64_t a_stride, const bfloat16* b, int64_t, int64_t n, int64_t k, float* c) {
  const size_t a_bytes = static_cast<size_t>(a_stride) * 2, b_bytes = static_cast<size_t>(n) * 4;
  for (int64_t j = 0; j < n; j += BLOCK) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t p = 0; p < k; p += BLOCK) {
      const bfloat16* right = b + (p / 2 * n + j) * PAIR;
      _tile_loadd(4, a + p, a_bytes);
      _tile_loadd(6, right, b_bytes);
      _tile_loadd(7, right + HALF * PAIR, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c + j, b_bytes);
    _tile_stored(1, c + j + HALF, b_bytes);
  }
}

// (32 / 2, 32, 2) -> two tiles (16, 32) of its transpose, in place: the left factor of `accumulate`.
inline void as_left(bfloat16* x) {
  alignas(64) uint32_t words[HALF][BLOCK];
  std::memcpy(words, x, sizeof(words));
  for (int64_t half = 0; half < 2; ++half) {
    __m512i v[HALF];
    for (int64_t i = 0; i < HALF; ++i) v[i] = _mm512_load_si512(words[i] + half * HALF);
    transpose16(v);
    for (int64_t i = 0; i < HALF; ++i) _mm512_storeu_si512(x + (half * HALF + i) * BLOCK, v[i]);
  }
}

// c (32, 32), `stride` floats apart, = or += strip (32, depth) times panel (depth, 32); see pack_strip and pack_panels. The sums
// stay in tiles: storing them takes as long as a fifth of a product of depth 800. Meanwhile it asks for the lines of the block
// at `next`, a few per step: they lie in other pages each, and asked for at once they hold up the loads of the tiles. An
// address, as it may lie outside.
inline void accumulate(const bfloat16* strip, const bfloat16* panel, int64_t depth, bool is_first, float* c, int64_t stride,
                       uintptr_t next) {
  const size_t bytes = static_cast<size_t>(stride) * sizeof(float);
  float *right = c + HALF, *below = c + HALF * stride;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, right, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + HALF, bytes);
  }
  const int64_t rows_per_step = (BLOCK * BLOCK + depth - 1) / depth;
  int64_t asked = 0;
  for (int64_t r = 0; r < depth; r += BLOCK, strip += BLOCK * BLOCK, panel += BLOCK * BLOCK) {
    _tile_loadd(4, strip, 64);
    _tile_loadd(6, panel, 128);
    _tile_loadd(7, panel + BLOCK, 128);
    for (const int64_t end = std::min(BLOCK, asked + rows_per_step); asked < end; ++asked, next += bytes) {
      __builtin_prefetch(reinterpret_cast<const void*>(next), 1);
      __builtin_prefetch(reinterpret_cast<const void*>(next + 64), 1);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, strip + HALF * BLOCK, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, right, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + HALF, bytes);
}

}  // namespace fastmim
