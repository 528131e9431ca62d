// Attention of one (image, head): to all keys, with or without numbers added to the scores, or to the best of each query.
//
// Its rows are copied into padded tables that the products can load, so neither the caller nor the kernel ever writes a
// permuted copy of the batch. Queries come in blocks of rows; a block's scores live in the cache. The backward pass computes
// the probabilities again from the saved logarithm of their sum.
#pragma once

#include "functions.h"
#include "products.h"
#include "selection.h"

#ifdef FASTMIM_HAS_PRODUCTS
namespace fastmim {

constexpr int64_t FEW = HALF;  // queries at a time in the forward pass: their scores, and what they become, fit into level 1
constexpr int64_t IMAGES = 16;  // whose gradients of the bias one thread sums: so any number of threads gives the same bits

// The keys that a query attends to, and by what scores.
enum Kind { ALL, BIASED, BEST };

// Writes rows of floats (columns `stride` apart) as bfloat16, each times its factor.
inline void write_row(const float* x, float factor, int64_t width, bfloat16* out) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < width; j += 16)
    store_rounded(_mm512_mul_ps(_mm512_loadu_ps(x + j), f), width - j, out + j);
}

// x (padded width, padded rows) floats -> `rows` rows of bfloat16, `stride` values apart.
inline void write_transposed(const float* x, int64_t padded_rows, int64_t rows, int64_t width, int64_t stride, bfloat16* out) {
  __m512i v[16];
  for (int64_t c = 0; c < width; c += 16) {
    for (int64_t r = 0; r < rows; r += 16) {
      for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(x + (c + i) * padded_rows + r);
      transpose16(v);
      for (int64_t i = 0; i < std::min<int64_t>(16, rows - r); ++i)
        store_rounded(_mm512_castsi512_ps(v[i]), width - c, out + (r + i) * stride + c);
    }
  }
}

// The columns of a padded row that count.
inline __mmask16 inside(int64_t length, int64_t j) {
  return static_cast<__mmask16>((uint32_t{1} << std::clamp<int64_t>(length - j, 0, 16)) - 1);
}

struct Shape {
  int64_t length, heads, width;
  int64_t rows() const { return blocks_up(length); }
  int64_t columns() const { return blocks_up(width); }
  // Of a product over all tokens; the rows from `length` on are zeros.
  int64_t depth() const { return up(length, DEPTHS); }
};

// (batch, heads, length, width): how far apart images, heads and rows are; the values of a row lie side by side.
template <class T>
struct Tokens {
  T* data;
  int64_t image, head, row;
  T* of(const Shape& s, int64_t item) const { return data + item / s.heads * image + item % s.heads * head; }
};
using Input = Tokens<const bfloat16>;
using Output = Tokens<bfloat16>;

struct Inputs {
  Input q, k, v;
};
struct Gradients {
  Output q, k, v;
};

// Of the keys after the prefix, each query after the prefix attends to its best.
struct Selection {
  int64_t prefix;
  float* least;           // (batch, heads, length): what the score of a key must reach
  const Quota* quota;     // the forward pass's
  const int64_t* labels;  // (batch, length - prefix), or null
  int64_t* counts;        // (batch, heads, length - prefix): keys kept that have the query's label; or null
};

// Added to the scores of all images.
struct Bias {
  const float* values;  // (heads, length, length), rows are queries
  float* grad;          // the same, of padded rows, for every IMAGES images; or null
};

// Room of one worker, cut up in order.
class Room {
 public:
  explicit Room(float* start) : next_(start) {}
  float* floats(int64_t count) {
    float* here = next_;
    next_ += padded(count);
    return here;
  }
  bfloat16* halves(int64_t count) { return reinterpret_cast<bfloat16*>(floats((count + 1) / 2)); }

 private:
  float* next_;
};

