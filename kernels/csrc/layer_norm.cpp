// Residual addition and LayerNorm: forward and backward each read their inputs once.
#include <cmath>
#include <vector>

#include "kernel.h"

namespace fastmim {
namespace {

// The rows are cut into as many chunks on every machine, so that sums over them do not depend on the number of threads.
constexpr int64_t CHUNKS = 64;

// Rows at a time, forward and backward: what one waits for, sums over its values and their square root, is found while the next
// is computed. More of the backward pass's, which keeps twice as much, do not fit the cache.
constexpr int64_t TOGETHER = 8, PAIR_OF_ROWS = 2;

// Floats of a row. A power of two would put rows at the same place of their pages, where they hinder each other.
inline int64_t room_of(int64_t width) { return padded(width) + 32; }

inline int64_t rows_per_worker(int64_t width) { return 16384 / (width + 1) + 1; }

// sum = value(0), value(1) ..., rounded to the numbers of H, which are stored, if `after` is not null.
template <class H, class Value>
inline void sum_up(int64_t n, Value value, H* after, float* sum) {
  if (after) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      from_float(value(i), after[i]);
      sum[i] = to_float(after[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = value(i);
  }
}

// sum = residual + x * scale * factor, each part where it is not null, as above. Without scale, factor alone.
template <class X, class H>
inline void add_branch(const X* x, const H* residual, const float* scale, float factor, int64_t n, H* after, float* sum) {
  const auto branch = [=](int64_t i) { return to_float(x[i]) * factor; };
  const auto scaled = [=](int64_t i) { return to_float(x[i]) * scale[i] * factor; };
  const auto stream = [=](int64_t i) { return to_float(residual[i]); };
  if (scale && residual)
    sum_up(n, [=](int64_t i) { return scaled(i) + stream(i); }, after, sum);
  else if (scale)
    sum_up(n, scaled, after, sum);
  else if (residual)
    sum_up(n, [=](int64_t i) { return branch(i) + stream(i); }, after, sum);
  else
    sum_up(n, branch, after, sum);
}

// Over a row, of slope and of slope times unit, see below.
struct Averages {
  float plain, along;
};

// Of a row: unit, the normalized h, and slope, the gradient of what weight and bias were applied to. Both for_weight and
// for_bias are added to.
template <class X, class H>
inline Averages before_normalization(const X* grad, const H* h, const float* stats, const float* weight, int64_t n, float* unit,
                                     float* slope, float* for_weight, float* for_bias) {
  const float mean = stats[0], inverse = stats[1], count = static_cast<float>(n);
  const float total = reduce(n, [=](int64_t i) {
    const float g = to_float(grad[i]), normal = (to_float(h[i]) - mean) * inverse;
    unit[i] = normal;
    for_weight[i] += g * normal;
    for_bias[i] += g;
    return slope[i] = g * weight[i];
  });
  return {total / count, reduce(n, [=](int64_t i) { return slope[i] * unit[i]; }) / count};
}

// From these the gradient of the row h, to which `further` is added if it is not null: stored in slope, and in out if that is
// not null.
template <class H>
inline void through_normalization(Averages mean, float inverse, const float* unit, const H* further, int64_t n, float* slope,
                                  H* out) {
  const auto value = [=](int64_t i) { return inverse * (slope[i] - mean.plain - unit[i] * mean.along); };
  const auto put = [=](auto sum) {
    if (out) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        slope[i] = sum(i);
        from_float(slope[i], out[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) slope[i] = sum(i);
    }
  };
  if (further)
    put([=](int64_t i) { return value(i) + to_float(further[i]); });
  else
    put(value);
}

}  // namespace

// x (rows, D) of dtype `from`; residual and h of dtype `to`, each or null. Floats: weight (D,), bias and scale (D,) or
// null, row_scale, one per `rows_per_scale` rows, or null. y like x; stats (rows, 2): mean and 1 / standard deviation.
static Status add_layer_norm(const void* x, int64_t from, const void* residual, int64_t to, const float* weight,
                             const float* bias, const float* scale, const float* row_scale, int64_t rows_per_scale,
                             double eps, int64_t rows, int64_t width, void* y, void* h, float* stats, int64_t threads) {
  return with_float(from, [&](auto element) {
    return with_float(to, [&](auto stream) {
      using X = decltype(element);
      using H = decltype(stream);
      const int64_t room = room_of(width);
      Floats scratch(TOGETHER * room * std::max<int64_t>(1, threads));
      expect_writes(y, rows * width * static_cast<int64_t>(sizeof(X)));
      if (h) expect_writes(h, rows * width * static_cast<int64_t>(sizeof(H)));
      parallel_for(rows, rows_per_worker(width), threads, [&](int64_t begin, int64_t end, int64_t worker) {
        float* sums = scratch.at(TOGETHER * worker * room);
        const float n = static_cast<float>(width);
        for (int64_t first = begin; first < end; first += TOGETHER) {
          const int64_t count = std::min(TOGETHER, end - first);
          float mean[TOGETHER], inverse[TOGETHER] = {};
          for (int64_t k = 0; k < count; ++k) {
            const int64_t r = first + k;
            float* sum = sums + k * room;
            const H* before = residual ? static_cast<const H*>(residual) + r * width : nullptr;
            add_branch(static_cast<const X*>(x) + r * width, before, scale, row_scale ? row_scale[r / rows_per_scale] : 1.0f,
                       width, h ? static_cast<H*>(h) + r * width : nullptr, sum);
            mean[k] = reduce(width, [=](int64_t i) { return sum[i]; }) / n;
          }
          for (int64_t k = 0; k < count; ++k) {
            const float *sum = sums + k * room, middle = mean[k];
            inverse[k] = reduce(width, [=](int64_t i) { return (sum[i] - middle) * (sum[i] - middle); }) / n;
          }
#pragma omp simd
          for (int64_t k = 0; k < TOGETHER; ++k)
            inverse[k] = static_cast<float>(1 / std::sqrt(static_cast<double>(inverse[k]) + eps));
          for (int64_t k = 0; k < count; ++k) {
            const float *sum = sums + k * room, middle = mean[k], factor = inverse[k];
            X* out = static_cast<X*>(y) + (first + k) * width;
            if (bias) {
#pragma omp simd
              for (int64_t i = 0; i < width; ++i) from_float((sum[i] - middle) * factor * weight[i] + bias[i], out[i]);
            } else {
#pragma omp simd
              for (int64_t i = 0; i < width; ++i) from_float((sum[i] - middle) * factor * weight[i], out[i]);
            }
            stats[2 * (first + k)] = middle;
            stats[2 * (first + k) + 1] = factor;
          }
        }
      });
      return OK;
    });
  });
}

// Gradients. grad_y like x, grad_h of dtype `to` or null; h is what was normalized. for_x and for_residual, each or
// null; sums (3, D): for weight, bias and scale, where x is null without scale.
static Status add_layer_norm_backward(const void* grad_y, const void* grad_h, const void* h, const float* stats,
                                      const void* x, int64_t from, int64_t to, const float* weight, const float* scale,
                                      const float* row_scale, int64_t rows_per_scale, int64_t rows, int64_t width,
                                      void* for_x, void* for_residual, float* sums, int64_t threads) {
  return with_float(from, [&](auto element) {
    return with_float(to, [&](auto stream) {
      using X = decltype(element);
      using H = decltype(stream);
      const int64_t room = room_of(width), chunk = (rows + CHUNKS - 1) / CHUNKS;
      const int64_t chunks = chunk ? (rows + chunk - 1) / chunk : 0;
      Floats scratch(2 * PAIR_OF_ROWS * room * std::max<int64_t>(1, threads)), partial(3 * room * CHUNKS);
      if (for_x) expect_writes(for_x, rows * width * static_cast<int64_t>(sizeof(X)));
      if (for_residual) expect_writes(for_residual, rows * width * static_cast<int64_t>(sizeof(H)));
      const int64_t grain = rows_per_worker(width) / (chunk + 1) + 1;
      parallel_for(chunks, grain, threads, [&](int64_t begin, int64_t end, int64_t worker) {
        float *units = scratch.at(2 * PAIR_OF_ROWS * worker * room), *slopes = units + PAIR_OF_ROWS * room;
        for (int64_t part = begin; part < end; ++part) {
          float *for_weight = partial.at(3 * part * room), *for_bias = for_weight + room, *for_scale = for_bias + room;
          std::fill_n(for_weight, 3 * room, 0.0f);
          for (int64_t first = part * chunk, last = std::min(rows, first + chunk); first < last; first += PAIR_OF_ROWS) {
            const int64_t count = std::min(PAIR_OF_ROWS, last - first);
            Averages means[PAIR_OF_ROWS];
            for (int64_t k = 0; k < count; ++k) {
              const int64_t r = first + k;
              means[k] = before_normalization(static_cast<const X*>(grad_y) + r * width, static_cast<const H*>(h) + r * width,
                                              stats + 2 * r, weight, width, units + k * room, slopes + k * room, for_weight,
                                              for_bias);
            }
            for (int64_t k = 0; k < count; ++k) {
              const int64_t r = first + k;
              float* slope = slopes + k * room;
              through_normalization(means[k], stats[2 * r + 1], units + k * room,
                                    grad_h ? static_cast<const H*>(grad_h) + r * width : nullptr, width, slope,
                                    for_residual ? static_cast<H*>(for_residual) + r * width : nullptr);
              const float factor = row_scale ? row_scale[r / rows_per_scale] : 1.0f;
              if (scale) {
                const X* branch = static_cast<const X*>(x) + r * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                  for_scale[i] += slope[i] * to_float(branch[i]) * factor;
                  slope[i] *= scale[i];
                }
              }
              if (for_x) {
                X* out = static_cast<X*>(for_x) + r * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) from_float(slope[i] * factor, out[i]);
              }
            }
          }
        }
      });
      for (int64_t kind = 0; kind < 3; ++kind) {
        float* total = sums + kind * width;
        std::fill_n(total, width, 0.0f);
        for (int64_t part = 0; part < chunks; ++part) {
          const float* p = partial.at((3 * part + kind) * room);
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) total[i] += p[i];
        }
      }
      return OK;
    });
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(add_layer_norm)
FASTMIM_EXPORT(add_layer_norm_backward)
