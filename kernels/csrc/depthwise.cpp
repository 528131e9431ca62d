// Depthwise convolution of images of which only some patches exist, in the layout of the patches: (B, K, s, s, C).
// An image is spread into a padded float32 map that stays in cache, and only wanted pixels are computed.
#include "kernel.h"

namespace fastmim {

namespace {

constexpr int64_t LANES = 16;

struct Maps {
  int64_t keep, side, width, rows, columns, size;  // rows x columns patches; size: of the kernel
  int64_t channels() const { return (width + LANES - 1) / LANES * LANES; }
  int64_t stride() const { return (columns * side + size - 1) * channels(); }  // of a row of pixels of the map
  int64_t floats() const { return (rows * side + size - 1) * stride(); }
  // The pixel (y, x) of a patch, without the border: the top left of the window that is summed for it.
  int64_t pixel(int64_t id, int64_t y, int64_t x) const {
    return (id / columns * side + y) * stride() + (id % columns * side + x) * channels();
  }
};

template <class T>
void spread(const Maps& m, const T* patches, const int64_t* ids, float* map) {
  std::fill(map, map + m.floats(), 0.0f);
  const int64_t border = m.size / 2 * (m.stride() + m.channels());
  for (int64_t k = 0; k < m.keep; ++k)
    for (int64_t y = 0; y < m.side; ++y)
      for (int64_t x = 0; x < m.side; ++x, patches += m.width) {
        float* to = map + m.pixel(ids ? ids[k] : k, y, x) + border;
        for (int64_t c = 0; c < m.width; ++c) to[c] = to_float(patches[c]);
      }
}

// out[pixel] = start + sum over the window of taps * map; taps (size * size, channels).
template <class T>
void convolve(const Maps& m, const float* map, const float* taps, const float* start, const int64_t* ids, T* out) {
  const int64_t channels = m.channels();
  for (int64_t k = 0; k < m.keep; ++k)
    for (int64_t y = 0; y < m.side; ++y)
      for (int64_t x = 0; x < m.side; ++x, out += m.width) {
        const float* corner = map + m.pixel(ids ? ids[k] : k, y, x);
        for (int64_t first = 0; first < channels; first += LANES) {
          float sum[LANES];
          for (int64_t c = 0; c < LANES; ++c) sum[c] = start ? start[first + c] : 0.0f;
          const float* tap = taps + first;
          for (int64_t dy = 0; dy < m.size; ++dy)
            for (int64_t dx = 0; dx < m.size; ++dx, tap += channels) {
              const float* from = corner + dy * m.stride() + dx * channels + first;
              for (int64_t c = 0; c < LANES; ++c) sum[c] += tap[c] * from[c];
            }
          const int64_t count = std::min(LANES, m.width - first);
          for (int64_t c = 0; c < count; ++c) from_float(sum[c], out[first + c]);
        }
      }
}

// sums (size * size + 1, channels): products of the gradient with each pixel of the window, then the gradient itself.
template <class T>
void correlate(const Maps& m, const float* map, const T* grad, const int64_t* ids, float* sums) {
  const int64_t channels = m.channels(), taps = m.size * m.size;
  for (int64_t first = 0; first < channels; first += LANES) {
    const int64_t count = std::min(LANES, m.width - first);
    const T* row = grad + first;
    for (int64_t k = 0; k < m.keep; ++k)
      for (int64_t y = 0; y < m.side; ++y)
        for (int64_t x = 0; x < m.side; ++x, row += m.width) {
          float g[LANES] = {};
          for (int64_t c = 0; c < count; ++c) g[c] = to_float(row[c]);
          const float* corner = map + m.pixel(ids ? ids[k] : k, y, x) + first;
          float* sum = sums + first;
          for (int64_t dy = 0; dy < m.size; ++dy)
            for (int64_t dx = 0; dx < m.size; ++dx, sum += channels) {
              const float* from = corner + dy * m.stride() + dx * channels;
              for (int64_t c = 0; c < LANES; ++c) sum[c] += g[c] * from[c];
            }
          sum = sums + taps * channels + first;
          for (int64_t c = 0; c < LANES; ++c) sum[c] += g[c];
        }
  }
}

Status check(const Maps& m, const int64_t* ids, int64_t batch) {
  if (ids)
    for (int64_t i = 0; i < batch * m.keep; ++i)
      if (ids[i] < 0 || ids[i] >= m.rows * m.columns) return BAD_INDEX;
  return OK;
}

}  // namespace

// x, out (B, K, s, s, C); taps (k * k, C rounded up to 16) and bias (the same width), float32; sizes: B K s C rows
// columns k.
static Status depthwise(const void* x, const int64_t* ids, const float* taps, const float* bias, const int64_t* sizes,
                        void* out, int64_t dtype, int64_t threads) {
  const int64_t batch = sizes[0];
  const Maps m{sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  if (const Status status = check(m, ids, batch)) return status;
  const int64_t room = padded(m.floats()), values = m.keep * m.side * m.side * m.width;
  Floats scratch(room * std::max<int64_t>(1, threads));
  return with_float(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(batch, 1, threads, [&](int64_t begin, int64_t end, int64_t worker) {
      float* map = scratch.at(worker * room);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t* places = ids ? ids + i * m.keep : nullptr;
        spread(m, static_cast<const T*>(x) + i * values, places, map);
        convolve(m, map, taps, bias, places, static_cast<T*>(out) + i * values);
      }
    });
    return OK;
  });
}

// grad like out; taps here mirrored, which turns the convolution into its transpose; x_grad like x; sums as in
// `correlate`.
static Status depthwise_backward(const void* grad, const void* x, const int64_t* ids, const float* taps,
                                 const int64_t* sizes, void* x_grad, float* sums, int64_t dtype, int64_t threads) {
  const int64_t batch = sizes[0];
  const Maps m{sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  if (const Status status = check(m, ids, batch)) return status;
  const int64_t workers = std::max<int64_t>(1, threads), total = (m.size * m.size + 1) * m.channels();
  const int64_t room = padded(m.floats()), part = padded(total), values = m.keep * m.side * m.side * m.width;
  Floats scratch((room + part) * workers);
  std::fill(scratch.at(room * workers), scratch.at((room + part) * workers), 0.0f);
  return with_float(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(batch, 1, threads, [&](int64_t begin, int64_t end, int64_t worker) {
      float *map = scratch.at(worker * room), *own = scratch.at(room * workers + worker * part);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t* places = ids ? ids + i * m.keep : nullptr;
        const T* g = static_cast<const T*>(grad) + i * values;
        spread(m, g, places, map);
        convolve<T>(m, map, taps, nullptr, places, static_cast<T*>(x_grad) + i * values);
        spread(m, static_cast<const T*>(x) + i * values, places, map);
        correlate(m, map, g, places, own);
      }
    });
    std::fill(sums, sums + total, 0.0f);
    for (int64_t w = 0; w < workers; ++w)
      for (int64_t i = 0; i < total; ++i) sums[i] += scratch.at(room * workers + w * part)[i];
    return OK;
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(depthwise)
FASTMIM_EXPORT(depthwise_backward)