inline int64_t room_for(const Shape& s) {
  const int64_t n = s.rows(), d = s.columns();
  // At most ten tables of a head, a block of scores and one of their gradients, and two (n, n) tables in bfloat16.
  return 12 * padded(n * d) + 4 * padded(BLOCK * n) + 2 * padded(n * n / 2 + 1) + 2 * padded(BLOCK * d) + 2 * padded(n);
}

// Asks for a row of the head that comes next: the rows of a head lie far apart and would come one by one. Called between
// other work. Past the last head it asks for nothing of use, which is no fault. Always inline: GCC drops calls of functions
// that only prefetch.
__attribute__((always_inline)) inline void prefetch_row(const Shape& s, const Input& x, int64_t item, int64_t row) {
  if (row >= s.length) return;
  const auto start = reinterpret_cast<uintptr_t>(x.data) +
                     2 * static_cast<uintptr_t>(item / s.heads * x.image + item % s.heads * x.head + row * x.row);
  for (int64_t j = 0; j < s.width; j += BLOCK)
    _mm_prefetch(reinterpret_cast<const char*>(start + 2 * static_cast<uintptr_t>(j)), _MM_HINT_T0);
}

// The columns whose keys a query attends to: all, or the prefix and those whose scores reach `least`.
template <Kind KIND>
inline __mmask16 attended(const Shape& s, const Selection& select, const float* row, int64_t j, float least) {
  if constexpr (KIND != BEST) return inside(s.length, j);
  // Not less, instead of at least: a NaN shall come through to the result.
  const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_loadu_ps(row + j), _mm512_set1_ps(least), _CMP_NLT_UQ);
  return inside(s.length, j) & (kept | inside(select.prefix, j));
}

// 16 numbers of the bias of a query.
inline __m512 bias_at(const Shape& s, const Bias& bias, int64_t item, int64_t query, int64_t j) {
  const float* row = bias.values + (item % s.heads * s.length + std::min(query, s.length - 1)) * s.length;
  return _mm512_mul_ps(_mm512_maskz_loadu_ps(inside(s.length, j), row + j), _mm512_set1_ps(LOG2_E));
}

// The (image, head) that is computed after this one.
template <Kind KIND>
int64_t after(const Shape& s, int64_t item) {
  return item + (KIND == BIASED ? s.heads : 1);
}

