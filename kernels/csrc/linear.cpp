// Gradients of the weight and the bias of a linear layer, on matrix tiles (AMX).
//
// torch's product for the weight, grad^T x, reads both factors against their grain and gives bfloat16, which is then
// widened. Here a slice of rows of both is laid out for the tiles, and the sums stay float32. Slices follow each other in
// order and each sum belongs to one thread, so the result does not depend on the number of threads.
#include "tiles.h"

namespace fastmim {

#ifdef FASTMIM_HAS_TILES
namespace {

constexpr int64_t SLICE = 1024;  // rows at a time
constexpr int64_t STRIP = 256;   // outputs at a time: a slice of their gradients then takes 512 KB, of the level 2 cache
constexpr int64_t PIECE = 256;   // rows of a panel that are used for all outputs of a strip: 16 KB, of the level 1 cache
constexpr int64_t TILE = 16;

// 32 columns of x from row r on, as zeros outside the matrix.
inline __m512i columns(const bfloat16* x, int64_t rows, int64_t width, int64_t r, int64_t j) {
  return r < rows ? _mm512_maskz_loadu_epi16(first32(width - j), x + r * width + j) : _mm512_setzero_si512();
}

// (32 / 2, 32, 2) from 32 rows and 32 columns of x.
void pack_panel(const bfloat16* x, int64_t rows, int64_t width, int64_t start, int64_t j, bfloat16* out) {
  const Zip zip;
  for (int64_t r = 0; r < BLOCK; r += PAIR)
    zip(columns(x, rows, width, start + r, j), columns(x, rows, width, start + r + 1, j), out + r * BLOCK);
}

inline __m512 low_floats(__m512i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
}
inline __m512 high_floats(__m512i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}

// The transpose of 32 rows and 32 columns of the gradient as two tiles of (16 outputs, 32 rows); sums += the columns'.
void pack_strip(const bfloat16* grad, int64_t rows, int64_t width, int64_t start, int64_t j, bfloat16* out, float* sums) {
  const Zip zip;
  __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + TILE);
  alignas(64) uint32_t words[TILE][BLOCK];
  for (int64_t i = 0; i < TILE; ++i) {
    const __m512i even = columns(grad, rows, width, start + PAIR * i, j),
                  odd = columns(grad, rows, width, start + PAIR * i + 1, j);
    low = _mm512_add_ps(low, _mm512_add_ps(low_floats(even), low_floats(odd)));
    high = _mm512_add_ps(high, _mm512_add_ps(high_floats(even), high_floats(odd)));
    zip(even, odd, words[i]);
  }
  for (int64_t half = 0; half < 2; ++half) {
    __m512i v[TILE];
    for (int64_t i = 0; i < TILE; ++i) v[i] = _mm512_load_si512(words[i] + half * TILE);
    transpose16(v);
    for (int64_t i = 0; i < TILE; ++i) _mm512_storeu_si512(out + (half * TILE + i) * BLOCK, v[i]);
  }
  _mm512_store_ps(sums, low);
  _mm512_store_ps(sums + TILE, high);
}

// c (32, 32) += strip (depth) times panel (depth); from zero if it is the first piece.
void accumulate(const bfloat16* strip, const bfloat16* panel, int64_t depth, bool is_first, float* c) {
  constexpr size_t BYTES = BLOCK * sizeof(float);
  float *right = c + TILE, *below = c + TILE * BLOCK;
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, BYTES);
    _tile_loadd(1, right, BYTES);
    _tile_loadd(2, below, BYTES);
    _tile_loadd(3, below + TILE, BYTES);
  }
  for (int64_t r = 0; r < depth; r += BLOCK, strip += BLOCK * BLOCK, panel += BLOCK * BLOCK) {
    _tile_loadd(4, strip, 64);
    _tile_loadd(6, panel, 128);
    _tile_loadd(7, panel + BLOCK, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, strip + TILE * BLOCK, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, BYTES);
  _tile_stored(1, right, BYTES);
  _tile_stored(2, below, BYTES);
  _tile_stored(3, below + TILE, BYTES);
}

