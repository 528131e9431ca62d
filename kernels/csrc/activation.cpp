// GELU of bfloat16, and its gradient, looked up: there are 65,536 numbers of that type. Results are rounded once; a GELU takes
// less than half of the time that a polynomial takes. Not on the CPUs that multiply bfloat16 by vectors alone, most of them AMD's,
// which are slow to gather: they compute it, which takes half of the time there. The GELU is the same, but for 0 instead of
// what is below 1.2e-38; slopes are off by 2e-5 of themselves at most.
#include <cmath>

#include "functions.h"

#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
#define FASTMIM_COMPUTES_GELU 1
#endif

namespace fastmim {
namespace {

constexpr int64_t GRAIN = 32768;  // values per worker: below, a second thread costs more than it saves

#ifdef FASTMIM_COMPUTES_GELU
constexpr int64_t PIECES = 16;  // as many as a register holds
constexpr float MOST = 13.19f;  // above, Phi(-u) is nothing beside 1, and u Phi(-u) less than any normal number

// Of u = |x| <= MOST, as Phi(-u) is 2^p(u), and Phi(-u) - u phi(u) is Phi(-u) g(u): p and g, by powers of the distance from the
// whole number next to u.
struct Tables {
  alignas(64) float exponents[5][PIECES];
  alignas(64) float factors[6][PIECES];

  Tables() {
    const auto below = [](double u) { return 0.5 * std::erfc(u * 0.70710678118654752); };
    interpolate([&](double u) { return std::log2(below(u)); }, exponents);
    interpolate([&](double u) { return 1 - u * 0.39894228040143268 * std::exp(-u * u / 2) / below(u); }, factors);
  }

 private:
  // Newton's interpolation at Chebyshev's points.
  template <class F, int N>
  static void interpolate(F&& f, float (&powers)[N][PIECES]) {
    for (int64_t piece = 0; piece < PIECES; ++piece) {
      double at[N], c[N];
      for (int i = 0; i < N; ++i) {
        at[i] = 0.5 * std::cos(3.14159265358979324 * (i + 0.5) / N);
        c[i] = f(static_cast<double>(piece) + at[i]);
      }
      for (int j = 1; j < N; ++j)
        for (int i = N - 1; i >= j; --i) c[i] = (c[i] - c[i - 1]) / (at[i] - at[i - j]);
      for (int j = N - 2; j >= 0; --j)
        for (int i = j; i < N - 1; ++i) c[i] -= at[j] * c[i + 1];
      for (int i = 0; i < N; ++i) powers[i][piece] = static_cast<float>(c[i]);
    }
  }
};
#else
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
#endif

// Filled in at the first call; all numbers take some milliseconds.
const Tables& tables() {
  static const Tables found;
  return found;
}

#ifdef __AVX512F__
constexpr int64_t LANES = 16;

// Up to 16 of them, as many as `count`; masks cost time.
inline __m512i numbers(const bfloat16* x, int64_t count) {
  return _mm512_cvtepu16_epi32(count < LANES ? _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << count) - 1), x)
                                             : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline void store(__m256i x, bfloat16* out, int64_t count) {
  if (count < LANES)
    _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1 << count) - 1), x);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x);
}

inline __m512 widened(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }

// What from_float does, subnormal numbers included, which the CPU's own instruction takes for zeros.
inline __m256i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), is_nan, _mm512_set1_epi32(0x7FC0)));
}

// Of 16 numbers, each by itself: the result does not depend on which are beside it.
#ifdef FASTMIM_COMPUTES_GELU
class Gelu {
 public:
  Gelu(const Tables& tables, __m512i number) : tables_(tables), x_(widened(number)) {
    // Of a NaN and a number these instructions give the second.
    u_ = _mm512_min_ps(_mm512_set1_ps(MOST), _mm512_abs_ps(x_));
    piece_ = _mm512_cvtps_epi32(u_);
    distance_ = _mm512_reduce_ps(u_, _MM_FROUND_TO_NEAREST_INT);
    below_ = exp2(polynomial(tables_.exponents));
  }
  __m256i value() const {
    const __m512 y = _mm512_fnmadd_ps(u_, below_, _mm512_max_ps(_mm512_setzero_ps(), x_));
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y));
  }
  __m512 slope() const {
    const __m512 falling = _mm512_mul_ps(below_, polynomial(tables_.factors));
    const __mmask16 is_above = _mm512_cmp_ps_mask(x_, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_sub_ps(falling, is_above, _mm512_set1_ps(1.0f), falling);
  }

 private:
  // In pairs (Estrin's scheme): one power after the other, each step would wait for the one before.
  template <int N>
  __m512 polynomial(const float (&powers)[N][PIECES]) const {
    const auto factor = [&](int i) { return _mm512_permutexvar_ps(piece_, _mm512_load_ps(powers[i])); };
    const auto pair = [&](int i) { return i + 1 < N ? _mm512_fmadd_ps(distance_, factor(i + 1), factor(i)) : factor(i); };
    const __m512 square = _mm512_mul_ps(distance_, distance_);
    __m512 y = pair((N - 1) / 2 * 2);
    for (int i = (N - 1) / 2 * 2 - 2; i >= 0; i -= 2) y = _mm512_fmadd_ps(square, y, pair(i));
    return y;
  }

  const Tables& tables_;
  __m512 x_, u_, distance_, below_;
  __m512i piece_;
};
#else
class Gelu {
 public:
  Gelu(const Tables& tables, __m512i number) : tables_(tables), number_(number) {}
  __m256i value() const {
    return _mm512_cvtepi32_epi16(_mm512_i32gather_epi32(number_, tables_.values, sizeof(bfloat16)));
  }
  __m512 slope() const { return _mm512_i32gather_ps(number_, tables_.slopes, sizeof(float)); }

 private:
  const Tables& tables_;
  __m512i number_;
};
#endif

// body(i, n): n values from i on, 16 but for the last.
template <class Body>
inline void by_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) body(i, LANES);
  if (i < count) body(i, count - i);
}
#endif

void look_up(const Tables& t, const bfloat16* x, bfloat16* out, int64_t count) {
#ifdef __AVX512F__
  by_lanes(count, [&](int64_t i, int64_t n) { store(Gelu(t, numbers(x + i, n)).value(), out + i, n); });
#else
  for (int64_t i = 0; i < count; ++i) out[i] = t.values[x[i].bits];
#endif
}

// out = grad times the slope at x; out may be either of them. again: GELU of x, or null.
void multiply(const Tables& t, const bfloat16* grad, const bfloat16* x, bfloat16* out, bfloat16* again, int64_t count) {
#ifndef FASTMIM_COMPUTES_GELU
  // First, as x may be written over; by itself, as the two tables do not fit a cache together.
  if (again) look_up(t, x, again, count);
  again = nullptr;
#endif
#ifdef __AVX512F__
  by_lanes(count, [&](int64_t i, int64_t n) {
    const Gelu gelu(t, numbers(x + i, n));
    const __m512 g = widened(numbers(grad + i, n));
    if (again) store(gelu.value(), again + i, n);
    store(rounded(_mm512_mul_ps(g, gelu.slope())), out + i, n);
  });
#else
  for (int64_t i = 0; i < count; ++i) from_float(to_float(grad[i]) * t.slopes[x[i].bits], out[i]);
#endif
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
      multiply(t, g + i, from + i, to + i, again ? again + i : nullptr, std::min(PART, end - i));
    }
  });
  return OK;
}

FASTMIM_EXPORT(gelu)
FASTMIM_EXPORT(gelu_backward)

}  // namespace fastmim
