#pragma once

#include <concepts>
#include <cstdint>

#ifdef __CUDACC__
#define NEQ_HOST_DEVICE __host__ __device__
#else
#define NEQ_HOST_DEVICE
#endif

namespace neq {

enum class DType { float32, float64, bfloat16, float16 };

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

constexpr int64_t kLineBytes = 64;  // a cache line of a CPU

template <std::integral A, std::integral B>
NEQ_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace neq
