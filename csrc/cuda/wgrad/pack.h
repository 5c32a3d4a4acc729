#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace neq::cuda {

// How the k columns and the samples are dealt out to blocks of threads.
struct PackGrid {
  static constexpr int threads = 256;
  static constexpr int unroll = 8;         // samples that a thread loads before it stores any
  static constexpr int64_t enough = 2048;  // blocks that fill any GPU a few times over

  int columns;  // of a block, a power of two and a warp at most; its other threads take samples
  int64_t strips, splits;  // blocks along the columns and along the samples
  int64_t samples;         // of a block

  static constexpr PackGrid of(int64_t samples, int64_t k) {
    PackGrid grid{1, 0, 0, 0};
    while (grid.columns < 32 && grid.columns < k) grid.columns *= 2;
    const int64_t step = threads / grid.columns * unroll;
    grid.strips = ceil_div(k, grid.columns);
    const int64_t most = grid.strips < enough ? enough / (grid.strips ? grid.strips : 1) : 1;
    grid.samples = ceil_div(ceil_div(samples, step), most) * step;
    grid.splits = grid.samples ? ceil_div(samples, grid.samples) : 0;
    return grid;
  }
};

// The bytes of scratch that pack_columns needs when it is asked for sums.
int64_t pack_scratch_bytes(DType dtype, int64_t samples, int64_t k);

// As neq::cpu::pack_columns, on the device's memory and in the order of `stream`, a cudaStream_t.
// Neither waits nor allocates. rows are not checked. Returns what CUDA says went wrong, or null.
const char* pack_columns(DType dtype, const void* dy, int64_t samples, int64_t stride,
                         const int64_t* rows, int64_t k, void* packed, void* sums, void* scratch,
                         int device, void* stream);

}  // namespace neq::cuda
