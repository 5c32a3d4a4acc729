#include "zero.h"

#include <algorithm>

#include "../../dtype.h"
#include "../gpu.h"

namespace neq::cuda {
namespace {

constexpr int kZeroThreads = 256;
constexpr int64_t kZeroBlocks = 4096;  // fill any GPU a few times over

// As Rows, with a width that counts the pieces which are stored at once.
struct Pieces {
  char* data;
  int64_t lines, neurons, pieces;
  int bytes;  // of a piece: 16, 4 or 2
};

Pieces pieces_of(const Rows& rows) {
  const auto both = reinterpret_cast<uintptr_t>(rows.data) | uintptr_t(rows.width);
  const int bytes = both % 16 == 0 ? 16 : both % 4 == 0 ? 4 : 2;
  return {static_cast<char*>(rows.data), rows.lines, rows.neurons, rows.width / bytes, bytes};
}

// A thread stores the same piece of the same row in every gridDim.y-th line. Adjacent threads have
// adjacent pieces, or adjacent rows where a row is one piece.
__global__ void __launch_bounds__(kZeroThreads)
    zero(const Pieces one, const Pieces other, const int64_t* __restrict__ rows, int64_t k) {
  // field by field: as a whole it would be copied to local memory
  const bool second = blockIdx.z;
  const Pieces t{second ? other.data : one.data, second ? other.lines : one.lines,
                 second ? other.neurons : one.neurons, second ? other.pieces : one.pieces,
                 second ? other.bytes : one.bytes};
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= k * t.pieces) return;
  const int64_t place = rows[at / t.pieces] * t.pieces + at % t.pieces;
  for (int64_t line = blockIdx.y; line < t.lines; line += gridDim.y) {
    char* const to = t.data + (line * t.neurons * t.pieces + place) * t.bytes;
    if (t.bytes == 16)
      *reinterpret_cast<uint4*>(to) = uint4{};
    else if (t.bytes == 4)
      *reinterpret_cast<uint32_t*>(to) = 0;
    else
      *reinterpret_cast<uint16_t*>(to) = 0;
  }
}

}  // namespace

const char* zero_rows(const Rows& one, const Rows& other, const int64_t* rows, int64_t k,
                      int device, void* stream) {
  if (k == 0) return nullptr;
  const OnDevice guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const Pieces first = pieces_of(one), second = pieces_of(other);
  const bool both = second.data;
  const int64_t widest = std::max(first.pieces, both ? second.pieces : 0);
  const int64_t across = ceil_div(k * widest, int64_t(kZeroThreads));
  const int64_t lines = std::max(first.lines, both ? second.lines : 0);
  const int64_t down =
      std::clamp<int64_t>(kZeroBlocks / across, 1, std::min<int64_t>(lines, 0xffff));
  const Launch how{dim3(unsigned(across), unsigned(down), both ? 2 : 1), dim3(kZeroThreads), 0,
                   static_cast<cudaStream_t>(stream)};
  const cudaError_t error = launch(zero, how, first, second, rows, k);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace neq::cuda
