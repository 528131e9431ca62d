// Reading pixels of a window in (flipped) images as floats; shared by the views, the patches and the pixel loss.
#pragma once

#include "kernel.h"

namespace fastmim {

// A batch of images and the window in each. `shape` = {dtype, B, C, H, W, strides of the four, h, w}, strides in
// elements; offset = (B, 2) int64 (top, left) or null; flip = (B,) bytes or null.
struct Images {
  const char* data;
  int64_t dtype, batch, channels, height, width, stride_b, stride_c, stride_y, stride_x, h, w;
  const int64_t* offset;
  const uint8_t* flip;

  Images(const void* images, const int64_t* shape, const int64_t* offset, const uint8_t* flip)
      : data(static_cast<const char*>(images)), dtype(shape[0]), batch(shape[1]), channels(shape[2]), height(shape[3]),
        width(shape[4]), stride_b(shape[5]), stride_c(shape[6]), stride_y(shape[7]), stride_x(shape[8]), h(shape[9]),
        w(shape[10]), offset(offset), flip(flip) {}

  // Offsets are not checked by Python under torch.compile.
  Status check() const {
    for (int64_t i = 0; offset && i < 2 * batch; i += 2) {
      const int64_t top = offset[i], left = offset[i + 1];
      if (top < 0 || top > height - h || left < 0 || left > width - w) return BAD_INDEX;
    }
    return OK;
  }

  // Where column `left` of the window's row `top` lies in channel 0 of image b, and the step to the next column.
  template <class T>
  std::pair<const T*, int64_t> at(int64_t b, int64_t top, int64_t left) const {
    if (offset) top += offset[2 * b], left += offset[2 * b + 1];
    const bool is_flipped = flip && flip[b];
    const int64_t x = is_flipped ? width - 1 - left : left;
    return {reinterpret_cast<const T*>(data) + b * stride_b + top * stride_y + x * stride_x,
            is_flipped ? -stride_x : stride_x};
  }
};

// A pixel in 0..1, exactly x / 255 for bytes: with a fused multiply-add two factors give the quotient's rounding for
// each of the 256 levels.
inline float unit_level(uint8_t v) {
#ifdef __FP_FAST_FMAF
  constexpr float HIGH = 1.0f / 255.0f, LOW = static_cast<float>(1.0 / 255.0 - static_cast<double>(HIGH));
  return __builtin_fmaf(to_float(v), HIGH, to_float(v) * LOW);
#else
  return to_float(v) / 255.0f;
#endif
}
template <class T>
inline float unit_level(T v) {
  return to_float(v);
}

// out[i] = p[i * step], in pieces of fixed length.
template <class T>
inline void copy_row(const T* p, int64_t step, int64_t n, T* out) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + 16 <= n; i += 16) std::memcpy(out + i, p + i, 16 * sizeof(T));
    for (; i + 8 <= n; i += 8) std::memcpy(out + i, p + i, 8 * sizeof(T));
  } else if (step == -1) {
    for (; i + 16 <= n; i += 16)
#pragma omp simd
      for (int j = 0; j < 16; ++j) out[i + j] = p[-i - j];
    for (; i + 8 <= n; i += 8)
#pragma omp simd
      for (int j = 0; j < 8; ++j) out[i + j] = p[-i - j];
  }
  for (; i < n; ++i) out[i] = p[i * step];
}

// The grid of patches in the window, and how their values are normalized: (pixel - shift[c]) * scale[c] with the pixel
// as it is stored, or unit_level(pixel) where shift is null.
struct Patches {
  int64_t size, columns, count, values;
  const float *shift, *scale;

  Patches(const Images& images, int64_t size, const float* shift, const float* scale)
      : size(size), columns(images.w / size), count(images.h / size * columns), values(size * size * images.channels),
        shift(shift), scale(scale) {}

  // Asks for the pixels of a patch that is read soon: its short rows are no pattern that the hardware foresees.
  template <class T>
  void prefetch(const Images& images, int64_t b, int64_t id) const {
    const T* first = images.at<T>(b, id / columns * size, id % columns * size).first;
    for (int64_t c = 0; c < images.channels; ++c)
      for (int64_t y = 0; y < size; ++y) __builtin_prefetch(first + c * images.stride_c + y * images.stride_y);
  }

  // The values of patch `id` of image b, channel fastest. `scratch` has room for as many floats as `out`.
  template <class T>
  void read(const Images& images, int64_t b, int64_t id, float* scratch, float* out) const {
    const auto [first, step] = images.at<T>(b, id / columns * size, id % columns * size);
    const int64_t area = size * size, channels = images.channels;
    T* planes = reinterpret_cast<T*>(scratch);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t y = 0; y < size; ++y)
        copy_row(first + c * images.stride_c + y * images.stride_y, step, size, planes + c * area + y * size);
    if (channels == 3) {
      interleave<3>(planes, channels, area, out);
    } else {
      interleave<0>(planes, channels, area, out);
    }
  }

 private:
  // C: the number of channels where it is known at compile time, else 0.
  template <int C, class T>
  void interleave(const T* planes, int64_t channels, int64_t area, float* out) const {
    const int64_t count = C ? C : channels;
    if (shift) {
#pragma omp simd
      for (int64_t i = 0; i < area; ++i)
        for (int64_t c = 0; c < count; ++c) out[i * count + c] = (to_float(planes[c * area + i]) - shift[c]) * scale[c];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < area; ++i)
        for (int64_t c = 0; c < count; ++c) out[i * count + c] = unit_level(planes[c * area + i]);
    }
  }
};

}  // namespace fastmim
