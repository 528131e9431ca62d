// The separable resampler with antialiasing: two passes, weights of 22 bits, 8 bits between the passes.
//
// Source: Pillow src/libImaging/Resample.c for the arithmetic, which is exact in integers: other orders of summation and
// other instructions give the same bits, the order of the passes matters.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decode.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fastmim {
namespace {

constexpr int kBits = 22;
constexpr int kLanes = 16;
#define INLINE static inline __attribute__((always_inline))

namespace portable {
constexpr int kBlocksDown = 2;
#include "resample_passes.h"
}  // namespace portable

#ifdef __x86_64__
// Functions from here to the end of the push are for processors with these instructions.
#ifdef __clang__
#define BEGIN_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2\"))), apply_to = function)")
#define BEGIN_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,avx512f,avx512bw,avx512vl,avx512vnni\"))), apply_to = function)")
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2\")")
#define BEGIN_TARGET_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,avx512f,avx512bw,avx512vl,avx512vnni\")")
#define END_TARGET _Pragma("GCC pop_options")
#endif

BEGIN_TARGET_AVX2
#define FASTMIM_AVX2
namespace avx2 {
constexpr int kBlocksDown = 2;
#include "resample_passes.h"
}  // namespace avx2
#undef FASTMIM_AVX2
END_TARGET

BEGIN_TARGET_AVX512
#define FASTMIM_AVX512
namespace avx512 {
constexpr int kBlocksDown = 4;
#include "resample_passes.h"
}  // namespace avx512
#undef FASTMIM_AVX512
END_TARGET
#endif

struct Passes {
  decltype(portable::across)* across;
  decltype(portable::down)* down;
};

Passes passes_with(int instructions) {
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool has_avx512 =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (instructions >= 2 && has_avx2 && has_avx512) return {avx512::across, avx512::down};
  if (instructions >= 1 && has_avx2) return {avx2::across, avx2::down};
#endif
  (void)instructions;
  return {portable::across, portable::down};
}

Passes passes = passes_with(2);

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1 ? 1 - x : 0;
}

// The cubic convolution kernel with a = -1/2. Source: Keys 1981, equation 15.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double sinc(double x) {
  if (x == 0) return 1;
  x *= 3.14159265358979323846;
  return std::sin(x) / x;
}

double lanczos(double x) { return -3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

struct Kernel {
  double (*at)(double);
  double support;
};

Kernel kernel_of(Filter filter) {
  switch (filter) {
    case kBilinear: return {bilinear, 1};
    case kLanczos: return {lanczos, 3};
    default: return {bicubic, 2};
  }
}

void reserve(std::vector<uint8_t>* buffer, size_t size) {
  if (buffer->size() < size) buffer->resize(size);
}

// weight = high_part * 2**kLowBits + low_part, both within 16 bits with their sign.
int32_t high_part(int32_t weight) { return (weight + (1 << (Taps::kLowBits - 1))) >> Taps::kLowBits; }
int32_t low_part(int32_t weight) { return weight - high_part(weight) * (1 << Taps::kLowBits); }

int32_t side_by_side(int32_t first, int32_t second) {
  return static_cast<int32_t>(static_cast<uint32_t>(first) & 0xFFFFu) | static_cast<int32_t>(static_cast<uint32_t>(second) << 16);
}

}  // namespace

void use_instructions(int most) { passes = passes_with(most); }

void Taps::compute(int source, double box_start, double box_end, int output, Filter filter) {
  const Kernel kernel = kernel_of(filter);
  // Pillow takes boxes in single precision.
  const float start = static_cast<float>(box_start), end = static_cast<float>(box_end);
  const double scale = static_cast<double>(end - start) / output;
  const double stretch = std::max(scale, 1.0);
  const double support = kernel.support * stretch;
  most = static_cast<int>(std::ceil(support)) * 2 + 1;
  first.assign(static_cast<size_t>(output), 0);
  count.assign(static_cast<size_t>(output), 0);
  weights.assign(static_cast<size_t>(output) * static_cast<size_t>(most), 0);
  std::vector<double> values(static_cast<size_t>(most));
  pairs.assign(static_cast<size_t>(output) * static_cast<size_t>(most_pairs()) * 2, 0);
  for (int i = 0; i < output; ++i) {
    const double center = start + (i + 0.5) * scale;
    const int begin = std::clamp(static_cast<int>(center - support + 0.5), 0, source - 1);
    const int number = std::clamp(static_cast<int>(center + support + 0.5), begin, source) - begin;
    double sum = 0;
    for (int k = 0; k < number; ++k) sum += values[k] = kernel.at((k + begin - center + 0.5) * (1.0 / stretch));
    int32_t* out = &weights[static_cast<size_t>(i) * most];
    for (int k = 0; k < number; ++k) {
      const double weight = (sum != 0 ? values[k] / sum : values[k]) * (1 << kBits);
      out[k] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    first[i] = begin;
    count[i] = number;
    int32_t* pair = &pairs[static_cast<size_t>(i) * static_cast<size_t>(most_pairs()) * 2];
    for (int k = 0; k < number; k += 2, pair += 2) {
      const int32_t next = k + 1 < number ? out[k + 1] : 0;
      pair[0] = side_by_side(high_part(out[k]), high_part(next));
      pair[1] = side_by_side(low_part(out[k]), low_part(next));
    }
  }
}

void resample(const Region& region, const Taps& across_taps, const Taps& down_taps, bool is_down_first,
              Workspace* workspace, uint8_t* planes) {
  const int width = static_cast<int>(across_taps.first.size()), height = static_cast<int>(down_taps.first.size());
  const int channels = region.channels;
  const int columns = across_taps.end() - across_taps.begin(), rows = down_taps.end() - down_taps.begin();
  const uint8_t* source = region.pixels + region.stride * static_cast<size_t>(down_taps.begin() - region.rect.top) +
                          static_cast<size_t>((across_taps.begin() - region.rect.left) * channels);
  const size_t padded_width = (static_cast<size_t>(width) + 63) / 64 * 64;
  const size_t plane = padded_width * (static_cast<size_t>(is_down_first ? height : rows) + kLanes - 1);
  reserve(&workspace->columns, (static_cast<size_t>(columns * channels) + kLanes) * kLanes);
  reserve(&workspace->combined, padded_width * static_cast<size_t>(channels * kLanes));
  reserve(&workspace->rows, plane * static_cast<size_t>(channels));
  uint8_t* between = workspace->rows.data();
  const size_t out_plane = static_cast<size_t>(width) * static_cast<size_t>(height);

  if (!is_down_first) {
    passes.across(source, region.stride, channels, across_taps, rows, width, workspace, between, padded_width, plane);
    for (int c = 0; c < channels; ++c) {
      passes.down(between + plane * static_cast<size_t>(c), padded_width, down_taps, width, height,
           planes + out_plane * static_cast<size_t>(c), static_cast<size_t>(width));
    }
    return;
  }
  const size_t stride = static_cast<size_t>(columns * channels);
  reserve(&workspace->lower, stride * (static_cast<size_t>(height) + kLanes - 1) + kLanes);
  passes.down(source, region.stride, down_taps, columns * channels, height, workspace->lower.data(), stride);
  passes.across(workspace->lower.data(), stride, channels, across_taps, height, width, workspace, between, padded_width, plane);
  for (int c = 0; c < channels; ++c) {
    for (int y = 0; y < height; ++y, planes += width) {
      std::memcpy(planes, between + plane * static_cast<size_t>(c) + padded_width * static_cast<size_t>(y),
                  static_cast<size_t>(width));
    }
  }
}

}  // namespace fastmim
