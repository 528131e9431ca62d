// AdamW with everything that follows it, in one pass over parameters and moments.
#include <cmath>
#include <vector>

#include "kernel.h"

namespace fastmim {
namespace {

// Values per piece of work: its six arrays stay in a core's level 2 cache.
constexpr int64_t PIECE = 16384;

// What is the same for all values of a step; grad_scale clips, step_size and root_correction hold the bias corrections.
struct Step {
  float grad_scale, beta1, beta2, step_size, root_correction, eps, share;
};

template <class G, class C>
inline void update(float* param, const G* grad, float* first, float* second, float* target, C* copy, int64_t n, float decay,
                   const Step step) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = to_float(grad[i]) * step.grad_scale;
    const float m = first[i] + (1 - step.beta1) * (g - first[i]);
    const float v = step.beta2 * second[i] + (1 - step.beta2) * g * g;
    const float p = param[i] * decay - step.step_size * m / (std::sqrt(v) * step.root_correction + step.eps);
    first[i] = m;
    second[i] = v;
    param[i] = p;
  }
  if (target) {
    if (step.share < 0.5f) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) target[i] += step.share * (param[i] - target[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) target[i] = param[i] - (1 - step.share) * (param[i] - target[i]);
    }
  }
  if (copy) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_float(param[i], copy[i]);
  }
}

struct Piece {
  int64_t tensor, start, count;
};

}  // namespace

// Addresses of `tensors` arrays each, of the sizes given: params, firsts, seconds and targets of floats, grads and copies
// of their dtypes; 0 for a target or copy that is not there. decays: one per array. Nothing happens where `applied` is 0.
static Status adamw_ema(const int64_t* params, const int64_t* grads, int64_t grad_dtype, const int64_t* firsts,
                        const int64_t* seconds, const int64_t* targets, const int64_t* copies, int64_t copy_dtype,
                        const int64_t* sizes, const double* decays, int64_t tensors, double grad_scale, double beta1,
                        double beta2, double step_size, double root_correction, double eps, double share,
                        double applied, int64_t threads) {
  if (applied == 0) return OK;
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t start = 0; start < sizes[t]; start += PIECE) pieces.push_back({t, start, std::min(PIECE, sizes[t] - start)});
  const auto single = [](double v) { return static_cast<float>(v); };
  const Step step{single(grad_scale), single(beta1),           single(beta2), single(step_size),
                  single(root_correction), single(eps), single(share)};
  const auto at = [](const int64_t* addresses, int64_t t) { return reinterpret_cast<char*>(addresses[t]); };
  return with_float(grad_dtype, [&](auto grad) {
    return with_float(copy_dtype, [&](auto copy) {
      using G = decltype(grad);
      using C = decltype(copy);
      parallel_for(static_cast<int64_t>(pieces.size()), 1, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) {
          const auto [t, start, count] = pieces[static_cast<size_t>(i)];
          update(reinterpret_cast<float*>(at(params, t)) + start, reinterpret_cast<const G*>(at(grads, t)) + start,
                 reinterpret_cast<float*>(at(firsts, t)) + start, reinterpret_cast<float*>(at(seconds, t)) + start,
                 targets[t] ? reinterpret_cast<float*>(at(targets, t)) + start : nullptr,
                 copies[t] ? reinterpret_cast<C*>(at(copies, t)) + start : nullptr, count, single(decays[t]), step);
        }
      });
      return OK;
    });
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(adamw_ema)
