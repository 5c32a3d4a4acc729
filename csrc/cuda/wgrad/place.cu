#include "place.h"

#include <algorithm>
#include <type_traits>

#include "../gpu.h"
#include "values.h"

namespace neq::cuda {
namespace {

constexpr int kPlaceThreads = 256;
constexpr int64_t kPlaceBlocks = 4096;  // fill any GPU a few times over

template <class To, class From>
__device__ inline To converted(From x) {
  if constexpr (std::is_same_v<To, From> || std::is_same_v<From, float>)
    return To(x);
  else
    return value(x);
}

// A thread writes the same piece of the same row in every gridDim.y-th line. Adjacent threads have
// adjacent pieces, or rows that are neighbours in `order` where a row is one piece.
template <class From, class To, int E>
__global__ void __launch_bounds__(kPlaceThreads) place(const Placing p, unsigned pieces) {
  using Sum = std::conditional_t<std::is_same_v<From, double>, double, float>;
  const unsigned at = blockIdx.x * kPlaceThreads + threadIdx.x;
  const unsigned j = at / pieces, piece = at % pieces;
  if (j >= p.neurons) return;
  const int64_t row = p.order[j];
  const bool active = j < p.k;
  if (p.db && piece == 0 && blockIdx.y == 0)
    static_cast<To*>(p.db)[row] = active ? To(static_cast<const Sum*>(p.sums)[j]) : To(0.f);
  const auto* const rows = static_cast<const Piece<From, E>*>(p.rows);
  auto* const dw = static_cast<Piece<To, E>*>(p.dw);
  for (int64_t line = blockIdx.y; line < p.lines; line += gridDim.y) {
    Piece<To, E> out;
    if (active) {
      const Piece<From, E> in = rows[(line * p.packed + j) * pieces + piece];
#pragma unroll
      for (int i = 0; i < E; ++i) out.at[i] = converted<To>(in.at[i]);
    } else {
#pragma unroll
      for (int i = 0; i < E; ++i) out.at[i] = To(0.f);
    }
    dw[(line * p.neurons + row) * pieces + piece] = out;
  }
}

bool are_pieces(const void* data, int64_t width, int64_t elements, int64_t bytes) {
  return width % elements == 0 && reinterpret_cast<uintptr_t>(data) % (elements * bytes) == 0;
}

template <class From, class To>
cudaError_t place_as(const Placing& p, cudaStream_t stream) {
  constexpr int E = 16 / sizeof(To);
  const bool many = are_pieces(p.dw, p.width, E, sizeof(To)) &&
                    are_pieces(p.rows, p.width, E, sizeof(From));
  const auto pieces = unsigned(many ? p.width / E : p.width);
  const int64_t across = ceil_div(p.neurons * pieces, int64_t(kPlaceThreads));
  const int64_t down =
      std::clamp<int64_t>(kPlaceBlocks / across, 1, std::min<int64_t>(p.lines, 0xffff));
  const Launch how{dim3(unsigned(across), unsigned(down)), dim3(kPlaceThreads), 0, stream};
  return launch(many ? place<From, To, E> : place<From, To, 1>, how, p, pieces);
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
