// The two passes of the resampler. Included once for every kind of processor, in a namespace of its own.
//
// Both are weighted sums of contiguous rows of bytes; for the horizontal one, blocks of 16 x 16 bytes are transposed on
// the way in and out.

using Bytes16 = uint8_t __attribute__((vector_size(16)));

INLINE Bytes16 load(const uint8_t* p) {
  Bytes16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(uint8_t* p, Bytes16 v) { std::memcpy(p, &v, sizeof v); }

INLINE Bytes16 interleave_low(Bytes16 a, Bytes16 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b, Bytes16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

INLINE Bytes16 interleave_high(Bytes16 a, Bytes16 b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return __builtin_shuffle(a, b, Bytes16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// Four rounds that interleave each row with the one half the block further down.
INLINE void transpose_16x16(const uint8_t* from, size_t from_stride, uint8_t* to, size_t to_stride) {
  Bytes16 a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = load(from + from_stride * static_cast<size_t>(i));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < kLanes / 2; ++i) {
      b[2 * i] = interleave_low(a[i], a[i + kLanes / 2]);
      b[2 * i + 1] = interleave_high(a[i], a[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) a[i] = b[i];
  }
  for (int i = 0; i < kLanes; ++i) store(to + to_stride * static_cast<size_t>(i), a[i]);
}

// Weighted sums of rows, kBytes of each, by the weights of output place `place`. Versions for x86 take two rows at a time,
// bytes of both side by side, and weights in two parts of at most 16 bits; they may read one more row than has a weight.
#if defined FASTMIM_AVX512
template <int kBytes>
INLINE void combine(const uint8_t* rows, size_t stride, const Taps& taps, int place, uint8_t* out) {
  constexpr int kBlocks = kBytes / kLanes;
  const int32_t* pairs = taps.pairs_of(place);
  const int count = taps.count[place];
  __m512i high[kBlocks], low[kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    high[i] = _mm512_setzero_si512();
    low[i] = _mm512_set1_epi32(1 << (kBits - 1));
  }
  for (int k = 0; k < count; k += 2, rows += 2 * stride, pairs += 2) {
    const __m512i high_weights = _mm512_set1_epi32(pairs[0]), low_weights = _mm512_set1_epi32(pairs[1]);
    for (int i = 0; i < kBlocks; ++i) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * kLanes));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + stride + i * kLanes));
      const __m512i words = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
      high[i] = _mm512_dpwssd_epi32(high[i], words, high_weights);
      low[i] = _mm512_dpwssd_epi32(low[i], words, low_weights);
    }
  }
  for (int i = 0; i < kBlocks; ++i) {
    const __m512i sums = _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[i], Taps::kLowBits), low[i]), kBits);
    const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(sums, _mm512_setzero_si512()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kLanes), bytes);
  }
}
#elif defined FASTMIM_AVX2
template <int kBytes>
INLINE void combine(const uint8_t* rows, size_t stride, const Taps& taps, int place, uint8_t* out) {
  constexpr int kBlocks = kBytes / kLanes;
  const int32_t* pairs = taps.pairs_of(place);
  const int count = taps.count[place];
  __m256i high[2 * kBlocks], low[2 * kBlocks];
  for (int i = 0; i < 2 * kBlocks; ++i) {
    high[i] = _mm256_setzero_si256();
    low[i] = _mm256_set1_epi32(1 << (kBits - 1));
  }
  for (int k = 0; k < count; k += 2, rows += 2 * stride, pairs += 2) {
    const __m256i high_weights = _mm256_set1_epi32(pairs[0]), low_weights = _mm256_set1_epi32(pairs[1]);
    for (int i = 0; i < kBlocks; ++i) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * kLanes));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + stride + i * kLanes));
      const __m256i first = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
      const __m256i second = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
      high[2 * i] = _mm256_add_epi32(high[2 * i], _mm256_madd_epi16(first, high_weights));
      low[2 * i] = _mm256_add_epi32(low[2 * i], _mm256_madd_epi16(first, low_weights));
      high[2 * i + 1] = _mm256_add_epi32(high[2 * i + 1], _mm256_madd_epi16(second, high_weights));
      low[2 * i + 1] = _mm256_add_epi32(low[2 * i + 1], _mm256_madd_epi16(second, low_weights));
    }
  }
  for (int i = 0; i < kBlocks; ++i) {
    __m256i sums[2];
    for (int h = 0; h < 2; ++h) {
      sums[h] = _mm256_add_epi32(_mm256_slli_epi32(high[2 * i + h], Taps::kLowBits), low[2 * i + h]);
      sums[h] = _mm256_srai_epi32(sums[h], kBits);
    }
    // Packing saturates, which clips; it works on halves of 128 bits, whose order is put right in between.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(sums[0], sums[1]), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kLanes), bytes);
  }
}
#else
template <int kBytes>
INLINE void combine(const uint8_t* rows, size_t stride, const Taps& taps, int place, uint8_t* out) {
  const int32_t* weights = taps.weights_of(place);
  const int count = taps.count[place];
  int32_t sums[kBytes];
  for (int i = 0; i < kBytes; ++i) sums[i] = 1 << (kBits - 1);
  for (int k = 0; k < count; ++k, rows += stride) {
    const int32_t weight = weights[k];
    for (int i = 0; i < kBytes; ++i) sums[i] += rows[i] * weight;
  }
  for (int i = 0; i < kBytes; ++i) out[i] = static_cast<uint8_t>(std::clamp(sums[i] >> kBits, 0, 255));
}
#endif

