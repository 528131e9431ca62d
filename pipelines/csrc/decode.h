// From the bytes of a JPEG file to resized boxes of it, equal to what Pillow gives, bit for bit.
//
// The decoder takes only files that it is sure Pillow would take, too; everything else is left to Pillow: other
// formats, CMYK, files with a remark from libjpeg. So a file's pixels and its errors are the same with and without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "libjpeg_abi.h"

namespace fastmim {

enum Status : int {
  kDone = 0,
  kUnreadable = 1,   // the file could not be read whole
  kOtherKind = 2,    // not a plain 8-bit gray or color JPEG file
  kTooLarge = 3,     // more pixels than allowed
  kDamaged = 4,      // libjpeg warns, or the end of the image is missing
  kNoMemory = 5,
};

struct Bytes {
  const uint8_t* data;
  size_t size;
};

struct Header {
  int width, height;
  int channels;       // 1 or 3
  bool crops_columns; // the sampling factors are ones for which a partial row equals that of the whole image
};

// False unless Pillow and libjpeg certainly agree on the header. jpeg_header.cpp
bool parse_header(Bytes file, Header* header);
// True if from `start`, a place in the last scan's data, the next marker that is no restart is the end of the image.
bool ends_cleanly(Bytes file, size_t start);

struct Rect {
  int left, top, width, height;
};

// Decoded part of an image: rows of interleaved channels, `stride` bytes apart, in `storage` or elsewhere. 15 more rows
// and 16 more bytes may be read; they hold anything.
struct Region {
  Rect rect;
  int channels;
  size_t stride;
  const uint8_t* pixels;
  std::vector<uint8_t> storage;
};

// Whether the library agrees with libjpeg_abi.h.
bool speaks_our_interface(const jpeg::Library& library);
// Decode at least `wanted`, which lies inside the image. jpeg_region.cpp
Status decode_region(const jpeg::Library& library, Bytes file, const Header& header, Rect wanted, Region* region);
// To one channel, as Pillow converts RGB to L.
void convert_to_gray(Region* region);

enum Filter : int { kBilinear = 0, kBicubic = 1, kLanczos = 2 };

// For each place of the output on one axis, the source places that it is made of and their weights in 1 / 2**22.
struct Taps {
  static constexpr int kLowBits = 11;
  int most = 0;  // weights per output place; those beyond count are 0
  std::vector<int> first, count;
  std::vector<int32_t> weights;
  // The weights again, two in one number, their high and low parts in turn: for instructions that multiply 16 bits.
  std::vector<int32_t> pairs;

  void compute(int source, double box_start, double box_end, int output, Filter filter);
  int begin() const { return first.front(); }
  int end() const { return first.back() + count.back(); }
  int most_pairs() const { return (most + 1) / 2; }
  const int32_t* weights_of(int place) const { return &weights[static_cast<size_t>(place) * static_cast<size_t>(most)]; }
  const int32_t* pairs_of(int place) const {
    return &pairs[static_cast<size_t>(place) * static_cast<size_t>(most_pairs()) * 2];
  }
};

// Buffers of the resampler, kept for the next image. resample.cpp
struct Workspace {
  std::vector<uint8_t> columns, combined, rows, lower;
};

// What the resampler may use where the processor has it: 0 nothing special, 1 AVX2, 2 (at first) AVX-512 with VNNI. All
// give the same bits; a choice is for tests.
void use_instructions(int most);
// Write `region` resampled to planes (channels, height, width) without gaps.
void resample(const Region& region, const Taps& across, const Taps& down, bool is_down_first, Workspace* workspace,
              uint8_t* planes);

}  // namespace fastmim
