#pragma once

#include <array>
#include <cstdint>

#include "../../dtype.h"
#include "../processor.h"

namespace neq::cpu {

// One of two outputs [samples, before, neurons, after]. The last dimension longer than 1 has
// stride 1.
struct Output {
  DType dtype;
  const void* data;
  std::array<int64_t, 4> strides;  // in elements
};

// out [3, samples, neurons], double: the sums of y * y_, y * y and y_ * y_ over the positions
// before and after. Computed in double, in an order that does not depend on the number of threads.
void row_similarity(const Output& y, const Output& y_, const std::array<int64_t, 4>& sizes,
                    double* out, Isa isa, int threads);

}  // namespace neq::cpu