template <Kind KIND>
void forward_head(const Shape& s, const Inputs& x, float scale, const Selection& select, const Bias& bias, int64_t item,
                  float* room, const Output& out, float* sums) {
  const int64_t n = s.rows(), d = s.columns(), patches = s.length - select.prefix;
  Room cut(room);
  bfloat16 *q = cut.halves(n * d), *rows = cut.halves(n * d), *k = cut.halves(n * d), *v = cut.halves(n * d);
  copy_rows(x.q.of(s, item), x.q.row, s.length, s.width, n, d, q);
  copy_rows(x.k.of(s, item), x.k.row, s.length, s.width, n, d, rows);
  transpose_words(rows, n, d / 2, k);
  copy_rows(x.v.of(s, item), x.v.row, s.length, s.width, n, d, rows);
  pair_rows(rows, n, d, v);
  float *scores = cut.floats(BLOCK * n), *mixed = cut.floats(BLOCK * d);
  bfloat16* p = cut.halves(BLOCK * n);
  [[maybe_unused]] float *space = cut.floats(n), *codes = cut.floats(n);
  if (KIND == BEST && select.counts) label_codes(select.labels + item / s.heads * patches, patches, codes);
  const __m512 factor = _mm512_set1_ps(scale * LOG2_E);
  for (int64_t i = 0; i < s.length; i += FEW) {
    const int64_t count = std::min(FEW, s.length - i);
    short_product(q + i * d, d, k, count, n, d, scores);
    alignas(64) float top[FEW] = {}, total[FEW] = {};
    for (int64_t r = 0; r < count; ++r) {
      for (const Input& table : {x.q, x.k, x.v}) prefetch_row(s, table, after<KIND>(s, item), i + r);
      float* row = scores + r * n;
      float least = -__builtin_huge_valf();
      if constexpr (KIND == BEST) {
        if (i + r >= select.prefix) {
          const int64_t patch = i + r - select.prefix;
          least = threshold(row + select.prefix, *select.quota, space);
          if (select.counts)
            select.counts[item * patches + patch] =
                count_kept(row + select.prefix, codes, patches, least, codes[patch]);
        }
        select.least[item * s.length + i + r] = least;
      }
      __m512 most = _mm512_set1_ps(-__builtin_huge_valf());
      for (int64_t j = 0; j < s.length; j += 16) {
        __m512 power = _mm512_mul_ps(_mm512_loadu_ps(row + j), factor);
        if constexpr (KIND == BIASED) {
          power = _mm512_add_ps(power, bias_at(s, bias, item, i + r, j));
          _mm512_storeu_ps(row + j, power);
        }
        most = _mm512_mask_max_ps(most, inside(s.length, j), most, power);
      }
      top[r] = _mm512_reduce_max_ps(most);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = 0; j < n; j += 16) {
        const __m512 power = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), KIND == BIASED ? _mm512_set1_ps(1.0f) : factor,
                                             _mm512_set1_ps(top[r]));
        const __m512 e = _mm512_maskz_mov_ps(attended<KIND>(s, select, row, j, least), exp2(power));
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + r * n + j), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e)));
      }
      total[r] = _mm512_reduce_add_ps(sum);
    }
    const __m512 logs = _mm512_add_ps(_mm512_load_ps(top), log2(_mm512_load_ps(total)));
    _mm512_mask_storeu_ps(sums + item * s.length + i, inside(s.length, i), logs);
    short_product(p, n, v, count, d, s.depth(), mixed);
    for (int64_t r = 0; r < count; ++r)
      write_row(mixed + r * d, 1 / total[r], s.width, out.of(s, item) + (i + r) * out.row);
  }
}

