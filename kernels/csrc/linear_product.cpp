// The other products of a linear layer, its result and the gradient of its input, by vectors (AVX512_BF16).
//
// The left factor is read as it lies in memory: two values of a row are a word, and any word can be had for all lanes. The
// weight, which is small beside it, is laid out anew in panels of 32 columns. A block of rows stays in the level 2 cache while
// all panels pass by. Each sum belongs to one thread and has one order, so the result does not depend on their number.
#include "products.h"

namespace fastmim {

#ifdef FASTMIM_HAS_PRODUCTS
namespace {

constexpr int64_t KEPT = 256 << 10;  // bytes of the left factor at a time; a panel and its results need the rest of level 2

// (depth / 2, 32, 2): columns j .. j + 31 of the transpose of x (columns, depth), as zeros outside.
void pack_rows(const bfloat16* x, int64_t depth, int64_t columns, int64_t j, bfloat16* out) {
  for (int64_t p = 0; p < depth; p += BLOCK) {
    const __mmask32 mask = first32(depth - p);
    for (int64_t half = 0; half < BLOCK; half += HALF) {
      __m512i v[HALF];
      for (int64_t i = 0; i < HALF; ++i)
        v[i] = j + half + i < columns ? _mm512_maskz_loadu_epi16(mask, x + (j + half + i) * depth + p) : _mm512_setzero_si512();
      transpose16(v);
      for (int64_t i = 0; i < HALF; ++i) _mm512_storeu_si512(out + (p + i * PAIR) * BLOCK + half * PAIR, v[i]);
    }
  }
}

// `count` rows, up to 8, and `width` columns, up to 32, of out = left (., depth) panel (depth, 32) + bias.
void put_block(const bfloat16* left, int64_t count, const bfloat16* panel, int64_t depth, const float* bias, int64_t width,
               bfloat16* out, int64_t columns) {
  const __mmask32 inside = first32(width);
  Sums sums;
  const __m512 low = bias ? _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), bias) : _mm512_setzero_ps(),
               high = bias ? _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), bias + HALF) : _mm512_setzero_ps();
  const bfloat16* rows[ROWS];
  // Each row of the result is in another page, or at the same place of one: its line comes while the product is computed.
  for (int64_t r = 0; r < count; ++r) __builtin_prefetch(out + r * columns, 1);
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
    sums.left[r] = low;
    sums.right[r] = high;
    // Where there are fewer, the last one again.
    rows[r] = left + std::min(r, count - 1) * depth;
  }
  const int64_t even = depth / PAIR * PAIR;
  add_product(sums, [&](int64_t r, int64_t p) { return word_at(rows[r] + p); }, panel, BLOCK * PAIR, even);
  if (even < depth)
    add_product(sums, [&](int64_t r, int64_t) { return static_cast<int32_t>(rows[r][even].bits); }, panel + even * BLOCK,
                BLOCK * PAIR, PAIR);
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
    if (r < count) {
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sums.right[r], sums.left[r]));
      _mm512_mask_storeu_epi16(out + r * columns, inside, both);
    }
  }
}

}  // namespace
#endif

// out (rows, columns) = left (rows, depth) times weight, plus bias (columns,) or null. The weight is (depth, columns), or its
// transpose (columns, depth). All but the bias, which is float, are bfloat16; no size is 0.
static Status linear_product(const void* left, const void* weight, int64_t is_transpose, const float* bias, int64_t rows,
                             int64_t depth, int64_t columns, void* out, int64_t threads) {
#ifdef FASTMIM_HAS_PRODUCTS
  const auto *x = static_cast<const bfloat16*>(left), *w = static_cast<const bfloat16*>(weight);
  auto* y = static_cast<bfloat16*>(out);
  expect_writes(out, rows * columns * static_cast<int64_t>(sizeof(bfloat16)));
  const int64_t panels = blocks_up(columns) / BLOCK, padded = blocks_up(depth);
  const int64_t kept = std::max<int64_t>(1, KEPT / (ROWS * depth * static_cast<int64_t>(sizeof(bfloat16)))) * ROWS;
  Floats packed(panels * BLOCK * padded / 2);
  auto* all = reinterpret_cast<bfloat16*>(packed.at(0));
  parallel_for(panels, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
    if (!is_transpose) return pack_panels(w, depth, columns, 0, padded, begin, end, all);
    for (int64_t p = begin; p < end; ++p) pack_rows(w, depth, columns, p * BLOCK, all + p * BLOCK * padded);
  });
  parallel_for((rows + ROWS - 1) / ROWS, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t first = begin * ROWS, last; first < std::min(rows, end * ROWS); first = last) {
      last = std::min({rows, end * ROWS, first + kept});
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t j = p * BLOCK;
        for (int64_t r = first; r < last; r += ROWS)
          put_block(x + r * depth, std::min(ROWS, last - r), all + p * BLOCK * padded, depth, bias ? bias + j : nullptr,
                    std::min(BLOCK, columns - j), y + r * columns + j, columns);
      }
    }
  });
  return OK;
#else
  (void)left, (void)weight, (void)is_transpose, (void)bias, (void)rows, (void)depth, (void)columns, (void)out, (void)threads;
  return NO_HARDWARE;
#endif
}

FASTMIM_EXPORT(linear_product)

}  // namespace fastmim
