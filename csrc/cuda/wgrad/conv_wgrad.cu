// Weight gradients of convolutions with few channels, on tensor cores:
//
//   dW[row, tap, channel] = sum over pixels of X[pixel + tap, channel] * dY[pixel, row]
//
// A block keeps the sums of all taps in registers, so it reads X and dY only once: tile by tile, by
// asynchronous copies into one buffer of shared memory while it multiplies the tile in the other.
// In shared memory a tap is an offset, and an active row is a column like any other.
//
// One mma multiplies X [16 channels, 16 pixels] by dY [16 pixels, 8 rows], so rows cost in eights
// (octets). dW is small and the sum over pixels long, so the pixels are split among blocks
// (split-K): each block of `sum_part` writes partial sums, and `reduce_parts` adds them up, always
// in the same order, and scatters them to the active rows, unless the gradient is compact.

#include "conv_wgrad.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../gpu.h"
#include "../ptx.h"
#include "sum_over_y.h"

namespace neq::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMatrices = 9;  // fragments of X, 16 channels of a tap each, whose sums a warp keeps
constexpr int kReduceThreads = 256;

// Divides by a loop invariant. Exact while dividend times divisor is below 2^31.
struct Divisor {
  __device__ explicit Divisor(unsigned by) : inverse((0x80000000u + by - 1) / by) {}
  __device__ int operator()(unsigned n) const { return int(uint64_t(n) * inverse >> 31); }
  uint32_t inverse;
};

// The size of the input window that the output pixels of a tile read: the tile and its halo.
__host__ __device__ constexpr Size2 input_window(const ConvWgrad& p, Size2 tile) {
  return {(tile.y - 1) * p.stride.y + (p.kernel.y - 1) * p.dilation.y + 1,
          (tile.x - 1) * p.stride.x + (p.kernel.x - 1) * p.dilation.x + 1};
}

// The layout of a tile in shared memory, in bytes: first X, then dY.
struct Layout {
  explicit Layout(const ConvWgrad& p)
      : x_pixel(int(x_pixel_bytes(p.plan.slices))),
        x_line(input_window(p, p.plan.tile).x * x_pixel),
        dy(input_window(p, p.plan.tile).y * x_line),
        dy_pixel(int(dy_pixel_bytes(p.neurons))),
        bytes(dy + ceil_div(p.plan.tile.y * p.plan.tile.x, 16) * 16 * dy_pixel) {}
  int x_pixel, x_line;  // from one pixel, and from one line, to the next
  int dy;               // offset of dY
  int dy_pixel;
  int bytes;
};

// The warps of a block are arranged as warps_m x warps_k. Along m they hold different matrices;
// along k they hold the same matrices and sum over different pixels, and are reduced in the end.
struct WarpLayout {
  explicit WarpLayout(const ConvWgrad& p)
      : matrices(p.kernel.y * p.kernel.x * p.plan.slices),
        warps_m(matrices <= kMatrices       ? 1
                : matrices <= 2 * kMatrices ? 2
                                            : kWarps),
        warps_k(kWarps / warps_m) {}
  int matrices;  // of the block
  int warps_m, warps_k;
};

// A tile of output pixels. Tiles are numbered along lines, then down the images.
struct Tile {
  __device__ Tile(const ConvWgrad& p, int number) {
    const int across = ceil_div(p.output.x, p.plan.tile.x);
    const int down = ceil_div(p.output.y, p.plan.tile.y);
    image = number / across / down;
    at = {number / across % down * p.plan.tile.y, number % across * p.plan.tile.x};
  }
  __device__ Size2 size(const ConvWgrad& p) const {
    return {min(p.plan.tile.y, p.output.y - at.y), min(p.plan.tile.x, p.output.x - at.x)};
  }
  __device__ void advance(const ConvWgrad& p) {
    at.x += p.plan.tile.x;
    if (at.x < p.output.x) return;
    at = {at.y + p.plan.tile.y, 0};
    if (at.y < p.output.y) return;
    at.y = 0;
    ++image;
  }
  int image;
  Size2 at;
};

