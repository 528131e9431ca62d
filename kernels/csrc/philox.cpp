// Random words and uniform numbers per sample.
#include "philox.h"

namespace fastmim {
namespace {

// A worker gets at least 4096 numbers.
inline int64_t samples_per_worker(int64_t count) { return 4096 / (count + 1) + 1; }

}  // namespace

// rng = {seed, step}, ids (B,); out (B, count) int64.
static Status random_words(const int64_t* rng, const int64_t* ids, int64_t batch, int64_t stream, int64_t count,
                           int64_t* out, int64_t threads) {
  parallel_for(batch, samples_per_worker(count), threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t b = begin; b < end; ++b)
      philox(rng, ids[b], stream, count, [row = out + b * count](int64_t start, const uint32_t* words, int64_t n) {
        for (int64_t i = 0; i < n; ++i) row[start + i] = words[i];
      });
  });
  return OK;
}

// The same as floats in [0, 1): the upper 24 bits of a word.
static Status uniform(const int64_t* rng, const int64_t* ids, int64_t batch, int64_t stream, int64_t count, float* out,
                      int64_t threads) {
  parallel_for(batch, samples_per_worker(count), threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t b = begin; b < end; ++b)
      philox(rng, ids[b], stream, count, [row = out + b * count](int64_t start, const uint32_t* words, int64_t n) {
        for (int64_t i = 0; i < n; ++i)
          row[start + i] = static_cast<float>(static_cast<int32_t>(words[i] >> 8)) * 0x1p-24f;
      });
  });
  return OK;
}

}  // namespace fastmim

FASTMIM_EXPORT(random_words)
FASTMIM_EXPORT(uniform)
