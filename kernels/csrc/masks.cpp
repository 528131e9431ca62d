// Random masks: cells of patches sorted by (random word, cell index), as masks/reference.py sorts them.
#include <vector>

#include "philox.h"

namespace fastmim {
namespace {

constexpr int INDEX_BITS = 20;

// Sorts cells by their word: counting sort by the upper bits, then insertion sort of what is almost sorted. The words
// are uniform, so a bucket holds one cell on average and the whole takes time proportional to the number of cells.
class Drawing {
 public:
  explicit Drawing(int64_t cells) : words_(size(cells)), keys_(size(cells)) {
    while ((int64_t{1} << bits_) < cells) ++bits_;
    starts_.resize((size_t{1} << bits_) + 1);
  }

  // The drawn order: cell index = sorted[i] & (2^20 - 1).
  const uint64_t* sorted(const int64_t* rng, int64_t sample) {
    constexpr int64_t MASK_STREAM = 0;
    philox(rng, sample, MASK_STREAM, static_cast<int64_t>(words_.size()),
           [&](int64_t start, const uint32_t* words, int64_t n) { std::copy_n(words, n, words_.begin() + start); });
    const int shift = 32 - bits_;
    std::fill(starts_.begin(), starts_.end(), 0u);
    for (const uint32_t word : words_) ++starts_[(word >> shift) + 1];
    for (size_t i = 1; i < starts_.size(); ++i) starts_[i] += starts_[i - 1];
    for (size_t i = 0; i < words_.size(); ++i)
      keys_[starts_[words_[i] >> shift]++] = uint64_t{words_[i]} << INDEX_BITS | i;
    for (size_t i = 1; i < keys_.size(); ++i) {
      const uint64_t key = keys_[i];
      size_t at = i;
      for (; at > 0 && keys_[at - 1] > key; --at) keys_[at] = keys_[at - 1];
      keys_[at] = key;
    }
    return keys_.data();
  }

 private:
  static size_t size(int64_t n) { return static_cast<size_t>(n); }
  std::vector<uint32_t> words_, starts_;
  std::vector<uint64_t> keys_;
  int bits_ = 1;
};

}  // namespace

// Grid of rows x columns patches in cells of cell x cell, `keep` cells kept. With L patches and K kept ones: ids_keep
// (B, K), ids_masked (B, L - K), ids_restore (B, L) int64 and mask (B, L) floats.
static Status draw_masks(const int64_t* rng, const int64_t* ids, int64_t batch, int64_t rows, int64_t columns,
                         int64_t cell, int64_t keep, int64_t* ids_keep, int64_t* ids_masked, int64_t* ids_restore,
                         float* mask, int64_t threads) {
  const int64_t across = columns / cell, cells = rows / cell * across;
  const int64_t count = rows * columns, kept = keep * cell * cell;
  const int64_t workers = std::max<int64_t>(1, threads);
  std::vector<Drawing> drawings(static_cast<size_t>(workers), Drawing(cells));
  parallel_for(batch, 2048 / (count + 1) + 1, workers, [&](int64_t begin, int64_t end, int64_t worker) {
    for (int64_t b = begin; b < end; ++b) {
      const uint64_t* order = drawings[static_cast<size_t>(worker)].sorted(rng, ids[b]);
      int64_t place = 0;
      for (int64_t i = 0; i < cells; ++i) {
        const int64_t index = static_cast<int64_t>(order[i] & ((uint64_t{1} << INDEX_BITS) - 1));
        const int64_t corner = index / across * cell * columns + index % across * cell;
        for (int64_t y = 0; y < cell; ++y) {
          for (int64_t x = 0; x < cell; ++x, ++place) {
            const int64_t patch = corner + y * columns + x;
            (place < kept ? ids_keep + b * kept : ids_masked + b * (count - kept) - kept)[place] = patch;
            ids_restore[b * count + patch] = place;
            mask[b * count + patch] = place < kept ? 0.0f : 1.0f;
          }
        }
      }
    }
  });
  return OK;
}

}  // namespace fastmim

FASTMIM_EXPORT(draw_masks)