// Which pieces of a pixel's `pieces` this thread copies: one, of every `step`-th pixel. Threads
// that are left over copy nothing.
struct CopyLanes {
  __device__ explicit CopyLanes(int pieces)
      : step(kThreads / pieces),
        piece(threadIdx.x % pieces),
        first(int(threadIdx.x) < step * pieces ? threadIdx.x / pieces : ~0u) {}
  int step, piece;
  unsigned first;  // pixel
};

// Issues the copies of `pixels` pixels of an image, in lines of `width` from `at` on; from each
// pixel, the pieces from `piece` on. Pixels outside of [0, end) are zero-filled.
__device__ void begin_copies(unsigned to, int to_line, int to_pixel, const Images& from, int image,
                             int piece, const CopyLanes& lanes, Size2 at, int width,
                             unsigned pixels, Size2 end) {
  to += lanes.piece * 16;
  const auto* data = static_cast<const uint4*>(from.data) + image * from.image;
  data += piece + lanes.piece;
  const Divisor by_width(width);
  for (unsigned pixel = lanes.first; pixel < pixels; pixel += lanes.step) {
    const int line = by_width(pixel), column = pixel - line * width;
    const int y = at.y + line, x = at.x + column;
    copy_async(to + line * to_line + column * to_pixel, data + (y * from.line + x * from.column),
               unsigned(y) < unsigned(end.y) && unsigned(x) < unsigned(end.x));
  }
}

// The accumulators of a warp: one for each matrix, and last the one of the bias, for which X is 1.
// Of 16 channels x 8 rows a lane holds channels lane / 4 (+ 8 for the second two) and rows
// lane % 4 * 2 (+ 1 for every other one), as mma.m16n8k16 has them.
template <int Octets>
using Sums = float[kMatrices + 1][Octets][4];

// Adds the sums of all warps along k to those of warp_k = 0, through shared memory.
template <int Octets>
__device__ void reduce_warps_k(Sums<Octets>& sums, const WarpLayout& warps, int warp_m, int warp_k,
                               int lane) {
  constexpr int count = (kMatrices + 1) * Octets * 4;
  float* mine = &sums[0][0][0];
  float* others = reinterpret_cast<float*>(shared_memory()) + warp_m * count * 32 + lane;
  const int step = warps.warps_m * count * 32;  // from one warp_k to the next
  if (warp_k > 0)
#pragma unroll
    for (int i = 0; i < count; ++i) others[(warp_k - 1) * step + i * 32] = mine[i];
  __syncthreads();
  if (warp_k > 0) return;
  for (int other = 0; other < warps.warps_k - 1; ++other)
#pragma unroll
    for (int i = 0; i < count; ++i) mine[i] += others[other * step + i * 32];
}

