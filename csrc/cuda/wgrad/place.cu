#include "place.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../gpu.h"

namespace neq::cuda {
namespace {

constexpr int kPlaceThreads = 256;
constexpr int64_t kPlaceBlocks = 4096;  // fill any GPU a few times over

__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class To, class From>
__device__ inline To converted(From x) {
  if constexpr (std::is_same_v<To, From> || std::is_same_v<From, float>)
    return To(x);
  else
    return wide(x);
}

// What a thread loads or stores at once.
template <class T, int E>
struct alignas(sizeof(T) * E) Unit {
  T x[E];
};

// A thread writes the same unit of the same row in every gridDim.y-th line. Adjacent threads have
// adjacent units, or rows that are neighbours in `order` where a row is one unit.
template <class From, class To, int E>
__global__ void __launch_bounds__(kPlaceThreads) place(const Placing p, unsigned units) {
  using Sum = std::conditional_t<std::is_same_v<From, double>, double, float>;
  const unsigned at = blockIdx.x * kPlaceThreads + threadIdx.x;
  const unsigned j = at / units, unit = at % units;
  if (j >= p.neurons) return;
  const int64_t row = p.order[j];
  const bool active = j < p.k;
  if (p.db && unit == 0 && blockIdx.y == 0)
    static_cast<To*>(p.db)[row] = active ? To(static_cast<const Sum*>(p.sums)[j]) : To(0.f);
  const auto* const rows = static_cast<const Unit<From, E>*>(p.rows);
  auto* const dw = static_cast<Unit<To, E>*>(p.dw);
  for (int64_t line = blockIdx.y; line < p.lines; line += gridDim.y) {
    Unit<To, E> out;
    if (active) {
      const Unit<From, E> in = rows[(line * p.packed + j) * units + unit];
#pragma unroll
      for (int i = 0; i < E; ++i) out.x[i] = converted<To>(in.x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < E; ++i) out.x[i] = To(0.f);
    }
    dw[(line * p.neurons + row) * units + unit] = out;
  }
}

bool are_units(const void* data, int64_t piece, int64_t elements, int64_t bytes) {
  return piece % elements == 0 && reinterpret_cast<uintptr_t>(data) % (elements * bytes) == 0;
}

template <class From, class To>
cudaError_t place_as(const Placing& p, cudaStream_t stream) {
  constexpr int E = 16 / sizeof(To);
  const bool many = are_units(p.dw, p.piece, E, sizeof(To)) &&
                    are_units(p.rows, p.piece, E, sizeof(From));
  const auto units = unsigned(many ? p.piece / E : p.piece);
  const int64_t across = ceil_div(p.neurons * units, int64_t(kPlaceThreads));
  const int64_t down =
      std::clamp<int64_t>(kPlaceBlocks / across, 1, std::min<int64_t>(p.lines, 0xffff));
  const Launch how{dim3(unsigned(across), unsigned(down)), dim3(kPlaceThreads), 0, stream};
  return launch(many ? place<From, To, E> : place<From, To, 1>, how, p, units);
}

}  // namespace

bool can_place(DType rows, DType dw) {
  return rows == dw || (bytes_of(rows) == 2 && dw == DType::float32);
}

const char* place_rows(const Placing& p, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const bool same = p.rows_dtype == p.dtype;
  const auto run = p.rows_dtype == DType::float32    ? place_as<float, float>
                   : p.rows_dtype == DType::float64  ? place_as<double, double>
                   : p.rows_dtype == DType::bfloat16 ? same ? place_as<__nv_bfloat16, __nv_bfloat16>
                                                            : place_as<__nv_bfloat16, float>
                   : same                            ? place_as<__half, __half>
                                                     : place_as<__half, float>;
  const cudaError_t error = run(p, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace neq::cuda
