// exp in a form that loops vectorize on every machine: no branches, no calls; exp2 and log2 by 512-bit vectors.
#pragma once

#include "kernel.h"

#ifdef __AVX512F__
// GCC 12 takes its own headers' deliberately undefined vectors for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace fastmim {

constexpr float LOG2_E = 1.44269504f;

// exp(x) for x <= 1, at least exp(-87): 2^n exp(r), |r| <= ln(2) / 2. Relative error below 2e-7; NaN for NaN.
// Source of the polynomial: Cephes expf.
inline float exponential(float x) {
  constexpr float MAGIC = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * LOG2_E + MAGIC, n = shifted - MAGIC;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bit_cast<float>((bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(MAGIC) + 127u) << 23);
}

#ifdef __AVX512F__
// 2^x for x <= 0, to 2 units in the last place: far below what bfloat16 keeps. Minimax polynomial of 2^f on [-0.5, 0.5].
inline __m512 exp2(__m512 x) {
  // In this order a NaN stays one: of a NaN and a number the instruction gives the second.
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  // In pairs: one by one, each step would wait for the one before.
  const __m512 f2 = _mm512_mul_ps(f, f);
  __m512 y = _mm512_fmadd_ps(f, _mm512_set1_ps(1.33395865e-3f), _mm512_set1_ps(9.61812911e-3f));
  y = _mm512_fmadd_ps(y, f2, _mm512_fmadd_ps(f, _mm512_set1_ps(5.55041087e-2f), _mm512_set1_ps(2.40226507e-1f)));
  y = _mm512_fmadd_ps(y, f2, _mm512_fmadd_ps(f, _mm512_set1_ps(6.93147181e-1f), _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, whole);
}

// log2(x) of positive numbers, by the series of artanh around 1; to 1e-7 of the larger of 1 and the result.
inline __m512 log2(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  // getexp gives the exponent of a fraction in [1, 2).
  const __m512 e = _mm512_getexp_ps(x), whole = _mm512_mask_add_ps(e, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), e, one);
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(s, s);
  __m512 y = _mm512_set1_ps(1.0f / 9);
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(1.0f / 7));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(1.0f / 5));
  y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(1.0f / 3));
  y = _mm512_fmadd_ps(y, square, one);
  return _mm512_fmadd_ps(_mm512_mul_ps(y, s), _mm512_set1_ps(2 * LOG2_E), whole);
}
#endif

}  // namespace fastmim
