// libjpeg, asked for a part of an image only: columns before the box are not transformed, rows above it only
// entropy-decoded, rows below it not touched. What lies there need not be decoded to know Pillow's verdict: damage in a
// sequential scan is no error to it, a missing end is, and that can be looked up.
#include <csetjmp>
#include <cstring>

#include "decode.h"

namespace fastmim {
namespace {

// Chroma is interpolated between neighbors, so a box needs two more columns on each side.
constexpr int kMargin = 2;
// A partial row starts at a whole block of the coarsest sampling, which is at most 4 blocks of 8.
constexpr int kMostAlignment = 32;

struct Session {
  jpeg::Decompress info;
  jpeg::ErrorManager errors;
  jpeg::SourceManager source;
  std::jmp_buf give_up;
};

void give_up(jpeg::Decompress* info) { std::longjmp(static_cast<Session*>(info->client_data)->give_up, 1); }

// Negative levels are warnings: damaged data. Pillow does not heed them, but decodes the file; so it shall.
void on_message(jpeg::Decompress* info, int level) {
  if (level < 0) give_up(info);
}

void ignore(jpeg::Decompress*) {}

// The whole file is there from the start: to ask for more is to run over its end.
int no_more_input(jpeg::Decompress* info) {
  give_up(info);
  return 0;
}

void skip_input(jpeg::Decompress* info, long count) {
  if (count <= 0) return;
  if (static_cast<size_t>(count) > info->src->bytes_in_buffer) give_up(info);
  info->src->next_input_byte += count;
  info->src->bytes_in_buffer -= static_cast<size_t>(count);
}

int extended(int start, int length, int limit, int* new_length) {
  const int first = start > kMargin ? start - kMargin : 0;
  const int end = start + length + kMargin < limit ? start + length + kMargin : limit;
  *new_length = end - first;
  return first;
}

// No object with a destructor may live in this frame: longjmp leaves it.
Status run(const jpeg::Library& library, const Header& header, Region* region, Session* session) {
  jpeg::Decompress* info = &session->info;
  if (setjmp(session->give_up)) {
    library.destroy_decompress(info);
    return kDamaged;
  }
  library.create_decompress(info, jpeg::kLibVersion, sizeof(jpeg::Decompress));
  info->src = &session->source;
  if (library.read_header(info, 1) != 1) give_up(info);
  if (info->image_width != static_cast<unsigned>(header.width) ||
      info->image_height != static_cast<unsigned>(header.height) || info->num_components != header.channels) {
    give_up(info);
  }
  info->out_color_space = header.channels == 1 ? jpeg::kGrayscale : jpeg::kRgb;
  if (!library.start_decompress(info)) give_up(info);

  Rect& rect = region->rect;
  unsigned left = 0, width = info->output_width;
  if (header.crops_columns && rect.width < header.width) {
    left = static_cast<unsigned>(rect.left);
    width = static_cast<unsigned>(rect.width);
    library.crop_scanline(info, &left, &width);
  }
  rect.left = static_cast<int>(left);
  rect.width = static_cast<int>(width);
  if (rect.top > 0 && library.skip_scanlines(info, static_cast<unsigned>(rect.top)) != static_cast<unsigned>(rect.top)) {
    give_up(info);
  }
  uint8_t* row = region->storage.data();
  for (int done = 0; done < rect.height;) {
    constexpr int kRows = 16;
    uint8_t* rows[kRows];
    const int count = rect.height - done < kRows ? rect.height - done : kRows;
    for (int i = 0; i < count; ++i) rows[i] = row + region->stride * static_cast<size_t>(done + i);
    const unsigned got = library.read_scanlines(info, rows, static_cast<unsigned>(count));
    if (!got) give_up(info);
    done += static_cast<int>(got);
  }
  library.destroy_decompress(info);
  return kDone;
}

void prepare(const jpeg::Library& library, Bytes file, Session* session) {
  std::memset(session, 0, sizeof *session);
  session->info.err = library.std_error(&session->errors);
  session->info.client_data = session;
  session->errors.error_exit = give_up;
  session->errors.emit_message = on_message;
  session->errors.output_message = ignore;
  session->source = {file.data, file.size, ignore, no_more_input, skip_input, library.resync_to_restart, ignore};
}

}  // namespace

bool speaks_our_interface(const jpeg::Library& library) {
  Session session;
  prepare(library, {nullptr, 0}, &session);
  if (setjmp(session.give_up)) return false;
  library.create_decompress(&session.info, jpeg::kLibVersion, sizeof(jpeg::Decompress));
  library.destroy_decompress(&session.info);
  return true;
}

Status decode_region(const jpeg::Library& library, Bytes file, const Header& header, Rect wanted, Region* region) {
  Rect& rect = region->rect;
  rect = wanted;
  if (header.crops_columns) {
    rect.left = extended(wanted.left, wanted.width, header.width, &rect.width);
  } else {
    rect.left = 0;
    rect.width = header.width;
  }
  region->channels = header.channels;
  const size_t most_bytes = static_cast<size_t>(rect.width + kMostAlignment) * static_cast<size_t>(header.channels);
  region->stride = (most_bytes + 63) / 64 * 64;
  // The resampler reads blocks of 16 x 16 bytes that may begin in the last row and pixel.
  const size_t bytes = (static_cast<size_t>(rect.height) + 15) * region->stride + 16;
  if (region->storage.size() < bytes) region->storage.resize(bytes);
  region->pixels = region->storage.data();

  Session session;
  prepare(library, file, &session);
  const Status status = run(library, header, region, &session);
  if (status != kDone) return status;

  // The end of the image itself may have been read already.
  const size_t read = static_cast<size_t>(session.source.next_input_byte - file.data);
  return ends_cleanly(file, read < 2 ? 0 : read - 2) ? kDone : kDamaged;
}

void convert_to_gray(Region* region) {
  const uint8_t* from = region->pixels;
  const size_t width = static_cast<size_t>(region->rect.width);
  const size_t bytes = (static_cast<size_t>(region->rect.height) + 15) * width + 16;
  // In place if the pixels are our own: a pixel is read before its place is written to.
  if (region->storage.size() < bytes) region->storage.resize(bytes);
  uint8_t* to = region->storage.data();
  for (int y = 0; y < region->rect.height; ++y, from += region->stride, to += width) {
    for (size_t x = 0; x < width; ++x) {
      to[x] = static_cast<uint8_t>((from[3 * x] * 19595u + from[3 * x + 1] * 38470u + from[3 * x + 2] * 7471u + 0x8000u) >> 16);
    }
  }
  region->pixels = region->storage.data();
  region->stride = width;
  region->channels = 1;
}

}  // namespace fastmim
