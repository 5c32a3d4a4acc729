#pragma once

#include <cstdint>

namespace neq::cuda {

// Memory [lines, neurons, width], a width being so many bytes.
struct Rows {
  void* data;
  int64_t lines, neurons, width;
};

// Zeroes the given rows [k] of one tensor, and of another unless its data is null, in one launch.
// All memory is the device's, and `stream` is a cudaStream_t. Neither synchronizes nor allocates.
// Does not check `rows`. Returns CUDA's error message, or null.
const char* zero_rows(const Rows& one, const Rows& other, const int64_t* rows, int64_t k,
                      int device, void* stream);

}  // namespace neq::cuda