// Sums over one part of the tiles, for the block's rows and channels.
template <class T, int Octets>
__global__ void __launch_bounds__(kThreads, 2)
    sum_part(const ConvWgrad p, const Layout layout, const WarpLayout warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % warps.warps_m, warp_k = warp / warps.warps_m;
  const int first_row = blockIdx.x * Octets * 8;
  const int first_channel = blockIdx.y * p.plan.slices * 16;
  const int part = blockIdx.z;
  const bool wants_db = p.db && blockIdx.y == 0 && warp_m == 0;

  const int pitch = layout.dy_pixel / 2;
  // Offsets of this lane's rows in dY. Beyond the last active row that row stands in: its sums are
  // written to padding and never read.
  int gather[Octets];
#pragma unroll
  for (int o = 0; o < Octets; ++o)
    gather[o] = lane % 4 * 2 * pitch + p.order[min(first_row + o * 8 + lane / 4, p.k - 1)];
  const int first_matrix = warp_m * kMatrices;
  int offset[kMatrices];  // of the matrices in X
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
    const int matrix = min(first_matrix + m, warps.matrices - 1);
    const int tap = matrix / p.plan.slices, slice = matrix % p.plan.slices;
    const Size2 at{tap / p.kernel.x * p.dilation.y, tap % p.kernel.x * p.dilation.x};
    offset[m] = at.y * layout.x_line + at.x * layout.x_pixel + slice * 32 + lane / 8 % 2 * 16;
  }

  const int first_piece = first_channel / 8;
  const CopyLanes x_lanes(min(2 * p.plan.slices, p.channels / 8 - first_piece));
  const CopyLanes dy_lanes(p.neurons / 8);
  const auto begin = [&](const Tile& tile, unsigned to) {
    const Size2 size = tile.size(p), window = input_window(p, size);
    const Size2 from{tile.at.y * p.stride.y - p.padding.y, tile.at.x * p.stride.x - p.padding.x};
    begin_copies(to, layout.x_line, layout.x_pixel, p.x, tile.image, first_piece, x_lanes, from,
                 window.x, window.y * window.x, p.input);
    // the lines of dY follow each other without gaps, and zeros round its pixels up to 16
    begin_copies(to + layout.dy, size.x * layout.dy_pixel, layout.dy_pixel, p.dy, tile.image, 0,
                 dy_lanes, tile.at, size.x, ceil_div(size.y * size.x, 16) * 16,
                 {tile.at.y + size.y, tile.at.x + size.x});
  };

  Sums<Octets> sums = {};
  constexpr uint32_t one = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
  constexpr uint32_t ones[4] = {one << 16 | one, one << 16 | one, one << 16 | one, one << 16 | one};

  const int64_t tiles = int64_t(p.images) * ceil_div(p.output.y, p.plan.tile.y) *
                        ceil_div(p.output.x, p.plan.tile.x);
  int left = int(tiles * (part + 1) / p.plan.parts - tiles * part / p.plan.parts);
  Tile tile(p, int(tiles * part / p.plan.parts));
  unsigned current = 0, next = layout.bytes;
  begin(tile, current);
  end_copies();
  for (; left > 0; --left) {
    const Size2 size = tile.size(p);
    tile.advance(p);
    if (left > 1) begin(tile, next);
    end_copies();
    await_copies<1>();
    __syncthreads();

    const unsigned pixels = size.y * size.x;
    const Divisor by_width(size.x);
    const Size2 step{p.stride.y * layout.x_line, p.stride.x * layout.x_pixel};
    const auto* dy = reinterpret_cast<const uint16_t*>(shared_memory() + current + layout.dy);
    for (unsigned first = warp_k * 16; first < pixels; first += warps.warps_k * 16) {
      // Beyond the last pixel dY is 0, and X that of pixel 0, which enters the same sums anyway: an
      // infinity in X makes no other sum NaN.
      const unsigned unbounded = first + lane % 8 + lane / 16 * 8;
      const unsigned pixel = unbounded < pixels ? unbounded : 0;
      const int line = by_width(pixel), column = pixel - line * size.x;
      const unsigned x = current + line * step.y + column * step.x;
      uint32_t gathered[Octets][2];
#pragma unroll
      for (int o = 0; o < Octets; ++o)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint16_t* at = dy + (first + i * 8) * pitch + gather[o];
          gathered[o][i] = at[0] | uint32_t(at[pitch]) << 16;
        }
      if (wants_db)
#pragma unroll
        for (int o = 0; o < Octets; ++o) multiply_add<T>(sums[kMatrices][o], ones, gathered[o]);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        uint32_t matrix[4];
        load_transposed(matrix, x + offset[m]);
#pragma unroll
        for (int o = 0; o < Octets; ++o) multiply_add<T>(sums[m][o], matrix, gathered[o]);
      }
    }
    __syncthreads();
    const unsigned free = current;
    current = next;
    next = free;
  }

  reduce_warps_k<Octets>(sums, warps, warp_m, warp_k, lane);
  if (warp_k > 0) return;
  const int taps = p.kernel.y * p.kernel.x;
  const int padded = gridDim.x * Octets * 8;
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
    const int matrix = first_matrix + m;
    const int tap = matrix / p.plan.slices, slice = matrix % p.plan.slices;
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + o * 8 + lane % 4 * 2 + e % 2;
        const int channel = first_channel + slice * 16 + e / 2 * 8 + lane / 4;
        const int64_t to = (int64_t(part) * padded + row) * taps + tap;
        if (matrix < warps.matrices && channel < p.channels)
          p.partial_dw[to * p.channels + channel] = sums[m][o][e];
      }
  }
  if (wants_db && lane < 4)
