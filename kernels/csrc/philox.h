// Philox4x32-10, the generator of philox/reference.py, bit for bit.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants from Random123 philox.h.
#pragma once

#include "kernel.h"

namespace fastmim {

// The words of one sample, up to 64 at a time: emit(start, words, n) with words start..start + n - 1.
template <class Emit>
inline void philox(const int64_t* rng, int64_t sample, int64_t stream, int64_t count, Emit emit) {
  constexpr int LANES = 16;
  const uint64_t seed = static_cast<uint64_t>(rng[0]), id = static_cast<uint64_t>(sample);
  const uint32_t tag = static_cast<uint32_t>(stream) | static_cast<uint32_t>(((id >> 32) & 0xFFFFu) << 16);
  for (int64_t start = 0; start < count; start += 4 * LANES) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    for (int j = 0; j < LANES; ++j) {
      c0[j] = static_cast<uint32_t>(start / 4 + j);
      c1[j] = static_cast<uint32_t>(id);
      c2[j] = static_cast<uint32_t>(rng[1]);
      c3[j] = tag;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
      for (int j = 0; j < LANES; ++j) {
        const uint64_t a = uint64_t{0xD2511F53u} * c0[j], b = uint64_t{0xCD9E8D57u} * c2[j];
        const uint32_t low_a = static_cast<uint32_t>(a), low_b = static_cast<uint32_t>(b);
        c0[j] = static_cast<uint32_t>(b >> 32) ^ c1[j] ^ k0;
        c2[j] = static_cast<uint32_t>(a >> 32) ^ c3[j] ^ k1;
        c1[j] = low_b;
        c3[j] = low_a;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint32_t words[4 * LANES];
#pragma omp simd
    for (int j = 0; j < LANES; ++j) {
      words[4 * j] = c0[j];
      words[4 * j + 1] = c1[j];
      words[4 * j + 2] = c2[j];
      words[4 * j + 3] = c3[j];
    }
    emit(start, words, std::min<int64_t>(4 * LANES, count - start));
  }
}

}  // namespace fastmim