template <Kind KIND>
void backward_head(const Shape& s, const Input& grad, const Inputs& x, const float* sums, float scale,
                   const Selection& select, const Bias& bias, int64_t item, float* room, const Gradients& out) {
  const int64_t n = s.rows(), d = s.columns();
  Room cut(room);
  bfloat16 *q = cut.halves(n * d), *g = cut.halves(n * d), *rows = cut.halves(n * d), *pairs = cut.halves(n * d);
  bfloat16 *kt = cut.halves(n * d), *kp = cut.halves(n * d), *vt = cut.halves(n * d), *qt = cut.halves(n * d),
           *gt = cut.halves(n * d);
  copy_rows(x.q.of(s, item), x.q.row, s.length, s.width, n, d, q);
  copy_rows(grad.of(s, item), grad.row, s.length, s.width, n, d, g);
  // A table in pairs of rows, transposed by words, is the transposed table.
  pair_rows(q, n, d, pairs);
  transpose_words(pairs, n / 2, d, qt);
  pair_rows(g, n, d, pairs);
  transpose_words(pairs, n / 2, d, gt);
  copy_rows(x.k.of(s, item), x.k.row, s.length, s.width, n, d, rows);
  transpose_words(rows, n, d / 2, kt);
  pair_rows(rows, n, d, kp);
  copy_rows(x.v.of(s, item), x.v.row, s.length, s.width, n, d, rows);
  transpose_words(rows, n, d / 2, vt);

  float *p = cut.floats(BLOCK * n), *dp = cut.floats(BLOCK * n), *result = cut.floats(n * d);
  bfloat16 *ds = cut.halves(BLOCK * n), *p_pairs = cut.halves(n * n), *ds_pairs = cut.halves(n * n);
  const __m512 factor = _mm512_set1_ps(scale * LOG2_E), by_scale = _mm512_set1_ps(scale);
  [[maybe_unused]] float* for_bias = nullptr;
  if (KIND == BIASED && bias.grad)
    for_bias = bias.grad + (item / s.heads / IMAGES * s.heads + item % s.heads) * s.length * n;
  for (int64_t i = 0; i < s.length; i += BLOCK) {
    const int64_t count = std::min(BLOCK, s.depth() - i), lefts = up(count, LEFT_ROWS);
    product(q + i * d, d, kt, n, lefts, n, d, p, n);
    product(g + i * d, d, vt, n, lefts, n, d, dp, n);
    for (int64_t r = 0; r < count; r += PAIR) {
      __m512 along[PAIR], sum[PAIR];
      for (int64_t t = 0; t < PAIR; ++t) {
        float *row = p + (r + t) * n, *slope = dp + (r + t) * n;
        const bool counts = i + r + t < s.length;
        for (const Input& table : {x.q, x.k, x.v, grad}) prefetch_row(s, table, after<KIND>(s, item), i + r + t);
        const float least = KIND == BEST && counts ? select.least[item * s.length + i + r + t] : 0;
        sum[t] = _mm512_set1_ps(counts ? sums[item * s.length + i + r + t] : 0);
        along[t] = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; j += 16) {
          __m512 power = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), factor, sum[t]);
          if constexpr (KIND == BIASED) power = _mm512_add_ps(power, bias_at(s, bias, item, i + r + t, j));
          const __m512 e = _mm512_maskz_mov_ps(counts ? attended<KIND>(s, select, row, j, least) : 0, exp2(power));
          _mm512_storeu_ps(row + j, e);
          along[t] = _mm512_fmadd_ps(e, _mm512_loadu_ps(slope + j), along[t]);
        }
        along[t] = _mm512_set1_ps(_mm512_reduce_add_ps(along[t]));
      }
      bfloat16 *p_row = p_pairs + (i + r) / 2 * n * PAIR, *ds_row = ds_pairs + (i + r) / 2 * n * PAIR;
      for (int64_t j = 0; j < n; j += 16) {
        __m256i prob[PAIR], slope[PAIR];
        for (int64_t t = 0; t < PAIR; ++t) {
          const int64_t at = (r + t) * n + j;
          const __m512 e = _mm512_loadu_ps(p + at);
          const __m512 along_row = _mm512_sub_ps(_mm512_loadu_ps(dp + at), along[t]);
          if constexpr (KIND == BIASED) {
            if (for_bias && i + r + t < s.length) {
              float* here = for_bias + (i + r + t) * n + j;
              _mm512_store_ps(here, _mm512_fmadd_ps(e, along_row, _mm512_load_ps(here)));
            }
          }
          prob[t] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e));
          slope[t] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_mul_ps(e, by_scale), along_row)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + at), slope[t]);
        }
        const auto paired = [](const __m256i (&two)[PAIR]) {
          return _mm512_or_si512(_mm512_cvtepu16_epi32(two[0]), _mm512_slli_epi32(_mm512_cvtepu16_epi32(two[1]), 16));
        };
        _mm512_storeu_si512(p_row + j * PAIR, paired(prob));
        _mm512_storeu_si512(ds_row + j * PAIR, paired(slope));
      }
    }
    product(ds, n, kp, d, lefts, d, s.depth(), result, d);
    for (int64_t r = 0; r < std::min(BLOCK, s.length - i); ++r)
      write_row(result + r * d, 1.0f, s.width, out.q.of(s, item) + (i + r) * out.q.row);
  }
  product(qt, n, ds_pairs, n, d, n, s.depth(), result, n);
  write_transposed(result, n, s.length, s.width, out.k.row, out.k.of(s, item));
  product(gt, n, p_pairs, n, d, n, s.depth(), result, n);
  write_transposed(result, n, s.length, s.width, out.v.row, out.v.of(s, item));
}

}  // namespace fastmim
#endif
