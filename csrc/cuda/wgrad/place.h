#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace neq::cuda {

// dW and db of all neurons, from those of some packed ones. `order` [neurons] has the packed ones
// first, of which the first k count: row j of `rows` goes to row order[j], and all others are zero.
struct Placing {
  DType rows_dtype, dtype;  // of the packed rows; of dw and db
  const void* rows;         // [lines, packed, width]
  const void* sums;         // [packed] in the rows' dtype, but at least float32; null without db
  void* dw;                 // [lines, neurons, width]
  void* db;                 // [neurons]
  const int64_t* order;
  int64_t lines, packed, neurons, width, k;  // width: elements
};

// The largest neurons * width that a launch takes.
constexpr int64_t kMostPlaced = (int64_t{1} << 31) - 1;

// Are there kernels for these dtypes: the same, or 16 bits that become float32?
bool can_place(DType rows, DType dw);

// Writes dw and db in one launch. All memory is the device's, and `stream` is a cudaStream_t.
// Neither synchronizes nor allocates. Does not check `order`. Returns CUDA's error message, or
// null.
const char* place_rows(const Placing& p, int device, void* stream);

}  // namespace neq::cuda
