#pragma once

#include <cstdint>

namespace neq::cpu {

// Zeroes the given rows of memory [lines, neurons, width], a width being so many bytes. Each of
// rows [k] lies in [0, neurons).
void zero_rows(void* data, int64_t lines, int64_t neurons, int64_t width, const int64_t* rows,
               int64_t k, int threads);

}  // namespace neq::cpu
