// Normalized pixels of chosen patches, each read once from the master image and written once.
#include "images.h"

namespace fastmim {

// ids (B, K) int64, or null for all K patches in raster order; out (B, K, V), contiguous.
static Status patchify_gather(const void* pixels, const int64_t* shape, const int64_t* offset, const uint8_t* flip,
                              const int64_t* ids, int64_t keep, int64_t patch_size, const float* shift,
                              const float* scale, void* out, int64_t dtype, int64_t threads) {
  const Images images(pixels, shape, offset, flip);
  const Patches patches(images, patch_size, shift, scale);
  if (const Status status = images.check()) return status;
  if (const Status status = check_ids(ids, ids ? images.batch * keep : 0, patches.count)) return status;
  const int64_t values = patches.values, room = 2 * padded(values);
  Floats scratch(room * std::max<int64_t>(1, threads));
  return with_pixel(images.dtype, [&](auto pixel) {
    return with_float(dtype, [&](auto result) {
      using Result = decltype(result);
      expect_writes(out, images.batch * keep * values * static_cast<int64_t>(sizeof(Result)));
      const int64_t grain = 32768 / (values + 1) + 1;
      parallel_for(images.batch * keep, grain, threads, [&](int64_t begin, int64_t end, int64_t worker) {
        float *planes = scratch.at(worker * room), *row = planes + padded(values);
        for (int64_t i = begin; i < end; ++i) {
          Result* to = static_cast<Result*>(out) + i * values;
          if constexpr (std::is_same_v<Result, float>) row = to;
          patches.read<decltype(pixel)>(images, i / keep, ids ? ids[i] : i % keep, planes, row);
          if constexpr (!std::is_same_v<Result, float>)
            for (int64_t v = 0; v < values; ++v) from_float(row[v], to[v]);
        }
      });
      return OK;
    });
  });
}

}  // namespace fastmim

FASTMIM_EXPORT(patchify_gather)
