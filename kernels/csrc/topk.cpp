// Softmax over the best keys of each query, row by row on blocks of scores that torch has multiplied.
#include "functions.h"
#include "selection.h"

namespace fastmim {
namespace {

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
    Floats scratch(2 * room * std::max<int64_t>(1, threads));
    const float factor = static_cast<float>(scale);
    const Quota quota(patches, topk);
    parallel_for(heads * n, rows_per_worker(n), threads, [&](int64_t begin, int64_t end, int64_t worker) {
      float *space = scratch.at(2 * worker * room), *codes = space + room;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t head = r / n, patch = r % n - prefix;
        float* row = scores + r * n;
        const bool is_other_image = r == begin || r % (heads_per_image * n) == 0;
        if (counts && is_other_image) label_codes(labels + head / heads_per_image * patches, patches, codes);
        const float least_kept = patch < 0 ? -INFINITE : safe_threshold(row + prefix, quota, space);
        if (counts && patch >= 0)
          counts[head * patches + patch] = count_kept(row + prefix, codes, patches, least_kept, codes[patch]);
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
