// Rows of tokens: gather, and the input of a decoder. Every row of a result is written once, by the row that owns it,
// so nothing is cleared first and sums have a fixed order.
#include <vector>

#include "kernel.h"

namespace fastmim {
namespace {

// A worker gets at least 64 KB of rows.
inline int64_t rows_per_worker(int64_t row_bytes) { return 65536 / (row_bytes + 1) + 1; }

template <class From, class To>
inline void add_rounded(const From* p, const float* q, int64_t n, To* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_float(to_float(p[i]) + q[i], out[i]);
}

template <class From, class To>
inline void convert(const From* p, int64_t n, To* out) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(out, p, static_cast<size_t>(n) * sizeof(To));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_float(to_float(p[i]), out[i]);
  }
}

template <class T>
inline void accumulate(const T* p, int64_t n, float* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += to_float(p[i]);
}

}  // namespace

// x (B, L, D) with rows of `bytes` contiguous bytes and strides of images and rows in bytes; ids (B, K); out (B, K, D).
static Status gather_tokens(const void* x, int64_t stride_b, int64_t stride_l, const int64_t* ids, int64_t batch,
                            int64_t count, int64_t keep, int64_t bytes, void* out, int64_t threads) {
  if (const Status status = check_ids(ids, batch * keep, count)) return status;
  if (bytes == 0) return OK;
  expect_writes(out, batch * keep * bytes);
  parallel_for(batch * keep, rows_per_worker(bytes), threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = static_cast<const char*>(x) + i / keep * stride_b + ids[i] * stride_l;
      std::memcpy(static_cast<char*>(out) + i * bytes, row, static_cast<size_t>(bytes));
    }
  });
  return OK;
}

// out (B, L, D) = rows of grad (B, K, D) at ids, zero elsewhere; rows with the same id are added in their order.
static Status scatter_tokens(const void* grad, const int64_t* ids, int64_t batch, int64_t count, int64_t keep,
                             int64_t width, int64_t dtype, void* out, int64_t threads) {
  if (const Status status = check_ids(ids, batch * keep, count)) return status;
  if (width == 0) return OK;
  // owner[b * L + l] = the first row of grad that goes there, or -1; next[row] = a later one for the same place.
  std::vector<int64_t> owner(static_cast<size_t>(batch * count), -1), next(static_cast<size_t>(batch * keep), -1);
  for (int64_t i = batch * keep - 1; i >= 0; --i) {
    int64_t& first = owner[static_cast<size_t>(i / keep * count + ids[i])];
    next[static_cast<size_t>(i)] = first;
    first = i;
  }
  return with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = width * static_cast<int64_t>(sizeof(T)), room = padded(width);
    Floats scratch(room * std::max<int64_t>(1, threads));
    expect_writes(out, batch * count * bytes);
    parallel_for(batch * count, rows_per_worker(bytes), threads, [&](int64_t begin, int64_t end, int64_t worker) {
      float* sum = scratch.at(worker * room);
      const T* rows = static_cast<const T*>(grad);
      for (int64_t i = begin; i < end; ++i) {
        T* to = static_cast<T*>(out) + i * width;
        const int64_t first = owner[static_cast<size_t>(i)];
        if (first < 0) {
          std::memset(static_cast<void*>(to), 0, static_cast<size_t>(bytes));
        } else if (next[static_cast<size_t>(first)] < 0) {
          convert(rows + first * width, width, to);
        } else {
          std::fill_n(sum, width, 0.0f);
          for (int64_t row = first; row >= 0; row = next[static_cast<size_t>(row)])
            accumulate(rows + row * width, width, sum);
          convert(sum, width, to);
        }
      }
    });
    return OK;
  });
}

