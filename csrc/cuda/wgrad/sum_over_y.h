#pragma once

namespace neq::cuda {

// Returns the sum of `mine` over threadIdx.y to the threads with threadIdx.y = 0, always added up
// in the same order. In double: these are few large terms, which would do most of the rounding in
// float.
template <int Threads>
__device__ double sum_over_y(double mine) {
  __shared__ double all[Threads];
  all[threadIdx.y * blockDim.x + threadIdx.x] = mine;
  __syncthreads();
  double total = 0;
  if (threadIdx.y == 0)
    for (unsigned y = 0; y < blockDim.y; ++y) total += all[y * blockDim.x + threadIdx.x];
  return total;
}

}  // namespace neq::cuda
