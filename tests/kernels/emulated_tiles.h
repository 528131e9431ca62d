// The matrix tiles (AMX) in plain C++, for machines without them: included before anything else when kernels/csrc is compiled.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

constexpr int ROWS = 16, BYTES = 64;
inline thread_local unsigned char tiles[8][ROWS][BYTES];
inline thread_local bool is_configured = false;

// The CPU faults, too.
inline void check() {
  if (!is_configured) __builtin_trap();
}

inline void load(int tile, const void* from, size_t stride) {
  check();
  for (int r = 0; r < ROWS; ++r) std::memcpy(tiles[tile][r], static_cast<const char*>(from) + r * stride, BYTES);
}

inline void store(int tile, void* to, size_t stride) {
  check();
  for (int r = 0; r < ROWS; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles[tile][r], BYTES);
}

inline float widened(const unsigned char* at) {
  uint32_t word = 0;
  float value;
  std::memcpy(reinterpret_cast<char*>(&word) + 2, at, 2);
  std::memcpy(&value, &word, 4);
  return value;
}

// c (16, 16) floats += a (16, 16, 2) b (16, 16, 2), the pairs summed.
inline void multiply(int c, int a, int b) {
  check();
  for (int m = 0; m < ROWS; ++m) {
    for (int n = 0; n < BYTES; n += 4) {
      float sum;
      std::memcpy(&sum, tiles[c][m] + n, 4);
      for (int k = 0; k < ROWS; ++k)
        for (int half = 0; half < 4; half += 2) sum += widened(tiles[a][m] + 4 * k + half) * widened(tiles[b][k] + n + half);
      std::memcpy(tiles[c][m] + n, &sum, 4);
    }
  }
}

inline void clear(int tile) {
  check();
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
}

// All tiles of 16 rows of 64 bytes, which is the one configuration that the kernels use.
inline void configure(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  is_configured = bytes[0] == 1;
  for (int tile = 0; tile < 8; ++tile) {
    uint16_t columns;
    std::memcpy(&columns, bytes + 16 + 2 * tile, 2);
    is_configured &= columns == BYTES && bytes[48 + tile] == ROWS;
  }
}

inline long permit(long, long, long) { return 0; }

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() (emulated::is_configured = false)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) emulated::clear(tile)
#define _tile_dpbf16ps(c, a, b) emulated::multiply(c, a, b)
#define syscall emulated::permit
