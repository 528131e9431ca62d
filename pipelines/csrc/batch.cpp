// The plain C interface: batches of files, worked off by a team of threads that lives as long as the call. Nothing
// outlives a batch, no lock is held between calls: a process may fork at any time and both sides decode on.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>

#include "decode.h"

namespace fastmim {
namespace {

jpeg::Library library;

struct File {
  std::unique_ptr<uint8_t[]> owned;
  Bytes bytes = {nullptr, 0};
  bool is_raw = false;  // pixels as they are: rows of RGB
  Header header = {0, 0, 0, false};
};

struct Batch {
  explicit Batch(int count) : files(static_cast<size_t>(count)) {}
  std::vector<File> files;
};

// What one thread needs again and again.
struct Tools {
  Region region;
  Workspace workspace;
  std::vector<Taps> across, down;
};

template <typename Work>  // Status work(int item, Tools*)
void for_each(int count, int threads, int* status, Work work) {
  std::atomic<int> next{0};
  auto loop = [&] {
    Tools tools;
    for (int i; (i = next.fetch_add(1)) < count;) {
      if (status[i] != kDone) continue;
      try {
        status[i] = work(i, &tools);
      } catch (...) {  // std::bad_alloc and kin: a broken header may ask for anything
        status[i] = kNoMemory;
        tools = Tools();
      }
    }
  };
  std::vector<std::thread> team;
  // Signals are for the threads of the interpreter.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 1; i < std::min(threads, count); ++i) team.emplace_back(loop);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do the work.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  loop();
  for (std::thread& thread : team) thread.join();
}

// False where the bytes cannot be had whole. Of what does not begin like a JPEG file only the beginning is read.
bool read_at(int descriptor, int64_t offset, size_t size, File* file) {
  uint8_t beginning[2];
  if (!file->is_raw && size > sizeof beginning &&
      pread(descriptor, beginning, sizeof beginning, offset) == sizeof beginning &&
      (beginning[0] != 0xFF || beginning[1] != 0xD8)) {
    return true;
  }
  // The resampler looks beyond the end of raw pixels, see Region.
  const size_t slack = file->is_raw ? 48 * static_cast<size_t>(file->header.width) + 16 : 0;
  file->owned.reset(new uint8_t[size + slack]);
  size_t done = 0;
  while (done < size) {
    const ssize_t got = pread(descriptor, file->owned.get() + done, size - done, offset + static_cast<int64_t>(done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += static_cast<size_t>(got);
  }
  file->bytes = {file->owned.get(), size};
  return true;
}

// A whole file, if size is negative.
bool read_path(const char* path, int64_t offset, int64_t size, File* file) {
  // A pipe that took the place of a file must not block.
  const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return false;
  struct stat about;
  bool is_good = fstat(descriptor, &about) == 0 && S_ISREG(about.st_mode);
  if (is_good && size < 0) size = about.st_size;
  is_good = is_good && size > 0 && size <= about.st_size && read_at(descriptor, offset, static_cast<size_t>(size), file);
  close(descriptor);
  return is_good;
}

// Where the bytes of the files are; see fastmim_decode_open.
struct Sources {
  const char* const* paths;
  const int* descriptors;
  const int64_t *offsets, *sizes;
  const uint8_t* const* data;
  const int* raw_sizes;

  Status read(size_t i, int64_t most_pixels, File* file) const {
    if (raw_sizes && raw_sizes[2 * i] > 0) {
      file->is_raw = true;
      file->header = {raw_sizes[2 * i], raw_sizes[2 * i + 1], 3, false};
      if (file->header.height <= 0 || sizes[i] != int64_t{3} * file->header.width * file->header.height) return kOtherKind;
      if (pixels(*file) > most_pixels) return kTooLarge;
    }
    if (data) {
      file->bytes = {data[i], static_cast<size_t>(sizes[i])};
    } else if (sizes && sizes[i] <= 0) {
      return kUnreadable;
    } else if (descriptors && descriptors[i] >= 0) {
      if (!read_at(descriptors[i], offsets[i], static_cast<size_t>(sizes[i]), file)) return kUnreadable;
    } else if (!read_path(paths[i], offsets ? offsets[i] : 0, sizes ? sizes[i] : -1, file)) {
      return kUnreadable;
    }
    if (file->is_raw) return kDone;
    if (!parse_header(file->bytes, &file->header)) return kOtherKind;
    return pixels(*file) > most_pixels ? kTooLarge : kDone;
  }

  static int64_t pixels(const File& file) { return static_cast<int64_t>(file.header.width) * file.header.height; }
};

struct Crops {
  int number;            // per image
  const double* boxes;   // (number, images, 4): left, top, width, height
  const int* sizes;      // (number, 2): height, width
  const int* filters;    // (number)
  uint8_t* const* out;   // (number): (images, channels, height, width)
  int channels;
  // Pillow from version 13 on begins with the vertical pass where that shrinks the height much more than the width.
  bool may_begin_down;
};

// Start and end of what lies in 0..limit, never empty. The same as in decode.py.
void clamp(double limit, double start, double length, double* box_start, double* box_end) {
  *box_start = start > 0 ? std::min(start, limit - 1) : 0;
  const double end = start + length;
  *box_end = end < limit ? std::max(end, *box_start + 1e-3) : limit;
}

Status crop(const File& file, int item, int items, const Crops& crops, Tools* tools) {
  const Header& header = file.header;
  tools->across.resize(static_cast<size_t>(crops.number));
  tools->down.resize(static_cast<size_t>(crops.number));
  Rect wanted = {header.width, header.height, 0, 0};
  int right = 0, bottom = 0;
  for (int k = 0; k < crops.number; ++k) {
    const double* box = crops.boxes + 4 * (static_cast<size_t>(k) * items + item);
    const Filter filter = static_cast<Filter>(crops.filters[k]);
    double start, end;
    Taps& across = tools->across[k];
    clamp(header.width, box[0], box[2], &start, &end);
    across.compute(header.width, start, end, crops.sizes[2 * k + 1], filter);
    Taps& down = tools->down[k];
    clamp(header.height, box[1], box[3], &start, &end);
    down.compute(header.height, start, end, crops.sizes[2 * k], filter);
    wanted.left = std::min(wanted.left, across.begin());
    wanted.top = std::min(wanted.top, down.begin());
    right = std::max(right, across.end());
    bottom = std::max(bottom, down.end());
  }
  wanted.width = right - wanted.left;
  wanted.height = bottom - wanted.top;
  Region& region = tools->region;
  if (file.is_raw) {
    region.rect = {0, 0, header.width, header.height};
    region.channels = header.channels;
    region.stride = static_cast<size_t>(header.width) * 3;
    region.pixels = file.bytes.data;
  } else {
    const Status status = decode_region(library, file.bytes, header, wanted, &region);
    if (status != kDone) return status;
  }
  if (crops.channels == 1 && region.channels == 3) convert_to_gray(&region);
  for (int k = 0; k < crops.number; ++k) {
    const size_t plane = static_cast<size_t>(crops.sizes[2 * k]) * static_cast<size_t>(crops.sizes[2 * k + 1]);
    uint8_t* out = crops.out[k] + plane * static_cast<size_t>(crops.channels) * static_cast<size_t>(item);
    const int less_high = header.height - crops.sizes[2 * k], less_wide = header.width - crops.sizes[2 * k + 1];
    const bool is_down_first = crops.may_begin_down && less_high > 0 && less_high > 2 * less_wide;
    resample(region, tools->across[k], tools->down[k], is_down_first, &tools->workspace, out);
    for (int c = region.channels; c < crops.channels; ++c) std::memcpy(out + plane * static_cast<size_t>(c), out, plane);
  }
  return kDone;
}

template <typename Function>
bool find(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

}  // namespace
}  // namespace fastmim

#define EXPORT extern "C" __attribute__((visibility("default")))

// The generation of this interface; native_decode.py knows which one it speaks.
EXPORT int fastmim_decode_version() { return 3; }

EXPORT void fastmim_decode_use_instructions(int most) { fastmim::use_instructions(most); }

// Binds libjpeg's functions. Returns null, or what is missing; the text lives until the next call.
EXPORT const char* fastmim_decode_load(const char* libjpeg) {
  using namespace fastmim;
  void* handle = dlopen(libjpeg, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return dlerror();
  jpeg::Library found;
  const bool has_all = find(handle, "jpeg_std_error", &found.std_error) &&
                       find(handle, "jpeg_CreateDecompress", &found.create_decompress) &&
                       find(handle, "jpeg_destroy_decompress", &found.destroy_decompress) &&
                       find(handle, "jpeg_read_header", &found.read_header) &&
                       find(handle, "jpeg_start_decompress", &found.start_decompress) &&
                       find(handle, "jpeg_read_scanlines", &found.read_scanlines) &&
                       find(handle, "jpeg_skip_scanlines", &found.skip_scanlines) &&
                       find(handle, "jpeg_crop_scanline", &found.crop_scanline) &&
                       find(handle, "jpeg_resync_to_restart", &found.resync_to_restart);
  if (!has_all) return "it lacks functions of libjpeg-turbo (jpeg_crop_scanline, jpeg_skip_scanlines)";
  if (!speaks_our_interface(found)) return "its binary interface is not that of libjpeg 6.2";
  library = found;
  return nullptr;
}

// Reads files and their headers. Their bytes are at `data` with `sizes`, which must live as long as the batch; or, if that
// is null, in open files or (where there is no descriptor, or a negative one) at paths: at `offsets` with `sizes`, or the
// whole file, if those are null. `raw_sizes`, if not null, holds width and height of those that are raw RGB pixels, not
// image files, and 0 for the others. `status` must hold zeros. Returns null if memory is short.
EXPORT void* fastmim_decode_open(int count, const char* const* paths, const int* descriptors, const int64_t* offsets,
                                 const int64_t* sizes, const uint8_t* const* data, const int* raw_sizes,
                                 int64_t most_pixels, int threads, int* widths, int* heights, int* status) {
  using namespace fastmim;
  std::unique_ptr<Batch> batch;
  try {
    batch.reset(new Batch(count));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  const Sources sources = {paths, descriptors, offsets, sizes, data, raw_sizes};
  for_each(count, threads, status, [&](int i, Tools*) {
    File& file = batch->files[static_cast<size_t>(i)];
    const Status result = sources.read(static_cast<size_t>(i), most_pixels, &file);
    if (result == kDone) {
      widths[i] = file.header.width;
      heights[i] = file.header.height;
    }
    return result;
  });
  return batch.release();
}

// Crops of every file whose status is 0; the status of the others stays, and their places in `out` untouched.
EXPORT void fastmim_decode_crop(const void* batch, int number, const double* boxes, const int* sizes, const int* filters,
                                uint8_t* const* out, int channels, int begin_down, int threads, int* status) {
  using namespace fastmim;
  const std::vector<File>& files = static_cast<const Batch*>(batch)->files;
  const int count = static_cast<int>(files.size());
  const Crops crops = {number, boxes, sizes, filters, out, channels, begin_down != 0};
  for_each(count, threads, status, [&](int i, Tools* tools) {
    return crop(files[static_cast<size_t>(i)], i, count, crops, tools);
  });
}

EXPORT void fastmim_decode_close(void* batch) { delete static_cast<fastmim::Batch*>(batch); }
