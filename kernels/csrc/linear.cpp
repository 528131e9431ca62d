// Gradients of the weight and the bias of a linear layer.
//
// torch's product for the weight, grad^T x, reads both factors against their grain and gives bfloat16, which is then
// widened. Here a slice of rows of both is laid out for the instructions, and the sums stay float32. Slices follow each other in
// order and each sum belongs to one thread, so the result does not depend on the number of threads.
#include "products.h"

namespace fastmim {

#ifdef FASTMIM_HAS_PRODUCTS
namespace {

constexpr int64_t SLICE = 1024;       // rows at a time
constexpr int64_t STRIP = 512;        // outputs at a time: a slice of their gradients then takes 1 MB, and
constexpr int64_t GROUP = 512 << 10;  // bytes of x that they meet before the next: both fit the level 2 cache

// 32 rows and 32 columns of the gradient, laid out as the left factor; sums += the columns'.
void pack_strip(const Zip& zip, const bfloat16* grad, int64_t rows, int64_t width, int64_t r, int64_t j, bfloat16* out,
                float* sums) {
  pack_block(zip, grad, rows, width, r, j, out);
  // A product with ones adds the two of a pair.
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3F80));
  __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + HALF);
  for (int64_t i = 0; i < BLOCK; i += PAIR) {
    low = _mm512_dpbf16_ps(low, reinterpret_cast<__m512bh>(_mm512_loadu_si512(out + i * BLOCK)), ones);
    high = _mm512_dpbf16_ps(high, reinterpret_cast<__m512bh>(_mm512_loadu_si512(out + (i + 1) * BLOCK)), ones);
  }
  _mm512_store_ps(sums, low);
  _mm512_store_ps(sums + HALF, high);
  as_left(out);
}

// (height, width) of the gradient = sums (32, 32), or += sums.
void put(const float* sums, bool is_first, int64_t height, int64_t width, float* out, int64_t stride) {
  const __mmask16 left = static_cast<__mmask16>(first32(width)), right = static_cast<__mmask16>(first32(width) >> 16);
  for (int64_t i = 0; i < height; ++i, sums += BLOCK, out += stride) {
    __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + HALF);
    if (!is_first) {
      a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(left, out));
      b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(right, out + HALF));
    }
    _mm512_mask_storeu_ps(out, left, a);
    _mm512_mask_storeu_ps(out + HALF, right, b);
  }
}

}  // namespace
#endif

// grad (rows, outputs) and x (rows, inputs), bfloat16. Floats: for_weight (outputs, inputs), for_bias (outputs,) or null.
static Status linear_gradients(const void* grad, const void* x, int64_t rows, int64_t outputs, int64_t inputs,
                               float* for_weight, float* for_bias, int64_t threads) {
#ifdef FASTMIM_HAS_PRODUCTS
  if (!can_multiply()) return NO_HARDWARE;
  if (rows == 0) {
    std::fill_n(for_weight, outputs * inputs, 0.0f);
    if (for_bias) std::fill_n(for_bias, outputs, 0.0f);
    return OK;
  }
  const auto *g = static_cast<const bfloat16*>(grad), *in = static_cast<const bfloat16*>(x);
  const int64_t slice = std::min(SLICE, blocks_up(rows));
  const int64_t lefts = blocks_up(outputs) / BLOCK, panels = blocks_up(inputs) / BLOCK;
  // Enough strips for all threads, each of whole blocks.
  const int64_t strip = std::clamp(blocks_up(outputs / std::max<int64_t>(1, threads)), BLOCK, STRIP);
  const int64_t strips = (outputs + strip - 1) / strip;
  // Each worker packs its strips to one place, which stays in its cache.
  const int64_t workers = std::min(threads, strips);
  Floats packed((panels * BLOCK + workers * strip) * slice / 2), column_sums(lefts * BLOCK);
  auto* all_panels = reinterpret_cast<bfloat16*>(packed.at(0));
  bfloat16* all_strips = all_panels + panels * BLOCK * slice;
  std::fill_n(column_sums.at(0), lefts * BLOCK, 0.0f);
  for (int64_t start = 0; start < rows; start += slice) {
    const int64_t depth = blocks_up(std::min(slice, rows - start));
    parallel_for(panels, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
      pack_panels(in, rows, inputs, start, depth, begin, end, all_panels);
    });
    const int64_t group = std::max<int64_t>(1, GROUP / (BLOCK * depth * int64_t{sizeof(bfloat16)}));
    parallel_for(strips, 1, workers, [&](int64_t begin, int64_t end, int64_t worker) {
      const Multiplier multiplier;
      const Zip zip;
      bfloat16* lefts_here = all_strips + worker * strip * slice;
      alignas(64) float sums[BLOCK * BLOCK];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * strip, last = std::min(outputs, first + strip);
        for (int64_t r = 0; r < depth; r += BLOCK)
          for (int64_t j = first; j < last; j += BLOCK)
            pack_strip(zip, g, rows, outputs, start + r, j, lefts_here + (j - first) * depth + r * BLOCK, column_sums.at(j));
        for (int64_t p = 0; p < panels; p += group) {
          const int64_t inner = p * BLOCK, outer = std::min(inputs, (p + group) * BLOCK);
          // Along the rows of the gradient, as it lies in memory.
          for (int64_t j = first; j < last; j += BLOCK) {
            for (int64_t i = inner; i < outer; i += BLOCK) {
              const int64_t height = std::min(BLOCK, outputs - j), width = std::min(BLOCK, inputs - i);
              const bfloat16 *left = lefts_here + (j - first) * depth, *right = all_panels + i * depth;
              float* out = for_weight + j * inputs + i;
              if (height < BLOCK || width < BLOCK) {
                accumulate(left, right, depth, true, sums, BLOCK, reinterpret_cast<uintptr_t>(out));
                put(sums, start == 0, height, width, out, inputs);
                continue;
              }
              const int64_t next = i + BLOCK < outer ? j * inputs + i + BLOCK : (j + BLOCK) * inputs + inner;
              accumulate(left, right, depth, start == 0, out, inputs,
                         reinterpret_cast<uintptr_t>(for_weight) + static_cast<size_t>(next) * sizeof(float));
            }
          }
        }
      }
    });
  }
  if (for_bias) std::copy_n(column_sums.at(0), outputs, for_bias);
  return OK;
#else
  (void)grad, (void)x, (void)rows, (void)outputs, (void)inputs, (void)for_weight, (void)for_bias, (void)threads;
  return NO_HARDWARE;
#endif
}

FASTMIM_EXPORT(linear_gradients)

}  // namespace fastmim
