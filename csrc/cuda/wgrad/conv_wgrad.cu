// Weight gradients of convolutions with few channels, on tensor cores:
//
//   dW[row, tap, channel] = sum over pixels of X[pixel + tap, channel] * dY[pixel, row]
//
// A block keeps the sums of all taps in registers and so reads X and dY but once: tile by tile, by
// asynchronous copies into one half of shared memory while it multiplies what lies in the other.
// There a tap is an offset, and an active row a column like any other.
//
// 16 channels x 16 pixels are multiplied by 16 pixels x 8 rows at a time, so that what rows cost
// comes in eights. The sum over pixels is long and dW small: blocks share it, each leaves its part,
// and `finish` adds the parts up, always in the same order, and scatters them.

#include "conv_wgrad.h"

#include "../gpu.h"
#include "sum_over_y.h"

namespace neq::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMatrices = 9;  // 16 channels of a tap each, whose sums a warp keeps
constexpr int kFinishThreads = 256;

// By a number that stays the same; exact while dividend times divisor is below 2^31.
struct Divisor {
  __device__ explicit Divisor(unsigned by) : inverse((0x80000000u + by - 1) / by) {}
  __device__ int operator()(unsigned n) const { return int(uint64_t(n) * inverse >> 31); }
  uint32_t inverse;
};

__host__ __device__ constexpr int parts_of(int size, int n) { return (n + size - 1) / size; }

// How far into X the pixels of a tile reach.
__host__ __device__ constexpr Size2 reach(const ConvWgrad& p, Size2 tile) {
  return {(tile.y - 1) * p.stride.y + (p.kernel.y - 1) * p.dilation.y + 1,
          (tile.x - 1) * p.stride.x + (p.kernel.x - 1) * p.dilation.x + 1};
}

// A tile in shared memory: X, then dY, in bytes. A pixel takes an odd number of 16-byte pieces, the
// last of which may be empty: so eight neighbours lie in different banks.
struct Layout {
  explicit Layout(const ConvWgrad& p)
      : x_pixel((2 * p.plan.slices | 1) * 16),
        x_line(reach(p, p.plan.tile).x * x_pixel),
        dy(reach(p, p.plan.tile).y * x_line),
        dy_pixel((p.neurons / 8 | 1) * 16),
        all(dy + parts_of(16, p.plan.tile.y * p.plan.tile.x) * 16 * dy_pixel) {}
  int x_pixel, x_line;  // from one to the next
  int dy;               // where it begins
  int dy_pixel;
  int all;
};

// A block's matrices are dealt out to its warps; warps that hold the same ones share the pixels.
struct Deal {
  explicit Deal(const ConvWgrad& p)
      : matrices(p.kernel.y * p.kernel.x * p.plan.slices),
        hands(matrices <= kMatrices       ? 1
              : matrices <= 2 * kMatrices ? 2
                                          : kWarps),
        sharing(kWarps / hands) {}
  int matrices, hands, sharing;
};

