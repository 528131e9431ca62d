// GELU of bfloat16, and its gradient, looked up: there are 65,536 numbers of that type. Results are rounded once and do not
// depend on the CPU; a GELU takes less than half of the time that a polynomial takes.
#include <cmath>

#include "functions.h"

namespace fastmim {
namespace {

constexpr int64_t GRAIN = 32768;  // values per worker: below, a second thread costs more than it saves
constexpr int64_t NUMBERS = 65536;

struct Tables {
  bfloat16 values[NUMBERS + 1];  // x Phi(x), and one more, as two are read at a time
  float slopes[NUMBERS];         // its derivative, Phi(x) + x phi(x)

  Tables() {
    for (int64_t i = 0; i < NUMBERS; ++i) {
      const double x = to_float(bfloat16{static_cast<uint16_t>(i)}), below = 0.5 * std::erfc(-x * 0.70710678118654752);
      from_float(static_cast<float>(x * below), values[i]);
      slopes[i] = static_cast<float>(below + x * 0.39894228040143268 * std::exp(-x * x / 2));
    }
    values[NUMBERS] = values[0];
  }
};

// Filled in at the first call, which takes some milliseconds.
const Tables& tables() {
  static const Tables found;
  return found;
}

#ifdef __AVX512F__
constexpr int64_t LANES = 16;

inline __m512i numbers(const bfloat16* x) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline void store(__m512i low_halves, bfloat16* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(low_halves));
}

// What from_float does, subnormal numbers included, which the CPU's own instruction takes for zeros.
inline __m512i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7FC0));
}
#endif

void look_up(const Tables& t, const bfloat16* x, bfloat16* out, int64_t count) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + LANES <= count; i += LANES)
    store(_mm512_i32gather_epi32(numbers(x + i), t.values, sizeof(bfloat16)), out + i);
#endif
  for (; i < count; ++i) out[i] = t.values[x[i].bits];
}

// out = grad times the slope at x; out may be either of them.
void multiply(const Tables& t, const bfloat16* grad, const bfloat16* x, bfloat16* out, int64_t count) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + LANES <= count; i += LANES) {
    const __m512 g = _mm512_castsi512_ps(_mm512_slli_epi32(numbers(grad + i), 16));
    store(rounded(_mm512_mul_ps(g, _mm512_i32gather_ps(numbers(x + i), t.slopes, sizeof(float)))), out + i);
  }
#endif
  for (; i < count; ++i) from_float(to_float(grad[i]) * t.slopes[x[i].bits], out[i]);
}

}  // namespace

// x and out (count,) bfloat16.
static Status gelu(const void* x, void* out, int64_t count, int64_t threads) {
  const auto* from = static_cast<const bfloat16*>(x);
  auto* to = static_cast<bfloat16*>(out);
  const Tables& t = tables();
  expect_writes(out, 2 * count);
  parallel_for(count, GRAIN, threads,
               [&](int64_t begin, int64_t end, int64_t) { look_up(t, from + begin, to + begin, end - begin); });
  return OK;
}

// grad, of what `gelu` gave, and out, of x, like x; either may be the other. active: `gelu` of x again, or null.
static Status gelu_backward(const void* grad, const void* x, void* out, void* active, int64_t count, int64_t threads) {
  constexpr int64_t PART = 2048;  // values that stay in the level 1 cache for both passes
  const auto *g = static_cast<const bfloat16*>(grad), *from = static_cast<const bfloat16*>(x);
  auto *to = static_cast<bfloat16*>(out), *again = static_cast<bfloat16*>(active);
  const Tables& t = tables();
  expect_writes(out, 2 * count);
  if (again) expect_writes(again, 2 * count);
  parallel_for(count, GRAIN, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; i += PART) {
      const int64_t part = std::min(PART, end - i);
      // First, as `multiply` may write over x.
      if (again) look_up(t, from + i, again + i, part);
      multiply(t, g + i, from + i, to + i, part);
    }
  });
  return OK;
}

FASTMIM_EXPORT(gelu)
FASTMIM_EXPORT(gelu_backward)

}  // namespace fastmim