#pragma unroll
    for (int o = 0; o < Octets; ++o)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        p.partial_db[part * padded + first_row + o * 8 + lane * 2 + e] = sums[kMatrices][o][e];
}

// Adds up the parts and writes row order[j] of dw and db, or row j of compact ones, for
// j = blockIdx.y: zeros from j = k on.
// threadIdx.x counts the weights of a neuron, the last of which is the bias; threadIdx.y splits the
// parts.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) reduce_parts(const ConvWgrad p, int padded) {
  const int weights = p.kernel.y * p.kernel.x * p.channels;
  const int weight = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_bias = weight == weights;
  const bool exists = weight < weights + (p.db != nullptr);
  const int j = blockIdx.y;
  double sum = 0;
  if (exists && j < p.k) {
    const float* from = is_bias ? p.partial_db + j : p.partial_dw + int64_t(j) * weights + weight;
    const int64_t part = is_bias ? padded : int64_t(padded) * weights;
#pragma unroll 4
    for (int i = threadIdx.y; i < p.plan.parts; i += blockDim.y) sum += from[i * part];
  }
  const T total(float(sum_over_y<kReduceThreads>(sum)));
  if (!exists || threadIdx.y > 0) return;
  const int64_t row = p.rows < p.neurons ? j : p.order[j];
  if (is_bias) {
    static_cast<T*>(p.db)[row] = total;
    return;
  }
  const int tap = weight / p.channels, channel = weight % p.channels;
  const int64_t* stride = p.dw_strides;
  static_cast<T*>(p.dw)[row * stride[0] + channel * stride[1] + tap / p.kernel.x * stride[2] +
                        tap % p.kernel.x * stride[3]] = total;
}

template <class T>
auto sum_part_of(int octets) {
  return octets == 1   ? sum_part<T, 1>
         : octets == 2 ? sum_part<T, 2>
         : octets == 3 ? sum_part<T, 3>
                       : sum_part<T, 4>;
}

}  // namespace

const char* conv_wgrad(const ConvWgrad& p, int device, void* stream) {
  const OnDevice guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const auto [tile, octets, slices, parts] = p.plan;

  const Layout layout(p);
  const WarpLayout warps(p);
  const size_t tile_bytes = 2 * layout.bytes;
  const size_t reduce_bytes = size_t(warps.warps_k - 1) * warps.warps_m * 32 * sizeof(float) *
                              (kMatrices + 1) * octets * 4;
  const int row_blocks = ceil_div(p.k, octets * 8);
  const Launch summing{dim3(row_blocks, ceil_div(p.channels, slices * 16), parts), dim3(kThreads),
                       std::max(tile_bytes, reduce_bytes), cuda_stream};
  const auto sum = p.dtype == DType::float16 ? sum_part_of<__half>(octets)
                                             : sum_part_of<__nv_bfloat16>(octets);
  cudaError_t error = launch(sum, summing, p, layout, warps);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  const int weights = p.kernel.y * p.kernel.x * p.channels + (p.db != nullptr);
  const Launch reducing{dim3(ceil_div(weights, 32), p.rows), dim3(32, kReduceThreads / 32), 0,
                        cuda_stream};
  const auto reduce = p.weight_dtype == DType::float32    ? reduce_parts<float>
                      : p.weight_dtype == DType::float64  ? reduce_parts<double>
                      : p.weight_dtype == DType::bfloat16 ? reduce_parts<__nv_bfloat16>
                                                          : reduce_parts<__half>;
  error = launch(reduce, reducing, p, row_blocks * octets * 8);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace neq::cuda