// Pixels of the output. Tiles follow each other along lines, then down the images.
struct Tile {
  __device__ Tile(const ConvWgrad& p, int number) {
    const int across = parts_of(p.plan.tile.x, p.output.x);
    const int down = parts_of(p.plan.tile.y, p.output.y);
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

// How the threads copy pixels of so many pieces: each one piece of every `together`-th pixel.
struct Share {
  __device__ explicit Share(int pieces)
      : together(kThreads / pieces),
        piece(threadIdx.x % pieces),
        first(int(threadIdx.x) < together * pieces ? threadIdx.x / pieces : ~0u) {}
  int together, piece;
  unsigned first;
};

// Begins to copy pixels of an image, which lie in lines of `width` from `at` on, and of each what
// begins with a certain piece. Zeros stand for pixels that are not between 0 and `end`.
__device__ void begin_copies(unsigned to, int to_line, int to_pixel, const Images& from, int image,
                             int piece, const Share& share, Size2 at, int width, unsigned pixels,
                             Size2 end) {
  to += share.piece * 16;
  const auto* data = static_cast<const uint4*>(from.data) + image * from.image;
  data += piece + share.piece;
  const Divisor by_width(width);
  for (unsigned pixel = share.first; pixel < pixels; pixel += share.together) {
    const int line = by_width(pixel), column = pixel - line * width;
    const int y = at.y + line, x = at.x + column;
    copy_async(to + line * to_line + column * to_pixel, data + (y * from.line + x * from.column),
               unsigned(y) < unsigned(end.y) && unsigned(x) < unsigned(end.x));
  }
}

// Those of dY, as if X were 1, come last. Of 16 channels x 8 rows a lane has channels lane / 4 (+ 8
// for the second two) and rows lane % 4 * 2 (+ 1 for every other one).
template <int Octets>
using Sums = float[kMatrices + 1][Octets][4];

// To the first of the warps that share pixels: what all of them summed.
template <int Octets>
__device__ void hand_over(Sums<Octets>& sums, const Deal& deal, int hand, int share, int lane) {
  constexpr int count = (kMatrices + 1) * Octets * 4;
  float* mine = &sums[0][0][0];
  float* given = reinterpret_cast<float*>(shared_memory()) + hand * count * 32 + lane;
  const int between = deal.hands * count * 32;
  if (share > 0)
#pragma unroll
    for (int i = 0; i < count; ++i) given[(share - 1) * between + i * 32] = mine[i];
  __syncthreads();
  if (share > 0) return;
  for (int other = 0; other < deal.sharing - 1; ++other)
#pragma unroll
    for (int i = 0; i < count; ++i) mine[i] += given[other * between + i * 32];
}

// Sums up one part of the tiles, for some of the rows and channels.
template <class T, int Octets>
__global__ void __launch_bounds__(kThreads, 2)
    sum_part(const ConvWgrad p, const Layout layout, const Deal deal) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int hand = warp % deal.hands, share = warp / deal.hands;
  const int first_row = blockIdx.x * Octets * 8;
  const int first_channel = blockIdx.y * p.plan.slices * 16;
  const int part = blockIdx.z;
  const bool wants_db = p.db && blockIdx.y == 0 && hand == 0;

  const int pitch = layout.dy_pixel / 2;
  int gather[Octets];  // what of dY; where there is no row, any, whose sums nobody will read
#pragma unroll
  for (int o = 0; o < Octets; ++o)
    gather[o] = lane % 4 * 2 * pitch + p.rows[min(first_row + o * 8 + lane / 4, p.k - 1)];
  const int first_matrix = hand * kMatrices;
  int offset[kMatrices];  // in X
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
    const int matrix = min(first_matrix + m, deal.matrices - 1);
    const int tap = matrix / p.plan.slices, slice = matrix % p.plan.slices;
    const Size2 at{tap / p.kernel.x * p.dilation.y, tap % p.kernel.x * p.dilation.x};
    offset[m] = at.y * layout.x_line + at.x * layout.x_pixel + slice * 32 + lane / 8 % 2 * 16;
  }

  const int first_piece = first_channel / 8;
  const Share x_share(min(2 * p.plan.slices, p.channels / 8 - first_piece));
  const Share dy_share(p.neurons / 8);
  const auto begin = [&](const Tile& tile, unsigned to) {
    const Size2 size = tile.size(p), read = reach(p, size);
    const Size2 from{tile.at.y * p.stride.y - p.padding.y, tile.at.x * p.stride.x - p.padding.x};
    begin_copies(to, layout.x_line, layout.x_pixel, p.x, tile.image, first_piece, x_share, from,
                 read.x, read.y * read.x, p.input);
    // here a line ends where the next begins, and up to 15 zeros follow
    begin_copies(to + layout.dy, size.x * layout.dy_pixel, layout.dy_pixel, p.dy, tile.image, 0,
                 dy_share, tile.at, size.x, parts_of(16, size.y * size.x) * 16,
                 {tile.at.y + size.y, tile.at.x + size.x});
  };

