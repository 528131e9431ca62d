// Augmented views: window, color changes, grey, blur and normalization of one image after the other, in a scratch image
// of floats that stays in the cache. The formulas are those of views/reference.py and views/color.py.
#include <cmath>

#include "images.h"

namespace fastmim {
namespace {

constexpr float LUMA[3] = {0.2989f, 0.587f, 0.114f};

// NaN passes.
inline float unit(float v) {
  v = v < 0 ? 0 : v;
  return v > 1 ? 1 : v;
}

// C planes of n floats, one after the other.
struct Planes {
  float* data;
  int64_t channels, n;
  float* plane(int64_t c) const { return data + c * n; }
};

// `scratch` has room for n floats.
template <class T>
void read_window(const Images& images, int64_t b, const Planes& x, float* scratch) {
  const auto [first, step] = images.at<T>(b, 0, 0);
  T* window = reinterpret_cast<T*>(scratch);
  for (int64_t c = 0; c < x.channels; ++c) {
    for (int64_t y = 0; y < images.h; ++y)
      copy_row(first + c * images.stride_c + y * images.stride_y, step, images.w, window + y * images.w);
    float* plane = x.plane(c);
#pragma omp simd
    for (int64_t i = 0; i < x.n; ++i) plane[i] = unit_level(window[i]);
  }
}

void brightness(const Planes& x, float factor) {
  for (int64_t i = 0; i < x.channels * x.n; ++i) x.data[i] = unit(x.data[i] * factor);
}

double mean(const float* p, int64_t n) {
  double total = 0;
  // Pieces, so that the float sums stay short.
  for (int64_t start = 0; start < n; start += 1024)
    total += reduce(std::min<int64_t>(1024, n - start), [=](int64_t i) { return p[start + i]; });
  return total / static_cast<double>(n);
}

void contrast(const Planes& x, float factor) {
  double grey = 0;
  for (int64_t c = 0; c < x.channels; ++c)
    grey += mean(x.plane(c), x.n) * (x.channels == 3 ? LUMA[c] : 1.0 / static_cast<double>(x.channels));
  const float shift = static_cast<float>(grey) * (1 - factor);
  for (int64_t i = 0; i < x.channels * x.n; ++i) x.data[i] = unit(x.data[i] * factor + shift);
}

inline float luma(float r, float g, float b) { return r * LUMA[0] + g * LUMA[1] + b * LUMA[2]; }

void saturation(const Planes& x, float factor) {
  float *r = x.plane(0), *g = x.plane(1), *b = x.plane(2);
  const float rest = 1 - factor;
#pragma omp simd
  for (int64_t i = 0; i < x.n; ++i) {
    const float shift = luma(r[i], g[i], b[i]) * rest;
    r[i] = unit(r[i] * factor + shift);
    g[i] = unit(g[i] * factor + shift);
    b[i] = unit(b[i] * factor + shift);
  }
}

void hue(const Planes& x, float turns) {
  float *r = x.plane(0), *g = x.plane(1), *b = x.plane(2);
  const float sextants = 6 * turns;
#pragma omp simd
  for (int64_t i = 0; i < x.n; ++i) {
    const float red = r[i], green = g[i], blue = b[i];
    const float high = red > green ? red : green, value = high > blue ? high : blue;
    const float less = red < green ? red : green, low = less < blue ? less : blue;
    const float chroma = value - low;
    float side = value == green ? (blue - red) + 2 * chroma : (red - green) + 4 * chroma;
    side = value == red ? green - blue : side;
    float h = side / (chroma < 1e-12f ? 1e-12f : chroma) + sextants;
    h -= 6 * std::floor(h * (1.0f / 6.0f));
    r[i] = low + chroma * unit(std::fabs(h - 3) - 1);
    g[i] = value - chroma * unit(std::fabs(h - 2) - 1);
    b[i] = value - chroma * unit(std::fabs(h - 4) - 1);
  }
}

void to_grey(const Planes& x) {
  float *r = x.plane(0), *g = x.plane(1), *b = x.plane(2);
#pragma omp simd
  for (int64_t i = 0; i < x.n; ++i) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

// out[i] = sum over |d| <= radius of taps[|d|] * p[i + d * step]
void convolve(const float* p, int64_t step, const float* taps, int64_t radius, int64_t n, float* out) {
  constexpr int64_t BLOCK = 64;
  int64_t start = 0;
  for (; start + BLOCK <= n; start += BLOCK) {
    float sum[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) sum[i] = taps[0] * p[start + i];
    for (int64_t d = 1; d <= radius; ++d) {
      const float *before = p + start - d * step, *after = p + start + d * step, tap = taps[d];
      for (int64_t i = 0; i < BLOCK; ++i) sum[i] += tap * (before[i] + after[i]);
    }
    for (int64_t i = 0; i < BLOCK; ++i) out[start + i] = sum[i];
  }
  for (; start < n; ++start) {
    float sum = taps[0] * p[start];
    for (int64_t d = 1; d <= radius; ++d) sum += taps[d] * (p[start - d * step] + p[start + d * step]);
    out[start] = sum;
  }
}

// Both directions of one plane; `scratch` has room for a plane with `radius` more rows above and below, and for one row
// with as many more pixels on either side.
void blur(float* plane, int64_t h, int64_t w, const float* taps, int64_t radius, float* scratch) {
  float* line = scratch + (h + 2 * radius) * w;
  for (int64_t y = 0; y < h; ++y) {
    std::fill_n(line, radius, plane[y * w]);
    std::copy_n(plane + y * w, w, line + radius);
    std::fill_n(line + radius + w, radius, plane[y * w + w - 1]);
    convolve(line + radius, 1, taps, radius, w, scratch + (y + radius) * w);
  }
  for (int64_t y = 0; y < radius; ++y) {
    std::copy_n(scratch + radius * w, w, scratch + y * w);
    std::copy_n(scratch + (radius + h - 1) * w, w, scratch + (radius + h + y) * w);
  }
  convolve(scratch + radius * w, w, taps, radius, h * w, plane);
}

// Normalized half of the Gaussian; returns the radius up to which a tap matters in float32, at most `radius`.
int64_t gaussian(float sigma, int64_t radius, float* taps) {
  float total = 0;
  for (int64_t d = radius; d >= 0; --d) {
    taps[d] = std::exp(-static_cast<float>(d * d) / (2 * sigma * sigma));
    total += d ? 2 * taps[d] : taps[d];
  }
  int64_t reach = 0;
  for (int64_t d = 0; d <= radius; ++d) {
    if (taps[d] > 0x1.0p-26f) reach = d;
    taps[d] /= total;
  }
  return reach;
}

template <class T>
void write(const Planes& x, const float* mean, const float* scale, T* out) {
  for (int64_t c = 0; c < x.channels; ++c, out += x.n) {
    const float *p = x.plane(c), m = mean ? mean[c] : 0, s = mean ? scale[c] : 1;
    for (int64_t i = 0; i < x.n; ++i) from_float((p[i] - m) * s, out[i]);
  }
}

}  // namespace

// apply (B,) bytes, order (B, 4) int64 and amounts (4, B) floats: brightness, contrast, saturation, hue; null together.
// grey (B,) bytes or null; sigma (B,) floats or null; mean and scale C floats, or null. out (B, C, h, w), contiguous.
static Status shift_flip_jitter(const void* pixels, const int64_t* shape, const int64_t* offset, const uint8_t* flip,
                                const uint8_t* apply, const int64_t* order, const float* amounts, const uint8_t* grey,
                                const float* sigma, int64_t radius, const float* mean, const float* scale, void* out,
                                int64_t dtype, int64_t threads) {
  const Images images(pixels, shape, offset, flip);
  if (const Status status = images.check()) return status;
  const int64_t n = images.h * images.w, values = images.channels * n;
  const bool is_color = images.channels == 3;
  // Beside the image: room for one plane, with borders and taps where there is blur.
  const int64_t border = sigma ? radius : 0, spare_size = (images.h + 2 * border + 1) * images.w + 2 * border;
  const int64_t room = padded(values) + padded(spare_size + border + 1);
  Floats scratch(room * std::max<int64_t>(1, threads));
  return with_pixel(images.dtype, [&](auto pixel) {
    return with_float(dtype, [&](auto result) {
      using Result = decltype(result);
      expect_writes(out, images.batch * values * static_cast<int64_t>(sizeof(Result)));
      const int64_t grain = 16384 / (values + 1) + 1;
      parallel_for(images.batch, grain, threads, [&](int64_t begin, int64_t end, int64_t worker) {
        float *image = scratch.at(worker * room), *spare = image + padded(values), *taps = spare + spare_size;
        for (int64_t b = begin; b < end; ++b) {
          Result* view = static_cast<Result*>(out) + b * values;
          if constexpr (std::is_same_v<Result, float>) image = view;
          const Planes x{image, images.channels, n};
          read_window<decltype(pixel)>(images, b, x, spare);
          for (int64_t place = 0; apply && apply[b] && place < 4; ++place) {
            const int64_t code = order[4 * b + place];
            const float amount = code >= 0 && code < 4 ? amounts[code * images.batch + b] : 0;
            if (code == 0) brightness(x, amount);
            if (code == 1) contrast(x, amount);
            if (code == 2 && is_color) saturation(x, amount);
            if (code == 3 && is_color) hue(x, amount);
          }
          if (grey && grey[b] && is_color) to_grey(x);
          if (sigma && sigma[b] > 0) {
            const int64_t reach = gaussian(sigma[b], radius, taps);
            for (int64_t c = 0; c < x.channels; ++c) blur(x.plane(c), images.h, images.w, taps, reach, spare);
          }
          write(x, mean, scale, view);
        }
      });
      return OK;
    });
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(shift_flip_jitter)
