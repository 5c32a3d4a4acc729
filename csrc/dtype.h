#pragma once

#include <cstdint>

namespace neq {

enum class DType { float32, float64, bfloat16, float16 };

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

constexpr int64_t kLineBytes = 64;  // of a processor's caches

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace neq
