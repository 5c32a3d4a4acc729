#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace neq::cuda {

// What a value is in the arithmetic: halves are floats there.
__device__ inline float value(float x) { return x; }
__device__ inline double value(double x) { return x; }
__device__ inline float value(__half x) { return __half2float(x); }
__device__ inline float value(__nv_bfloat16 x) { return __bfloat162float(x); }

// Neighbours that one instruction loads or stores: 16 bytes, if it is not told otherwise.
template <class T, int Size = 16 / sizeof(T)>
struct alignas(sizeof(T) * Size) Piece {
  static constexpr int size = Size;
  T at[Size];
};

}  // namespace neq::cuda
