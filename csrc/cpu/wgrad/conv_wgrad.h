#pragma once

#include <array>
#include <cstdint>

#include "../../dtype.h"
#include "../processor.h"

namespace neq::cpu {

using Size3 = std::array<int64_t, 3>;     // depth, height, width; 1 (or 0 of padding) where missing
using Strides5 = std::array<int64_t, 5>;  // in elements, of a tensor [a, b, depth, height, width]

// dw[places[j], c, tap] = sum of dy[sample, rows[j], pixel] * x[sample, c, input] over samples and
// pixels, where input = pixel * stride - padding + tap * dilation;
// db[places[j]] = sum of dy[sample, rows[j], pixel] over samples and pixels;
// all other rows become zero.
struct ConvWgrad {
  DType dtype;  // of x and dy; dw and db are float, or double for double
  int64_t samples, neurons, groups;
  int64_t channels;  // of x in one group
  Size3 input, output, kernel, stride, padding, dilation;
  const void* dy;  // [samples, neurons, output]
  Strides5 dy_strides;
  const void* x;  // [samples, groups * channels, input]
  Strides5 x_strides;
  void* dw;  // [dw_rows, channels, kernel]
  Strides5 dw_strides;
  int64_t dw_rows;
  void* db;               // [dw_rows], or null
  const int64_t* rows;    // [k], ascending
  const int64_t* places;  // [k], ascending
  int64_t k;
};

// `split_for` is the number of threads that the work is split for: results have the same bits for
// the same `split_for`, whatever `threads` is.
void conv_wgrad(const ConvWgrad& problem, Isa isa, int threads, int split_for);

}  // namespace neq::cpu
