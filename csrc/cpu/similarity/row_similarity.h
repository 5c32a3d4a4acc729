#pragma once

#include <array>
#include <cstdint>

#include "../../dtype.h"
#include "../processor.h"

namespace neq::cpu {

// One of two outputs [samples, before, neurons, after]; its last dimension longer than 1 is
// adjacent in memory.
struct Output {
  DType dtype;
  const void* data;
  std::array<int64_t, 4> strides;  // in elements
};

// out [3, samples, neurons], double: the sums over both kinds of positions of y * y_, y * y and
// y_ * y_. Everything is computed in double, in an order that does not depend on the threads.
void row_similarity(const Output& y, const Output& y_, const std::array<int64_t, 4>& sizes,
                    double* out, Isa isa, int threads);

}  // namespace neq::cpu
