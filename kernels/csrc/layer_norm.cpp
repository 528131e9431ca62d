// Residual addition and LayerNorm: forward and backward each read their inputs once.
#include <cmath>
#include <vector>

#include "kernel.h"

namespace fastmim {
namespace {

// The rows are cut into as many chunks on every machine, so that sums over them do not depend on the number of threads.
constexpr int64_t CHUNKS = 64;

inline int64_t rows_per_worker(int64_t width) { return 16384 / (width + 1) + 1; }

template <class T>
inline void to_floats(const T* p, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
}

template <class T>
inline void from_floats(const float* p, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(p[i], out[i]);
}

// h = residual + x * scale * factor, each part where it is not null. Without scale, factor alone.
template <class X, class H>
inline void add_branch(const X* x, const H* residual, const float* scale, float factor, int64_t n, float* h) {
  if (scale) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) h[i] = to_float(x[i]) * scale[i] * factor;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) h[i] = to_float(x[i]) * factor;
  }
  if (residual) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) h[i] += to_float(residual[i]);
  }
}

// slope = the gradient of the normalized row h, from that of the result; `unit` is room for n floats. for_weight and
// for_bias are added to.
template <class X, class H>
inline void normalization_gradient(const X* grad, const H* h, const float* stats, const float* weight, int64_t n,
                                   float* unit, float* slope, float* for_weight, float* for_bias) {
  const float mean = stats[0], inverse = stats[1], count = static_cast<float>(n);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(grad[i]), normal = (to_float(h[i]) - mean) * inverse;
    unit[i] = normal;
    slope[i] = g * weight[i];
    for_weight[i] += g * normal;
    for_bias[i] += g;
  }
  const float average = reduce(n, [=](int64_t i) { return slope[i]; }) / count;
  const float along = reduce(n, [=](int64_t i) { return slope[i] * unit[i]; }) / count;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) slope[i] = inverse * (slope[i] - average - unit[i] * along);
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
      const int64_t room = padded(width);
      Floats scratch(room * std::max<int64_t>(1, threads));
      expect_writes(y, rows * width * static_cast<int64_t>(sizeof(X)));
      if (h) expect_writes(h, rows * width * static_cast<int64_t>(sizeof(H)));
      parallel_for(rows, rows_per_worker(width), threads, [&](int64_t begin, int64_t end, int64_t worker) {
        float* sum = scratch.at(worker * room);
        for (int64_t r = begin; r < end; ++r) {
          const H* before = residual ? static_cast<const H*>(residual) + r * width : nullptr;
          const float factor = row_scale ? row_scale[r / rows_per_scale] : 1.0f;
          add_branch(static_cast<const X*>(x) + r * width, before, scale, factor, width, sum);
          if (h) {
            H* after = static_cast<H*>(h) + r * width;
            from_floats(sum, width, after);
            if (!std::is_same_v<H, float>) to_floats(after, width, sum);
          }
          const float n = static_cast<float>(width);
          const float mean = reduce(width, [=](int64_t i) { return sum[i]; }) / n;
          const float squares = reduce(width, [=](int64_t i) { return (sum[i] - mean) * (sum[i] - mean); });
          const float inverse = static_cast<float>(1 / std::sqrt(static_cast<double>(squares / n) + eps));
          X* out = static_cast<X*>(y) + r * width;
          if (bias) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) from_float((sum[i] - mean) * inverse * weight[i] + bias[i], out[i]);
          } else {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) from_float((sum[i] - mean) * inverse * weight[i], out[i]);
          }
          stats[2 * r] = mean;
          stats[2 * r + 1] = inverse;
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
      const int64_t room = padded(width), chunk = (rows + CHUNKS - 1) / CHUNKS;
      const int64_t chunks = chunk ? (rows + chunk - 1) / chunk : 0;
      Floats scratch(2 * room * std::max<int64_t>(1, threads)), partial(3 * room * CHUNKS);
      if (for_x) expect_writes(for_x, rows * width * static_cast<int64_t>(sizeof(X)));
      if (for_residual) expect_writes(for_residual, rows * width * static_cast<int64_t>(sizeof(H)));
      const int64_t grain = rows_per_worker(width) / (chunk + 1) + 1;
      parallel_for(chunks, grain, threads, [&](int64_t begin, int64_t end, int64_t worker) {
        float *unit = scratch.at(2 * worker * room), *slope = unit + room;
        for (int64_t part = begin; part < end; ++part) {
          float *for_weight = partial.at(3 * part * room), *for_bias = for_weight + room, *for_scale = for_bias + room;
          std::fill_n(for_weight, 3 * room, 0.0f);
          for (int64_t r = part * chunk; r < std::min(rows, (part + 1) * chunk); ++r) {
            const X* g = static_cast<const X*>(grad_y) + r * width;
            const H* stored = static_cast<const H*>(h) + r * width;
            normalization_gradient(g, stored, stats + 2 * r, weight, width, unit, slope, for_weight, for_bias);
            if (grad_h) {
              const H* further = static_cast<const H*>(grad_h) + r * width;
#pragma omp simd
              for (int64_t i = 0; i < width; ++i) slope[i] += to_float(further[i]);
            }
            if (for_residual) from_floats(slope, width, static_cast<H*>(for_residual) + r * width);
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
