#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace neq::cuda {

struct Size2 {
  int y, x;
};

// [images, lines, columns, channels] with adjacent channels. Strides count pieces of 16 bytes.
struct Images {
  const void* data;
  int64_t image;
  int line, column;
};

// How the work is split among thread blocks: a block takes `octets` of active rows, `slices` of
// channels, and one of `parts` parts of the tiles of the output.
struct ConvPlan {
  Size2 tile;  // pixels of one image
  int octets;  // 1 to 4, of 8 active rows each
  int slices;  // of 16 channels each; slices times taps of the kernel is at most 36
  int parts;   // at most the number of tiles
};

// Of a tile in shared memory. Pixels are padded to an odd number of 16-byte pieces, so that eight
// adjacent ones lie in different banks.
constexpr int64_t x_pixel_bytes(int slices) { return (2 * slices | 1) * 16; }
constexpr int64_t dy_pixel_bytes(int neurons) { return int64_t(neurons / 8 | 1) * 16; }

// The gradient of the weight and bias of a 2-d convolution, for the active rows.
struct ConvWgrad {
  DType dtype;                       // of dy and x: float16 or bfloat16
  DType weight_dtype;                // of dw and db
  int images, neurons, channels, k;  // neurons and channels are multiples of 8
  Size2 input, output, kernel, stride, padding, dilation;
  Images dy, x;
  int rows;  // of dw: one for each neuron; or fewer, but at least k, and then the active come first
  void* dw;  // [rows, channels, kernel], zero but for the active ones
  int64_t dw_strides[4];
  void* db;              // [rows], or null
  const int64_t* order;  // [neurons]: a permutation, the k active ones first
  // scratch: the sums of each part; padded is k rounded up to whole blocks of octets
  float* partial_dw;  // [parts, padded, kernel, channels]
  float* partial_db;  // [parts, padded]
  ConvPlan plan;
};

// All memory is the device's, and `stream` is a cudaStream_t. Neither synchronizes nor allocates.
// Does not check `order`. Returns CUDA's error message, or null.
const char* conv_wgrad(const ConvWgrad& problem, int device, void* stream);

}  // namespace neq::cuda
