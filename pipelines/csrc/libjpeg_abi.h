// The part of libjpeg's binary interface, version 6.2, that the decoder touches: what libjpeg-turbo offers by default
// and Pillow's wheels carry. Written down here so that building needs a compiler and no jpeglib.h; the test compares
// the offsets with a jpeglib.h where there is one, and jpeg_CreateDecompress compares the size at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jpeg {

constexpr int kLibVersion = 62;
enum ColorSpace { kGrayscale = 1, kRgb = 2 };

struct Decompress;

struct ErrorManager {
  void (*error_exit)(Decompress*);
  void (*emit_message)(Decompress*, int level);
  void (*output_message)(Decompress*);
  void (*format_message)(Decompress*, char* buffer);
  void (*reset_error_mgr)(Decompress*);
  int msg_code;
  int msg_parm[20];
  int trace_level;
  long num_warnings;
  const void* message_table;
  int last_message;
  const void* addon_message_table;
  int first_addon_message;
  int last_addon_message;
};

struct SourceManager {
  const uint8_t* next_input_byte;
  size_t bytes_in_buffer;
  void (*init_source)(Decompress*);
  int (*fill_input_buffer)(Decompress*);
  void (*skip_input_data)(Decompress*, long count);
  int (*resync_to_restart)(Decompress*, int desired);
  void (*term_source)(Decompress*);
};

struct Decompress {
  ErrorManager* err;
  void* mem;
  void* progress;
  void* client_data;
  int is_decompressor;
  int global_state;
  SourceManager* src;
  unsigned image_width, image_height;
  int num_components;
  int jpeg_color_space, out_color_space;
  unsigned scale_num, scale_denom;
  double output_gamma;
  int buffered_image, raw_data_out;
  int dct_method, do_fancy_upsampling, do_block_smoothing;
  int quantize_colors, dither_mode, two_pass_quantize, desired_number_of_colors;
  int enable_1pass_quant, enable_external_quant, enable_2pass_quant;
  unsigned output_width, output_height;
  int out_color_components, output_components, rec_outbuf_height;
  int actual_number_of_colors;
  uint8_t** colormap;
  unsigned output_scanline;
  uint8_t private_fields[460];
};
static_assert(sizeof(void*) != 8 || sizeof(Decompress) == 632, "size of jpeg_decompress_struct, ABI 6.2, 64 bits");

// The functions, looked up in the library that Pillow has loaded.
struct Library {
  ErrorManager* (*std_error)(ErrorManager*);
  void (*create_decompress)(Decompress*, int version, size_t size);
  void (*destroy_decompress)(Decompress*);
  int (*read_header)(Decompress*, int require_image);
  int (*start_decompress)(Decompress*);
  unsigned (*read_scanlines)(Decompress*, uint8_t** rows, unsigned count);
  unsigned (*skip_scanlines)(Decompress*, unsigned count);
  void (*crop_scanline)(Decompress*, unsigned* left, unsigned* width);
  int (*resync_to_restart)(Decompress*, int desired);
};

}  // namespace jpeg
