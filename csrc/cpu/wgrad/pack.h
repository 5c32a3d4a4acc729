#pragma once

#include <cstdint>

#include "../../dtype.h"

namespace neq::cpu {

// packed[t, j] = dy[t, rows[j]], and sums[j] = sum over t of dy[t, rows[j]] unless sums is null.
//   dy      [samples, neurons], `stride` elements from one sample to the next, columns adjacent
//   rows    [k], each in [0, neurons), else throws std::invalid_argument; ascending ones are fast
//   packed  [samples, k], contiguous
//   sums    [k], of float (double for float64); the same bits for any number of threads
void pack_columns(DType dtype, const void* dy, int64_t samples, int64_t neurons, int64_t stride,
                  const int64_t* rows, int64_t k, void* packed, void* sums, int threads);

}  // namespace neq::cpu
