// The products of products.h by vectors (AVX512_BF16), for CPUs without matrix tiles.
#pragma once

namespace fastmim {

inline bool can_multiply() { return true; }

// See tiles.h; vectors need no preparation.
struct Multiplier {
  Multiplier() {}
};

// c (8, 32) = or += a (8, k) b (k, 32); k even. Rows of a lie a_row values apart, pairs of a row a_pair; pairs of rows of b lie
// b_pair values apart, rows of c c_row floats.
inline void rows_product(const bfloat16* a, int64_t a_row, int64_t a_pair, const bfloat16* b, int64_t b_pair, int64_t k,
                         bool is_first, float* c, int64_t c_row) {
  Sums sums;
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
    sums.left[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_row);
    sums.right[r] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * c_row + HALF);
  }
  const int64_t step = a_pair / PAIR;
  add_product(sums, [&](int64_t r, int64_t p) { return word_at(a + r * a_row + p * step); }, b, b_pair, k);
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
    _mm512_storeu_ps(c + r * c_row, sums.left[r]);
    _mm512_storeu_ps(c + r * c_row + HALF, sums.right[r]);
  }
}

// What rows and depth of a product must be multiples of.
constexpr int64_t LEFT_ROWS = ROWS, DEPTHS = PAIR;

// c (m, n) = a (m, k) b (k, n); m a multiple of 8, n of 32, k of 2. a by rows; b in pairs of rows: (k / 2, n, 2), of b_columns.
inline void product(const bfloat16* a, int64_t a_stride, const bfloat16* b, int64_t b_columns, int64_t m, int64_t n, int64_t k,
                    float* c, int64_t c_stride) {
  for (int64_t j = 0; j < n; j += BLOCK)
    for (int64_t i = 0; i < m; i += ROWS)
      rows_product(a + i * a_stride, a_stride, PAIR, b + j * PAIR, b_columns * PAIR, k, true, c + i * c_stride + j, c_stride);
}

// The first `rows`, or more, of c (16, n) = a (16, k) b (k, n); n a multiple of 32, k of 2. b in pairs of rows, as in `product`.
inline void short_product(const bfloat16* a, int64_t a_stride, const bfloat16* b, int64_t rows, int64_t n, int64_t k, float* c) {
  product(a, a_stride, b, n, up(rows, LEFT_ROWS), n, k, c, n);
}

// The left factor of `accumulate` is laid out as the right one: any word of it can be had for all lanes.
inline void as_left(bfloat16*) {}

// c (32, 32), `stride` floats apart, = or += strip (32, depth) times panel (depth, 32); see pack_strip and pack_panels. Asks for
// the lines of the block at `next`, an address, as it may lie outside.
inline void accumulate(const bfloat16* strip, const bfloat16* panel, int64_t depth, bool is_first, float* c, int64_t stride,
                       uintptr_t next) {
  for (int64_t i = 0; i < BLOCK; i += ROWS) {
    for (int64_t r = 0; r < ROWS; ++r, next += static_cast<size_t>(stride) * sizeof(float)) {
      __builtin_prefetch(reinterpret_cast<const void*>(next), 1);
      __builtin_prefetch(reinterpret_cast<const void*>(next + 64), 1);
    }
    rows_product(strip + i * PAIR, PAIR, BLOCK * PAIR, panel, BLOCK * PAIR, depth, is_first, c + i * stride, stride);
  }
}

}  // namespace fastmim