  Sums<Octets> sums = {};
  constexpr uint32_t one = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
  constexpr uint32_t ones[4] = {one << 16 | one, one << 16 | one, one << 16 | one, one << 16 | one};

  const int64_t tiles = int64_t(p.images) * parts_of(p.plan.tile.y, p.output.y) *
                        parts_of(p.plan.tile.x, p.output.x);
  int left = int(tiles * (part + 1) / p.plan.parts - tiles * part / p.plan.parts);
  Tile tile(p, int(tiles * part / p.plan.parts));
  unsigned here = 0, next = layout.all;
  begin(tile, here);
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
    const auto* dy = reinterpret_cast<const uint16_t*>(shared_memory() + here + layout.dy);
    for (unsigned first = share * 16; first < pixels; first += deal.sharing * 16) {
      // behind the last pixel dY is 0, and X any other that enters the same sums
      const unsigned beyond = first + lane % 8 + lane / 16 * 8;
      const unsigned pixel = beyond < pixels ? beyond : 0;
      const int line = by_width(pixel), column = pixel - line * size.x;
      const unsigned x = here + line * step.y + column * step.x;
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
        uint32_t read[4];
        load_transposed(read, x + offset[m]);
#pragma unroll
        for (int o = 0; o < Octets; ++o) multiply_add<T>(sums[m][o], read, gathered[o]);
      }
    }
    __syncthreads();
    const unsigned free = here;
    here = next;
    next = free;
  }

  hand_over<Octets>(sums, deal, hand, share, lane);
  if (share > 0) return;
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
        if (matrix < deal.matrices && channel < p.channels)
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

// The threads of a block in x take as many weights of a neuron, the bias being the last of them,
// and those in y share the parts.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish(const ConvWgrad p, int padded) {
  const int weights = p.kernel.y * p.kernel.x * p.channels;
  const int weight = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_bias = weight == weights;
  const bool there = weight < weights + (p.db != nullptr);
  const int j = blockIdx.y;
  double sum = 0;
  if (there && j < p.k) {
    const float* from = is_bias ? p.partial_db + j : p.partial_dw + int64_t(j) * weights + weight;
    const int64_t part = is_bias ? padded : int64_t(padded) * weights;
#pragma unroll 4
    for (int i = threadIdx.y; i < p.plan.parts; i += blockDim.y) sum += from[i * part];
  }
  const T total(float(sum_over_y<kFinishThreads>(sum)));
  if (!there || threadIdx.y > 0) return;
  const int64_t row = p.rows[j];
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
  const auto in_order = static_cast<cudaStream_t>(stream);
  const auto [tile, octets, slices, parts] = p.plan;

  const Layout layout(p);
  const Deal deal(p);
  const size_t tiles = 2 * layout.all;
  const size_t handed = size_t(deal.sharing - 1) * deal.hands * 32 * sizeof(float) *
                        (kMatrices + 1) * octets * 4;
  const int groups = parts_of(octets * 8, p.k);
  const Launch summing{dim3(groups, parts_of(slices * 16, p.channels), parts), dim3(kThreads),
                       tiles > handed ? tiles : handed, in_order};
  const auto sum = p.dtype == DType::float16 ? sum_part_of<__half>(octets)
                                             : sum_part_of<__nv_bfloat16>(octets);
  cudaError_t error = launch(sum, summing, p, layout, deal);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  const int weights = p.kernel.y * p.kernel.x * p.channels + (p.db != nullptr);
  const Launch finishing{dim3(parts_of(32, weights), p.neurons), dim3(32, kFinishThreads / 32), 0,
                         in_order};
  const auto finish_as = p.weight_dtype == DType::float32    ? finish<float>
                         : p.weight_dtype == DType::float64  ? finish<double>
                         : p.weight_dtype == DType::bfloat16 ? finish<__nv_bfloat16>
                                                             : finish<__half>;
  error = launch(finish_as, finishing, p, groups * octets * 8);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace neq::cuda
