#include "pack.h"

#include "../gpu.h"
#include "sum_over_y.h"
#include "values.h"

namespace neq::cuda {
namespace {

// Of a warp: a block has as many columns, if there are so many.
constexpr int kWarp = 32;

// Do the block's columns come in pieces: neighbours in dY too, at multiples of 16 bytes there and
// in `packed`? All warps of a block have the same columns, and so the same answer.
template <class T>
__device__ bool in_pieces(const T* dy, int64_t stride, const int64_t* rows, int64_t k,
                          const T* packed) {
  constexpr int size = Piece<T>::size;
  if (blockDim.x != kWarp || k % size || stride % size ||
      reinterpret_cast<uintptr_t>(packed) % sizeof(Piece<T>))
    return false;
  const int64_t j = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  bool mine = true;
  if (j < k) {
    const int64_t first = rows[j - j % size];
    mine = rows[j] == first + j % size &&
           reinterpret_cast<uintptr_t>(dy + first) % sizeof(Piece<T>) == 0;
  }
  return __all_sync(~0u, mine);
}

// What `pack` does, by pieces. A row of threads copies one sample of the block's columns.
template <class T, class Sum>
__device__ void pack_pieces(const T* __restrict__ dy, int64_t begin, int64_t end, int64_t stride,
                            const int64_t* __restrict__ rows, int64_t k, T* __restrict__ packed,
                            Sum* __restrict__ partial) {
  constexpr int size = Piece<T>::size, unroll = 2;
  constexpr int across = kWarp / size, step = PackGrid::threads / across;
  const int me = threadIdx.y * kWarp + threadIdx.x, y = me / across;
  const int64_t strip = int64_t(blockIdx.x) * kWarp, j = strip + me % across * size;
  Sum sum[size] = {};
  int left = int(end - begin) - y;
  if (j < k && left > 0) {
    const T* src = dy + (begin + y) * stride + rows[j];
    T* dst = packed + (begin + y) * k + j;
#pragma unroll 1
    for (; left > (unroll - 1) * step; left -= unroll * step) {
      Piece<T> x[unroll];
#pragma unroll
      for (int i = 0; i < unroll; ++i, src += step * stride)
        x[i] = *reinterpret_cast<const Piece<T>*>(src);
#pragma unroll
      for (int i = 0; i < unroll; ++i, dst += step * k) {
        *reinterpret_cast<Piece<T>*>(dst) = x[i];
#pragma unroll
        for (int e = 0; e < size; ++e) sum[e] += value(x[i].at[e]);
      }
    }
    if (left > 0) {
      const Piece<T> x = *reinterpret_cast<const Piece<T>*>(src);
      *reinterpret_cast<Piece<T>*>(dst) = x;
#pragma unroll
      for (int e = 0; e < size; ++e) sum[e] += value(x.at[e]);
    }
  }
  if (!partial) return;
  __shared__ Sum all[step * kWarp];  // by sample and column
#pragma unroll
  for (int e = 0; e < size; ++e) all[me * size + e] = sum[e];
  __syncthreads();
  if (threadIdx.y != 0 || strip + threadIdx.x >= k) return;
  double total = 0;  // as in sum_over_y
#pragma unroll 4
  for (int other = 0; other < step; ++other) total += all[other * kWarp + threadIdx.x];
  partial[blockIdx.y * k + strip + threadIdx.x] = Sum(total);
}

// A thread copies one column of every blockDim.y-th sample of its block. Adjacent threads copy
// adjacent columns of `packed`, so a warp's loads fall into few cache lines, and each thread keeps
// `unroll` loads in flight. Columns that come in pieces are copied 16 bytes at a time.
template <class T, class Sum>
__global__ void __launch_bounds__(PackGrid::threads, sizeof(T) == 8 ? 4 : 6)
    pack(const T* __restrict__ dy, int64_t samples, int64_t stride,
         const int64_t* __restrict__ rows, int64_t k, T* __restrict__ packed,
         Sum* __restrict__ partial, int64_t samples_per_block) {
  constexpr int unroll = PackGrid::unroll;
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t begin = blockIdx.y * samples_per_block;
  const int64_t end = min(samples, begin + samples_per_block);
  const int64_t step = blockDim.y;
  if (in_pieces(dy, stride, rows, k, packed))
    return pack_pieces(dy, begin, end, stride, rows, k, packed, partial);
  Sum sum = 0;
  if (j < k) {
    int64_t t = begin + threadIdx.y;
    const T* src = dy + t * stride + rows[j];
    T* dst = packed + t * k + j;
    for (; t + (unroll - 1) * step < end; t += unroll * step) {
      T x[unroll];
#pragma unroll
      for (int i = 0; i < unroll; ++i, src += step * stride) x[i] = *src;
#pragma unroll
      for (int i = 0; i < unroll; ++i, dst += step * k) {
        *dst = x[i];
        sum += value(x[i]);
      }
    }
    for (; t < end; t += step, src += step * stride, dst += step * k) {
      const T x = *src;
      *dst = x;
      sum += value(x);
    }
  }
  if (!partial) return;
  const double total = sum_over_y<PackGrid::threads>(sum);
  if (threadIdx.y == 0 && j < k) partial[blockIdx.y * k + j] = Sum(total);
}

// sums[j] = sum over s of partial[s, j], partial being [splits, k].
template <class Sum>
__global__ void __launch_bounds__(kWarp* kWarp)
    add_splits(const Sum* __restrict__ partial, int64_t splits, int64_t k, Sum* __restrict__ sums) {
  const int64_t j = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  double sum = 0;
  if (j < k)
    for (int64_t s = threadIdx.y; s < splits; s += kWarp) sum += partial[s * k + j];
  sum = sum_over_y<kWarp * kWarp>(sum);
  if (threadIdx.y == 0 && j < k) sums[j] = Sum(sum);
}

template <class T, class Sum>
cudaError_t pack_as(const void* dy, int64_t samples, int64_t stride, const int64_t* rows, int64_t k,
                    void* packed, void* sums, void* scratch, cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  if (samples == 0) return sums ? cudaMemsetAsync(sums, 0, k * sizeof(Sum), stream) : cudaSuccess;
  const PackGrid grid = PackGrid::of(samples, k);
  Sum* partial = static_cast<Sum*>(sums && grid.splits > 1 ? scratch : sums);
  const Launch packing{dim3(grid.strips, grid.splits),
                       dim3(grid.columns, grid.threads / grid.columns), 0, stream};
  const cudaError_t error = launch(pack<T, Sum>, packing, static_cast<const T*>(dy), samples,
                                   stride, rows, k, static_cast<T*>(packed), partial, grid.samples);
  if (error != cudaSuccess || partial == sums) return error;
  const Launch adding{dim3(ceil_div(k, kWarp)), dim3(kWarp, kWarp), 0, stream};
  return launch(add_splits<Sum>, adding, partial, grid.splits, k, static_cast<Sum*>(sums));
}

}  // namespace

int64_t pack_scratch_bytes(DType dtype, int64_t samples, int64_t k) {
  const int64_t splits = PackGrid::of(samples, k).splits;
  const int64_t bytes = dtype == DType::float64 ? sizeof(double) : sizeof(float);
  return splits > 1 ? splits * k * bytes : 0;
}

const char* pack_columns(DType dtype, const void* dy, int64_t samples, int64_t stride,
                         const int64_t* rows, int64_t k, void* packed, void* sums, void* scratch,
                         int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const auto run = dtype == DType::float32    ? pack_as<float, float>
                   : dtype == DType::float64  ? pack_as<double, double>
                   : dtype == DType::bfloat16 ? pack_as<__nv_bfloat16, float>
                                              : pack_as<__half, float>;
  const cudaError_t error =
      run(dy, samples, stride, rows, k, packed, sums, scratch, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace neq::cuda
