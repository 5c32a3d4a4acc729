#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace neq::cuda {

struct Size2 {
  int y, x;
};

// [images, lines, columns, channels], the channels adjacent.
struct Images {
  const void* data;
  int64_t image;  // from one to the next: so many pieces of 16 bytes
  int line, column;
};

// How the work is cut up among blocks of threads. A block takes some active rows, some channels,
// and one part of the tiles of the output.
struct ConvPlan {
  Size2 tile;  // pixels of one image
  int octets;  // of active rows in a block, 1 to 4
  int slices;  // of 16 channels in a block; times the taps of the kernel, 36 at most
  int parts;   // as many as there are tiles at most
};

// The gradient of the weight and bias of a 2-d convolution, for the active rows.
struct ConvWgrad {
  DType dtype;                       // of dy and x: float16 or bfloat16
  DType weight_dtype;                // of dw and db
  int images, neurons, channels, k;  // neurons and channels are multiples of 8
  Size2 input, output, kernel, stride, padding, dilation;
  Images dy, x;
  void* dw;  // [neurons, channels, kernel], zero but for the active rows
  int64_t dw_strides[4];
  void* db;             // [neurons], or null
  const int64_t* rows;  // [neurons]: all of them, the k active ones first
  // scratch: the sums of each part, for k rounded up to whole blocks
  float* partial_dw;  // [parts, rows, kernel, channels]
  float* partial_db;  // [parts, rows]
  ConvPlan plan;
};

// On the device's memory and in the order of `stream`, a cudaStream_t. Neither waits nor allocates.
// Rows are not checked. Returns what CUDA says went wrong, or null.
const char* conv_wgrad(const ConvWgrad& problem, int device, void* stream);

}  // namespace neq::cuda
