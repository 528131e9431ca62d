// GELU of bfloat16, and its gradient, on 512-bit vectors; where the compiler's target has none, the functions say so and
// Python takes the reference.
#include "functions.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTMIM_HAS_AVX512 1
#endif

namespace fastmim {

#ifdef FASTMIM_HAS_AVX512
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t GRAIN = 2048;  // vectors per worker: below, a second thread costs more than it saves

inline __m512 load(const bfloat16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

// Rounds to the nearest, to even; a NaN stays one.
inline void store(__m512 x, __mmask16 mask, bfloat16* out) {
#ifdef __AVX512BF16__
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7FC0));
  const __m256i half = _mm512_cvtepi32_epi16(kept);
#endif
  _mm256_mask_storeu_epi16(out, mask, half);
}

struct Normal {
  __m512 below;   // the distribution function at x
  __m512 scaled;  // exp(-x^2 / 2)
};

// The tail of the normal distribution is exp(-y^2 / 2) times a polynomial in t = 1 / (1 + 0.38 y), as in Abramowitz and
// Stegun, 7.1.26, but fitted to the relative error: below 1e-4, a twentieth of what bfloat16 rounds.
inline Normal normal(__m512 x) {
  const __m512 y = _mm512_abs_ps(x);
  const __m512 e = exp2(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.72134752f)));
  const __m512 t = _mm512_rcp14_ps(_mm512_fmadd_ps(y, _mm512_set1_ps(0.38f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_set1_ps(-0.0899284682f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.18887644f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.0919802049f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.157829079f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.151225223f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);
  const __mmask16 is_negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  return {_mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(1.0f), tail), is_negative, tail), e};
}

inline __mmask16 first(int64_t count) { return static_cast<__mmask16>((uint32_t{1} << std::min(LANES, count)) - 1); }

}  // namespace
#endif

// x and out (count,) bfloat16.
static Status gelu(const void* x, void* out, int64_t count, int64_t threads) {
#ifdef FASTMIM_HAS_AVX512
  const auto* from = static_cast<const bfloat16*>(x);
  auto* to = static_cast<bfloat16*>(out);
  expect_writes(out, 2 * count);
  parallel_for((count + LANES - 1) / LANES, GRAIN, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin * LANES; i < std::min(count, end * LANES); i += LANES) {
      const __mmask16 mask = first(count - i);
      const __m512 v = load(from + i, mask);
      store(_mm512_mul_ps(v, normal(v).below), mask, to + i);
    }
  });
  return OK;
#else
  (void)x, (void)out, (void)count, (void)threads;
  return NO_HARDWARE;
#endif
}

// grad, of what `gelu` gave, and out, of x, like x; either may be the other. active: `gelu` of x again, or null.
static Status gelu_backward(const void* grad, const void* x, void* out, void* active, int64_t count, int64_t threads) {
#ifdef FASTMIM_HAS_AVX512
  const auto *g = static_cast<const bfloat16*>(grad), *from = static_cast<const bfloat16*>(x);
  auto *to = static_cast<bfloat16*>(out), *again = static_cast<bfloat16*>(active);
  expect_writes(out, 2 * count);
  if (again) expect_writes(again, 2 * count);
  parallel_for((count + LANES - 1) / LANES, GRAIN, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin * LANES; i < std::min(count, end * LANES); i += LANES) {
      const __mmask16 mask = first(count - i);
      const __m512 v = load(from + i, mask);
      const Normal n = normal(v);
      const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(v, _mm512_set1_ps(0.39894228f)), n.scaled, n.below);
      store(_mm512_mul_ps(load(g + i, mask), slope), mask, to + i);
      if (again) store(_mm512_mul_ps(v, n.below), mask, again + i);
    }
  });
  return OK;
#else
  (void)grad, (void)x, (void)out, (void)active, (void)count, (void)threads;
  return NO_HARDWARE;
#endif
}

FASTMIM_EXPORT(gelu)
FASTMIM_EXPORT(gelu_backward)

}  // namespace fastmim