// x (B, P + K, D) of dtype `from` with strides of images and rows in elements; mask_token (D,) and pos (P + L, D)
// floats; ids_restore (B, L); out (B, P + L, D) of dtype `to`.
static Status restore_tokens(const void* x, int64_t stride_b, int64_t stride_t, int64_t from, const float* mask_token,
                             const float* pos, const int64_t* ids_restore, int64_t batch, int64_t count, int64_t keep,
                             int64_t prefix, int64_t width, void* out, int64_t to, int64_t threads) {
  if (const Status status = check_ids(ids_restore, batch * count, count)) return status;
  if (width == 0) return OK;
  return with_float(from, [&](auto element) {
    return with_float(to, [&](auto result) {
      using From = decltype(element);
      using To = decltype(result);
      const int64_t rows = prefix + count, bytes = width * static_cast<int64_t>(sizeof(To));
      expect_writes(out, batch * rows * bytes);
      // A masked patch looks the same in every image: those rows are added and rounded once, then copied.
      std::vector<To> unseen(static_cast<size_t>(count * width));
      for (int64_t l = 0; l < count; ++l)
        add_rounded(mask_token, pos + (prefix + l) * width, width, unseen.data() + l * width);
      parallel_for(batch * rows, rows_per_worker(bytes), threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / rows, t = i % rows, l = t - prefix;
          const int64_t place = l < 0 ? 0 : ids_restore[b * count + l];
          To* row = static_cast<To*>(out) + i * width;
          if (place < keep || l < 0) {
            const From* seen = static_cast<const From*>(x) + b * stride_b + (l < 0 ? t : prefix + place) * stride_t;
            add_rounded(seen, pos + t * width, width, row);
          } else {
            std::memcpy(static_cast<void*>(row), unseen.data() + l * width, static_cast<size_t>(bytes));
          }
        }
      });
      return OK;
    });
  });
}

// Gradients from grad (B, P + L, D), each null where it is not wanted: for_x (B, P + K, D) of dtype `to`, for_mask (D,)
// and for_pos (P + L, D) floats.
static Status restore_tokens_backward(const void* grad, int64_t from, const int64_t* ids_restore, int64_t batch,
                                      int64_t count, int64_t keep, int64_t prefix, int64_t width, void* for_x,
                                      int64_t to, float* for_mask, float* for_pos, int64_t threads) {
  if (const Status status = check_ids(ids_restore, batch * count, count)) return status;
  if (width == 0) return OK;
  return with_float(from, [&](auto element) {
    return with_float(to, [&](auto result) {
      using From = decltype(element);
      using To = decltype(result);
      const int64_t rows = prefix + count, room = padded(width), bytes = width * static_cast<int64_t>(sizeof(From));
      const From* g = static_cast<const From*>(grad);
      // One sum per image, then over the images: the order does not depend on the number of threads.
      Floats sums(room * batch);
      if (for_x) expect_writes(for_x, batch * (prefix + keep) * width * static_cast<int64_t>(sizeof(To)));
      const int64_t images_per_worker = rows_per_worker(bytes) / (rows + 1) + 1;
      parallel_for(for_x || for_mask ? batch : 0, images_per_worker, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t b = begin; b < end; ++b) {
          float* sum = sums.at(b * room);
          std::fill_n(sum, width, 0.0f);
          for (int64_t t = 0; t < rows; ++t) {
            const From* row = g + (b * rows + t) * width;
            const int64_t place = t < prefix ? t : prefix + ids_restore[b * count + t - prefix];
            if (place >= prefix + keep) {
              if (for_mask) accumulate(row, width, sum);
            } else if (for_x) {
              convert(row, width, static_cast<To*>(for_x) + (b * (prefix + keep) + place) * width);
            }
          }
        }
      });
      if (for_mask) {
        std::fill_n(for_mask, width, 0.0f);
        for (int64_t b = 0; b < batch; ++b) accumulate(sums.at(b * room), width, for_mask);
      }
      parallel_for(for_pos ? rows : 0, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t t = begin; t < end; ++t) {
          std::fill_n(for_pos + t * width, width, 0.0f);
          for (int64_t b = 0; b < batch; ++b) accumulate(g + (b * rows + t) * width, width, for_pos + t * width);
        }
      });
      return OK;
    });
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(gather_tokens)
FASTMIM_EXPORT(scatter_tokens)
FASTMIM_EXPORT(restore_tokens)
FASTMIM_EXPORT(restore_tokens_backward)