// One strip of 16 rows: columns become rows, are combined, and become columns again.
template <int kChannels>
INLINE void across_strip(const uint8_t* source, size_t stride, const Taps& taps, int width, Workspace* workspace,
                         uint8_t* rows, size_t row_stride, size_t plane) {
  uint8_t* columns = workspace->columns.data();
  const int origin = taps.begin(), source_bytes = (taps.end() - origin) * kChannels;
  for (int x = 0; x < source_bytes; x += kLanes) {
    transpose_16x16(source + x, stride, columns + static_cast<size_t>(x) * kLanes, kLanes);
  }
  constexpr size_t kPixel = kChannels * kLanes;
  uint8_t* combined = workspace->combined.data();
  for (int x = 0; x < width; ++x) {
    const uint8_t* from = columns + static_cast<size_t>(taps.first[x] - origin) * kPixel;
    combine<kPixel>(from, kPixel, taps, x, combined + x * kPixel);
  }
  for (int x = 0; x < width; x += kLanes) {
    for (int c = 0; c < kChannels; ++c) {
      transpose_16x16(combined + x * kPixel + c * kLanes, kPixel, rows + c * plane + x, row_stride);
    }
  }
}

// Rows of interleaved channels to planes of `width` columns, `row_stride` bytes apart. Works on 16 rows at a time: up to
// 15 more rows are read and written.
void across(const uint8_t* source, size_t stride, int channels, const Taps& taps, int height, int width,
            Workspace* workspace, uint8_t* rows, size_t row_stride, size_t plane) {
  for (int y = 0; y < height; y += kLanes, source += kLanes * stride, rows += kLanes * row_stride) {
    if (channels == 3) {
      across_strip<3>(source, stride, taps, width, workspace, rows, row_stride, plane);
    } else {
      across_strip<1>(source, stride, taps, width, workspace, rows, row_stride, plane);
    }
  }
}

// Rows of `width` bytes to `height` rows of them, without a byte more.
void down(const uint8_t* rows, size_t row_stride, const Taps& taps, int width, int height, uint8_t* out,
          size_t out_stride) {
  constexpr int kStep = kBlocksDown * kLanes;
  for (int y = 0; y < height; ++y, out += out_stride) {
    const uint8_t* from = rows + row_stride * static_cast<size_t>(taps.first[y] - taps.begin());
    int x = 0;
    for (; x + kStep <= width; x += kStep) combine<kStep>(from + x, row_stride, taps, y, out + x);
    for (; x < width; x += kLanes) {
      uint8_t last[kLanes];
      combine<kLanes>(from + x, row_stride, taps, y, last);
      std::memcpy(out + x, last, static_cast<size_t>(std::min(kLanes, width - x)));
    }
  }
}
