#pragma once

namespace neq::cuda {

// To the threads with threadIdx.y = 0: the sum over threadIdx.y, always in the same order. Few
// terms are left here, of which each is a large part of the whole: in float, they'd do most of the
// rounding.
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
