// Which files are plain enough. Every rule that refuses here stands for a case in which Pillow's own reader of headers
// (PIL/JpegImagePlugin.py) or libjpeg raises or warns, or in which they might see different things.
#include <cstring>

#include "decode.h"

namespace fastmim {
namespace {

constexpr uint8_t kMarker = 0xFF;
constexpr uint8_t kSof0 = 0xC0, kSof1 = 0xC1, kSof2 = 0xC2, kDht = 0xC4, kRst0 = 0xD0, kRst7 = 0xD7, kEoi = 0xD9,
                  kSos = 0xDA, kDqt = 0xDB, kDri = 0xDD, kApp0 = 0xE0, kApp1 = 0xE1, kApp2 = 0xE2, kApp13 = 0xED,
                  kApp14 = 0xEE, kApp15 = 0xEF, kCom = 0xFE;

unsigned big_endian_16(const uint8_t* p) { return p[0] << 8 | p[1]; }

template <size_t N>
bool starts_with(Bytes s, const char (&text)[N]) {
  return s.size >= N - 1 && std::memcmp(s.data, text, N - 1) == 0;
}

bool is_plain_frame(Bytes s, Header* header) {
  if (s.size < 6 || s.data[0] != 8) return false;
  header->height = static_cast<int>(big_endian_16(s.data + 1));
  header->width = static_cast<int>(big_endian_16(s.data + 3));
  header->channels = s.data[5];
  if (!header->width || !header->height || (header->channels != 1 && header->channels != 3)) return false;
  if (s.size != 6 + 3 * static_cast<size_t>(header->channels)) return false;
  // Only where chroma is stored whole or halved does libjpeg-turbo decode partial rows exactly; gray has nothing to
  // upsample.
  header->crops_columns = true;
  if (header->channels == 3) {
    const uint8_t luma = s.data[7];
    header->crops_columns = (luma == 0x11 || luma == 0x21 || luma == 0x12 || luma == 0x22) && s.data[10] == 0x11 &&
                            s.data[13] == 0x11;
  }
  return true;
}

bool are_plain_quantization_tables(Bytes s) {
  while (s.size) {
    const size_t length = s.data[0] >> 4 ? 129 : 65;
    if (s.size < length) return false;
    s = {s.data + length, s.size - length};
  }
  return true;
}

// Pillow walks through Photoshop's resources and stumbles over one whose name begins behind the end.
bool are_plain_photoshop_resources(Bytes s) {
  size_t at = 14;
  while (at + 4 <= s.size && std::memcmp(s.data + at, "8BIM", 4) == 0) {
    at += 4;
    if (at + 2 > s.size) return true;
    const unsigned code = big_endian_16(s.data + at);
    at += 2;
    if (at >= s.size) return false;
    at += 1 + s.data[at];
    at += at & 1;
    if (at + 4 > s.size) return true;
    const uint64_t size = static_cast<uint64_t>(big_endian_16(s.data + at)) << 16 | big_endian_16(s.data + at + 2);
    at += 4;
    if (size > s.size || at + size > s.size) return true;
    if (code == 0x03ED && size < 14) return true;
    at += size;
    at += at & 1;
  }
  return true;
}

bool is_plain_application_segment(uint8_t marker, Bytes s) {
  if (marker == kApp0 && starts_with(s, "JFIF")) return s.size >= 7;
  if (marker == kApp2 && starts_with(s, "ICC_PROFILE\0")) return s.size >= 14;
  if (marker == kApp2 && starts_with(s, "MPF\0")) return false;  // several pictures in one file
  if (marker == kApp13 && starts_with(s, "Photoshop 3.0\0")) return are_plain_photoshop_resources(s);
  if (marker == kApp14 && starts_with(s, "Adobe")) return s.size >= 7;
  return true;
}

}  // namespace

bool parse_header(Bytes file, Header* header) {
  if (file.size < 4 || file.data[0] != kMarker || file.data[1] != 0xD8) return false;
  bool has_frame = false;
  size_t at = 2;
  while (at < file.size) {
    if (file.data[at] != kMarker) return false;
    while (at < file.size && file.data[at] == kMarker) ++at;  // any number of fill bytes
    if (at + 3 > file.size) return false;
    const uint8_t marker = file.data[at++];
    const size_t length = big_endian_16(file.data + at);
    if (length < 2 || at + length > file.size) return false;
    const Bytes segment = {file.data + at + 2, length - 2};
    at += length;
    if (marker == kSof0 || marker == kSof1 || marker == kSof2) {
      if (has_frame || !is_plain_frame(segment, header)) return false;
      has_frame = true;
    } else if (marker == kDqt) {
      if (!are_plain_quantization_tables(segment)) return false;
    } else if (marker >= kApp0 && marker <= kApp15) {
      if (!is_plain_application_segment(marker, segment)) return false;
    } else if (marker == kSos) {
      return has_frame;
    } else if (marker != kDht && marker != kDri && marker != kCom) {
      return false;
    }
  }
  return false;
}

bool ends_cleanly(Bytes file, size_t start) {
  const uint8_t* at = file.data + start;
  const uint8_t* const end = file.data + file.size;
  while (at < end && (at = static_cast<const uint8_t*>(std::memchr(at, kMarker, end - at))) && at + 1 < end) {
    const uint8_t next = at[1];
    if (next == kMarker) {
      ++at;
    } else if (next == 0 || (next >= kRst0 && next <= kRst7)) {
      at += 2;
    } else {
      return next == kEoi;
    }
  }
  return false;
}

}  // namespace fastmim
