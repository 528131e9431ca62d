// exp in a form that loops vectorize on every machine: no branches, no calls.
#pragma once

#include "kernel.h"

namespace fastmim {

// exp(x) for x <= 1, at least exp(-87): 2^n exp(r), |r| <= ln(2) / 2. Relative error below 2e-7; NaN for NaN.
// Source of the polynomial: Cephes expf.
inline float exponential(float x) {
  constexpr float MAGIC = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the low bits
  const float bounded = x < -87.0f ? -87.0f : x;
  const float shifted = bounded * 1.44269504f + MAGIC, n = shifted - MAGIC;
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

}  // namespace fastmim
