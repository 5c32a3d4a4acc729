#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace neq::cuda {

// How the k columns and the samples are split among thread blocks.
struct PackGrid {
  static constexpr int threads = 256;
  static constexpr int unroll = 11;            // samples that a thread loads before it stores any
  static constexpr int64_t max_blocks = 2048;  // fill any GPU a few times over

  int columns;             // of a block: blockDim.x, a power of two, at most a warp
  int64_t strips, splits;  // blocks along the columns and along the samples
  int64_t samples;         // of a block

  static constexpr PackGrid of(int64_t samples, int64_t k) {
    PackGrid grid{1, 0, 0, 0};
    while (grid.columns < 32 && grid.columns < k) grid.columns *= 2;
    const int64_t step = threads / grid.columns * unroll;
    grid.strips = ceil_div(k, grid.columns);
    const int64_t max_splits =
        grid.strips < max_blocks ? max_blocks / (grid.strips ? grid.strips : 1) : 1;
    grid.samples = ceil_div(ceil_div(samples, step), max_splits) * step;
    grid.splits = grid.samples ? ceil_div(samples, grid.samples) : 0;
    return grid;
  }
};

// The bytes of scratch that pack_columns needs for sums.
int64_t pack_scratch_bytes(DType dtype, int64_t samples, int64_t k);

// As neq::cpu::pack_columns. All memory is the device's, and `stream` is a cudaStream_t. Neither
// synchronizes nor allocates. Does not check `rows`. Returns CUDA's error message, or null.
const char* pack_columns(DType dtype, const void* dy, int64_t samples, int64_t stride,
                         const int64_t* rows, int64_t k, void* packed, void* sums, void* scratch,
                         int device, void* stream);

}  // namespace neq::cuda
