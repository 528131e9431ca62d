// Which keys are among the best of a query, from the row of its scores.
#pragma once

#include <cmath>
#include <limits>

#include "functions.h"

namespace fastmim {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// uint32 that orders as numbers do, +0 and -0 being one.
inline uint32_t ordered(float score) {
  const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float unordered(uint32_t key) { return bit_cast<float>(key >> 31 ? key & 0x7FFFFFFFu : ~key); }

// Rows are searched in whole blocks, filled up with NaN, to which every comparison says no.
constexpr int64_t LANES = 32;

inline int64_t count_reached(const float* scores, int64_t room, float candidate) {
#ifdef __AVX512F__
  // Masks, whose bits are counted: half the time of what compilers make of the loop below.
  const __m512 wanted = _mm512_set1_ps(candidate);
  int64_t even = 0, odd = 0;
  for (int64_t i = 0; i < room; i += LANES) {
    even += __builtin_popcount(_cvtmask16_u32(_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), wanted, _CMP_GE_OQ)));
    odd += __builtin_popcount(_cvtmask16_u32(_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i + 16), wanted, _CMP_GE_OQ)));
  }
  return even + odd;
#else
  int32_t lanes[LANES] = {}, count = 0;
  for (int64_t i = 0; i < room; i += LANES)
#pragma omp simd
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += scores[i + j] >= candidate;
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < LANES; ++j) count += lanes[j];
  return count;
#endif
}

// Sum of term(i), i below `room`.
template <class Term>
inline float sum_of(int64_t room, Term term) {
  float lanes[LANES] = {};
  for (int64_t i = 0; i < room; i += LANES)
#pragma omp simd
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += term(i + j);
  fold<LANES>(lanes, [](float a, float b) { return a + b; });
  return lanes[0];
}

// The smallest of low(i) and the largest of high(i), i below `room`.
template <class Low, class High>
inline std::pair<float, float> extremes(int64_t room, Low low, High high) {
  const auto smaller = [](float a, float b) { return b < a ? b : a; };
  const auto larger = [](float a, float b) { return a < b ? b : a; };
  float lows[LANES], highs[LANES];
  std::fill_n(lows, LANES, INFINITE);
  std::fill_n(highs, LANES, -INFINITE);
  for (int64_t i = 0; i < room; i += LANES)
#pragma omp simd
    for (int64_t j = 0; j < LANES; ++j) {
      lows[j] = smaller(lows[j], low(i + j));
      highs[j] = larger(highs[j], high(i + j));
    }
  fold<LANES>(lows, smaller);
  fold<LANES>(highs, larger);
  return {lows[0], highs[0]};
}

// How many of how many scores are wanted, and where that would be among normal numbers.
struct Quota {
  Quota(int64_t count, int64_t wanted) : n(count), topk(wanted) {
    // Bisection: once per call of an op.
    const double share = (static_cast<double>(topk) - 0.5) / static_cast<double>(n);
    double low = -6, high = 6;
    for (int step = 0; step < 40; ++step) {
      const double middle = (low + high) / 2;
      (std::erfc(middle * std::sqrt(0.5)) / 2 > share ? low : high) = middle;
    }
    place = static_cast<float>(low);
    gap = static_cast<float>(std::sqrt(2 * M_PI) * std::exp(low * low / 2) / static_cast<double>(n));
  }
  int64_t n, topk;
  float place;  // of the topk-th best, in deviations from the mean
  float gap;    // from there to the next, in deviations
};

// A number that exactly topk of n scores reach; the topk-th best score where ties leave none. From the place among normal
// numbers: 3 to 4 counts on average for 49 of 196, where the middle of what is left takes 6, and the bits of the score 32.
inline float split(const float* scores, int64_t room, const Quota& quota) {
  // NaN behind the end, and among the scores, are passed over.
  const float number = 1 / static_cast<float>(quota.n);
  const float mean = number * sum_of(room, [=](int64_t i) { return scores[i] == scores[i] ? scores[i] : 0; });
  const float square = number * sum_of(room, [=](int64_t i) {
    const float apart = scores[i] - mean;
    return apart == apart ? apart * apart : 0;
  });
  const float deviation = std::sqrt(square);
  float low = -INFINITE, high = INFINITE, guess = mean + quota.place * deviation;
  int64_t reach_low = quota.n, reach_high = 0;
  for (int step = 0; step < 16; ++step) {
    const int64_t reached = count_reached(scores, room, guess), surplus = reached - quota.topk;
    if (!surplus) return guess;
    (surplus > 0 ? low : high) = guess;
    (surplus > 0 ? reach_low : reach_high) = reached;
    if (low > -INFINITE && high < INFINITE) {
      const float share = static_cast<float>(reach_low - quota.topk) / static_cast<float>(reach_low - reach_high);
      guess = low + (high - low) * (step % 4 == 3 ? 0.5f : std::min(std::max(share, 0.05f), 0.95f));
    } else {
      guess += quota.gap * deviation * static_cast<float>(surplus) * static_cast<float>(1 + step / 2);
    }
  }
  // Ties, numbers of very different size, infinities: the bits of the score itself, from the highest down.
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = found | (uint32_t{1} << bit);
    if (count_reached(scores, room, unordered(candidate)) >= quota.topk) found = candidate;
  }
  return unordered(found);
}

// `room` scores in whole blocks: n of them, and NaN, in `space`.
inline int64_t blocks_of(const float* row, int64_t n, float* space) {
  const int64_t room = (n + LANES - 1) / LANES * LANES;
  std::copy_n(row, n, space);
  std::fill(space + n, space + room, std::numeric_limits<float>::quiet_NaN());
  return room;
}

// What a score must reach to be kept. Scores that are computed again must be the same to the last bit. `space` is room for
// padded(n) floats.
inline float threshold(const float* row, const Quota& quota, float* space) {
  if (quota.topk == quota.n) return -INFINITE;
  return split(space, blocks_of(row, quota.n, space), quota);
}

// The same between the topk-th best score and the next lower one, halfway where there is room, so that scores summed in
// another order select the same.
inline float safe_threshold(const float* row, const Quota& quota, float* space) {
  if (quota.topk == quota.n) return -INFINITE;
  const int64_t room = blocks_of(row, quota.n, space);
  const float* const scores = space;
  const float between = split(scores, room, quota);
  const auto [least, below] = extremes(
      room, [=](int64_t i) { return scores[i] >= between ? scores[i] : INFINITE; },
      [=](int64_t i) { return scores[i] < between ? scores[i] : -INFINITE; });
  if (below == -INFINITE) return least;
  return unordered(ordered(least) - (ordered(least) - ordered(below)) / 2);
}

// codes[i]: the first place that has the label of place i. Equal where labels are, and floats, as the scores are.
inline void label_codes(const int64_t* labels, int64_t n, float* codes) {
  for (int64_t i = 0; i < n; ++i) {
    int64_t first = 0;
    while (labels[first] != labels[i]) ++first;
    codes[i] = static_cast<float>(first);
  }
}

// How many keys are kept and have the code.
inline int64_t count_kept(const float* scores, const float* codes, int64_t n, float least, float code) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += !(scores[i] < least) & (codes[i] == code);
  return count;
}

}  // namespace fastmim
