// Cross entropy of rows of logits, in place: a row becomes the gradient with respect to its logits.
#include <cmath>

#include "functions.h"

namespace fastmim {
namespace {

// By value, so that nothing in the loop can alias the row: it would not be vectorized.
inline void exponentials(float* row, float high, float factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] = exponential((row[i] - high) * factor);
}

}  // namespace

// logits (rows, N), to be divided by `temperature`; the label of row r is first_label + r. losses (rows,) receives each
// row's loss; with is_gradient_wanted the logits become `weight` times its gradient by the undivided logits.
static Status cross_entropy_rows(float* logits, int64_t rows, int64_t n, int64_t first_label, double temperature,
                                 double smoothing, double weight, int64_t is_gradient_wanted, double* losses,
                                 int64_t threads) {
  if (rows > 0 && (first_label < 0 || first_label + rows > n)) return BAD_INDEX;
  const float factor = static_cast<float>(1 / temperature);
  parallel_for(rows, 16384 / (n + 1) + 1, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = logits + r * n;
      const int64_t label = first_label + r;
      const double for_label = static_cast<double>(row[label]) * factor;
      const auto value = [=](int64_t i) { return row[i]; };
      const double average = smoothing > 0 ? static_cast<double>(reduce(n, value)) * factor / static_cast<double>(n) : 0;
      const float high = largest(row, n);
      exponentials(row, high, factor, n);
      const float total = reduce(n, value);
      losses[r] = std::log(static_cast<double>(total)) + static_cast<double>(high) * factor -
                  (1 - smoothing) * for_label - smoothing * average;
      if (!is_gradient_wanted) continue;
      const float scale = static_cast<float>(weight) * factor / total;
      const float shift = static_cast<float>(smoothing * weight / static_cast<double>(n)) * factor;
      for (int64_t i = 0; i < n; ++i) row[i] = row[i] * scale - shift;
      row[label] -= static_cast<float>((1 - smoothing) * weight) * factor;
    }
  });
  return OK;
}

}  // namespace fastmim

FASTMIM_EXPORT(cross_entropy_rows)