// Asks for the lines that `put` writes: they lie in other pages each, and come while the tiles are busy. Always inline: GCC
// drops calls of functions that only prefetch.
__attribute__((always_inline)) inline void expect(float* out, int64_t height, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < height; ++i, out += stride) {
    __builtin_prefetch(out, 1);
    if (width > TILE) __builtin_prefetch(out + TILE, 1);
  }
}

// (height, width) of the gradient = sums, or += sums.
void put(const float* sums, bool is_first, int64_t height, int64_t width, float* out, int64_t stride) {
  const __mmask16 left = static_cast<__mmask16>(first32(width)), right = static_cast<__mmask16>(first32(width) >> 16);
  for (int64_t i = 0; i < height; ++i, sums += BLOCK, out += stride) {
    __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + TILE);
    if (!is_first) {
      a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(left, out));
      b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(right, out + TILE));
    }
    _mm512_mask_storeu_ps(out, left, a);
    _mm512_mask_storeu_ps(out + TILE, right, b);
  }
}

}  // namespace
#endif

// grad (rows, outputs) and x (rows, inputs), bfloat16. Floats: for_weight (outputs, inputs), for_bias (outputs,) or null.
static Status linear_gradients(const void* grad, const void* x, int64_t rows, int64_t outputs, int64_t inputs,
                               float* for_weight, float* for_bias, int64_t threads) {
#ifdef FASTMIM_HAS_TILES
  if (!ask_for_tiles()) return NO_HARDWARE;
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
  Floats packed((lefts + panels) * BLOCK * slice / 2), column_sums(lefts * BLOCK);
  auto* all_strips = reinterpret_cast<bfloat16*>(packed.at(0));
  bfloat16* all_panels = all_strips + lefts * BLOCK * slice;
  std::fill_n(column_sums.at(0), lefts * BLOCK, 0.0f);
  for (int64_t start = 0; start < rows; start += slice) {
    const int64_t depth = blocks_up(std::min(slice, rows - start));
    // By rows, as both lie in memory: a column of blocks would touch a page per row.
    parallel_for(panels, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t r = 0; r < depth; r += BLOCK)
        for (int64_t p = begin; p < end; ++p)
          pack_panel(in, rows, inputs, start + r, p * BLOCK, all_panels + p * BLOCK * depth + r * BLOCK);
    });
    parallel_for(lefts, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t r = 0; r < depth; r += BLOCK)
        for (int64_t l = begin; l < end; ++l)
          pack_strip(g, rows, outputs, start + r, l * BLOCK, all_strips + l * BLOCK * depth + r * BLOCK,
                     column_sums.at(l * BLOCK));
    });
    parallel_for(strips, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
      configure_tiles();
      alignas(64) float sums[STRIP * BLOCK];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * strip, last = std::min(outputs, first + strip);
        for (int64_t p = 0; p < panels; ++p) {
          const bfloat16* panel = all_panels + p * BLOCK * depth;
          float* out = for_weight + p * BLOCK;
          // A piece of the panel stays in the level 1 cache while the strip passes by.
          for (int64_t r = 0; r < depth; r += PIECE) {
            const bool is_last = r + PIECE >= depth;
            for (int64_t j = first; j < last; j += BLOCK) {
              float* block = sums + (j - first) * BLOCK;
              const int64_t height = std::min(BLOCK, last - j), width = std::min(BLOCK, inputs - p * BLOCK);
              if (is_last) expect(out + j * inputs, height, width, inputs);
              accumulate(all_strips + j * depth + r * BLOCK, panel + r * BLOCK, std::min(PIECE, depth - r), r == 0, block);
              if (is_last) put(block, start == 0, height, width, out + j * inputs, inputs);
            }
          }
        }
      }
      _tile_release();
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
