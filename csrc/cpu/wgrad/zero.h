#pragma once

#include <cstdint>

namespace neq::cpu {

// Writes zeros into memory [lines, neurons, piece], of which a piece has so many bytes, at the rows
// [k] of its middle dimension, each in [0, neurons).
void zero_rows(void* data, int64_t lines, int64_t neurons, int64_t piece, const int64_t* rows,
               int64_t k, int threads);

}  // namespace neq::cpu
