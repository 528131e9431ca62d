// Softmax over the best keys of each query, row by row on blocks of scores that torch has multiplied.
#include <cmath>
#include <limits>

#include "functions.h"

namespace fastmim {
namespace {

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
  int32_t lanes[LANES] = {}, count = 0;
  for (int64_t i = 0; i < room; i += LANES)
#pragma omp simd
    for (int64_t j = 0; j < LANES; ++j) lanes[j] += scores[i + j] >= candidate;
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < LANES; ++j) count += lanes[j];
  return count;
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

// A number that exactly topk of n scores reach; the topk-th best score where ties leave none.
float split(const float* scores, int64_t n, int64_t room, int64_t topk) {
  const auto score = [=](int64_t i) { return scores[i]; };
  auto [low, high] = extremes(room, score, score);
  // Interpolation, and every fourth time the middle: 6 counts on average for 49 of 196 normal numbers; the bits of the
  // score, below, take 32.
  int64_t reach_low = n, reach_high = 1;
  for (int step = 0; step < 16; ++step) {
    const float share = static_cast<float>(reach_low - topk) / static_cast<float>(reach_low - reach_high);
    const float middle = low + (high - low) * (step % 4 == 3 ? 0.5f : std::min(std::max(share, 0.05f), 0.95f));
    const int64_t reached = count_reached(scores, room, middle);
    if (reached == topk) return middle;
    (reached > topk ? low : high) = middle;
    (reached > topk ? reach_low : reach_high) = reached;
  }
  // Ties, numbers of very different size, infinities: the bits of the score itself, from the highest down.
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = found | (uint32_t{1} << bit);
    if (count_reached(scores, room, unordered(candidate)) >= topk) found = candidate;
  }
  return unordered(found);
}

// A score between the topk-th best and the next lower one, halfway where there is room, so that scores summed in
// another order select the same. `space` is room for padded(n) floats.
float threshold(const float* row, int64_t n, int64_t topk, float* space) {
  if (topk == n) return -INFINITE;
  const int64_t room = (n + LANES - 1) / LANES * LANES;
  std::copy_n(row, n, space);
  std::fill(space + n, space + room, std::numeric_limits<float>::quiet_NaN());
  const float* const scores = space;
  const float between = split(scores, n, room, topk);
  const auto [least, below] = extremes(
      room, [=](int64_t i) { return scores[i] >= between ? scores[i] : INFINITE; },
      [=](int64_t i) { return scores[i] < between ? scores[i] : -INFINITE; });
  if (below == -INFINITE) return least;
  return unordered(ordered(least) - (ordered(least) - ordered(below)) / 2);
}

template <class T>
inline void write_row(const float* p, float factor, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(p[i] * factor, out[i]);
}

// row[i] = exp((row[i] - top) * scale) for keys that are kept: the prefix, and what is not below `least`; 0 for others.
inline void exponentials(float* row, float top, float scale, float least, int64_t prefix, int64_t n) {
  for (int64_t i = 0; i < prefix; ++i) row[i] = exponential((row[i] - top) * scale);
#pragma omp simd
  for (int64_t i = prefix; i < n; ++i) {
    const float weight = exponential((row[i] - top) * scale);
    row[i] = row[i] < least ? 0.0f : weight;
  }
}

inline int64_t rows_per_worker(int64_t n) { return 8192 / (n + 1) + 1; }

}  // namespace

// scores (heads, N, N), unscaled and overwritten; out like scores, of dtype `dtype`: the weights. tops and least
// (heads, N): what the backward pass needs to make the weights again, exp((score - top) * scale) where score >= least.
// counts (heads, N - P) from labels (heads / heads_per_image, N - P), or both null.
static Status topk_softmax(float* scores, int64_t heads, int64_t n, int64_t prefix, int64_t topk, double scale,
                           void* out, int64_t dtype, float* tops, float* least, const int64_t* labels,
                           int64_t heads_per_image, int64_t* counts, int64_t threads) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t patches = n - prefix, room = padded(patches);
    Floats scratch(room * std::max<int64_t>(1, threads));
    const float factor = static_cast<float>(scale);
    parallel_for(heads * n, rows_per_worker(n), threads, [&](int64_t begin, int64_t end, int64_t worker) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t head = r / n, patch = r % n - prefix;
        float* row = scores + r * n;
        float* space = scratch.at(worker * room);
        const float least_kept = patch < 0 ? -INFINITE : threshold(row + prefix, patches, topk, space);
        if (counts && patch >= 0) {
          const int64_t* from = labels + head / heads_per_image * patches;
          int64_t count = 0;
          for (int64_t i = 0; i < patches; ++i) count += !(row[prefix + i] < least_kept) && from[i] == from[patch];
          counts[head * patches + patch] = count;
        }
        const float high = largest(row, n);
        exponentials(row, high, factor, least_kept, prefix, n);
        const float total = reduce(n, [=](int64_t i) { return row[i]; });
        write_row(row, 1 / total, n, static_cast<T*>(out) + r * n);
        tops[r] = high + std::log(total) / factor;
        least[r] = least_kept;
      }
    });
    return OK;
  });
}

// scores, tops and least as above; grad like out, the gradient of the weights. weights and slopes like out: the weights
// again, and the gradient of the unscaled scores; either may be grad itself.
static Status topk_softmax_backward(float* scores, int64_t heads, int64_t n, int64_t prefix, double scale,
                                    const float* tops, const float* least, const void* grad, int64_t dtype,
                                    void* weights, void* slopes, int64_t threads) {
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t room = padded(n);
    Floats scratch(room * std::max<int64_t>(1, threads));
    const float factor = static_cast<float>(scale);
    parallel_for(heads * n, rows_per_worker(n), threads, [&](int64_t begin, int64_t end, int64_t worker) {
      float* g = scratch.at(worker * room);
      for (int64_t r = begin; r < end; ++r) {
        float* row = scores + r * n;
        const T* from = static_cast<const T*>(grad) + r * n;
        exponentials(row, tops[r], factor, least[r], prefix, n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) g[i] = to_float(from[i]);
        const float average = reduce(n, [=](int64_t i) { return row[i] * g[i]; });
        write_row(row, 1, n, static_cast<T*>(weights) + r * n);
        T* slope = static_cast<T*>(slopes) + r * n;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) from_float(row[i] * (g[i] - average) * factor, slope[i]);
      }
    });
    return OK;
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(topk_softmax)
FASTMIM_EXPORT(topk_softmax_backward)
