// Reading pixels of a window in (flipped) images as floats; shared by the views, the patches and the pixel loss.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

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
      const bool is_inside = offset[i] >= 0 && offset[i] <= height - h && offset[i + 1] >= 0 && offset[i + 1] <= width - w;
      if (!is_inside) return BAD_INDEX;
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

// out[i] = p[i * STEP] * scale for N values: the fixed length makes one vector conversion of it.
template <int N, int STEP, class T>
inline void read_values(const T* p, float scale, float* out) {
#pragma omp simd
  for (int i = 0; i < N; ++i) out[i] = to_float(p[i * STEP]) * scale;
}

#ifdef __AVX2__
// GCC 12 takes bytes apart in many small steps.
template <int STEP>
inline void read_16(const uint8_t* p, float scale, float* out) {
  const __m128i reverse = _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(STEP > 0 ? p : p - 15));
  if (STEP < 0) bytes = _mm_shuffle_epi8(bytes, reverse);
#ifdef __AVX512F__
  _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_set1_ps(scale)));
#else
  const __m256 factor = _mm256_set1_ps(scale);
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), factor));
  bytes = _mm_unpackhi_epi64(bytes, bytes);
  _mm256_storeu_ps(out + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), factor));
#endif
}
#endif

template <int STEP, class T>
inline void read_16(const T* p, float scale, float* out) {
  read_values<16, STEP>(p, scale, out);
}

template <int STEP, class T>
inline void read_unit_steps(const T* p, int64_t n, float scale, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) read_16<STEP>(p + i * STEP, scale, out + i);
  for (; i + 8 <= n; i += 8) read_values<8, STEP>(p + i * STEP, scale, out + i);
  for (; i + 4 <= n; i += 4) read_values<4, STEP>(p + i * STEP, scale, out + i);
  for (; i < n; ++i) out[i] = to_float(p[i * STEP]) * scale;
}

// out[i] = p[i * step] * scale
template <class T>
inline void read_row(const T* p, int64_t step, int64_t n, float scale, float* out) {
  if (step == 1) return read_unit_steps<1>(p, n, scale, out);
  if (step == -1) return read_unit_steps<-1>(p, n, scale, out);
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i * step]) * scale;
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

// The grid of patches in the window, and how their values are normalized: (level - shift[c]) * scale[c].
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
      interleave<3>(planes, area, out);
    } else if (channels == 1) {
      interleave<1>(planes, area, out);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < area; ++i) out[i * channels + c] = (to_float(planes[c * area + i]) - shift[c]) * scale[c];
    }
  }

 private:
  template <int C, class T>
  void interleave(const T* planes, int64_t area, float* out) const {
#pragma omp simd
    for (int64_t i = 0; i < area; ++i)
      for (int c = 0; c < C; ++c) out[i * C + c] = (to_float(planes[c * area + i]) - shift[c]) * scale[c];
  }
};

}  // namespace fastmim
