#pragma once

#include <array>
#include <cstdint>

#include "../../dtype.h"

namespace neq::cpu {

// Pixels of dY and the input pixels that a tap of the kernel pairs them with: `lines` lines of
// Strip::pixels pixels each, from these offsets on.
struct Run {
  int64_t dy, x, lines;
};

// All pixels of a chunk that a tile sums over, at one tap.
template <class T>
struct Strip {
  const Run* runs;
  int64_t n_runs;
  int64_t pixels, size;  // of a line, of all runs
  const T* dy;
  bool packed;               // dy is [pixels, R] for R rows, and offsets in it count pixels
  int64_t dy_step, dy_line;  // from one pixel, and from one line, to the next
  const T* x;
  int64_t x_step, x_line;
  const char* next;  // memory to prefetch, a cache line with each pixel; or null
};

// out[out_rows[j] + i] (+)= sum over the strip's pixels of dy[dy_rows[j]] * x[i] for R rows j and
// the V * lanes inputs i. `overwrite` drops what is in out.
template <class T>
using Tile = void (*)(const Strip<T>& strip, const int64_t* dy_rows, T* out,
                      const int64_t* out_rows, bool overwrite);

// totals[j] += sum over pixels i of dy[dy_rows[j] + i * dy_step] for R rows j. In double, which
// costs little here and keeps long sums accurate.
template <class T>
using SumRows = void (*)(const T* dy, int64_t pixels, int64_t dy_step, const int64_t* dy_rows,
                         double* totals);

// panel[i * R + j] = dy[dy_rows[j] + i * dy_step] for R rows j.
template <class T>
using PackRows = void (*)(const void* dy, int64_t pixels, int64_t dy_step, const int64_t* dy_rows,
                          T* panel);

// panel[i * step + c] = x[i * x_step + c * x_channel], and zero for channels <= c < step.
template <class T>
using PackLine = void (*)(const void* x, int64_t pixels, int64_t x_step, int64_t channels,
                          int64_t x_channel, T* panel, int64_t step);

// out[i * step + j] = rows[j][(at + i) & masks[j]] for `length` values i of n rows j. A mask has
// all bits set, or none where the row is zero: then rows[j] is a cache line of zeros.
template <class T>
using Interleave = void (*)(const T* const* rows, const int64_t* masks, int64_t n, int64_t at,
                            int64_t length, T* out, int64_t step);

constexpr int kMaxRows = 8;
constexpr int kMaxVectors = 4;
constexpr int kDTypes = 4;

// The kernels of one instruction set, for sums in T.
template <class T>
struct Kernels {
  int64_t lanes;
  int64_t max_vectors;                        // of a tile
  std::array<int, kMaxVectors + 1> max_rows;  // of a tile that is V vectors wide
  Tile<T> tile[kMaxVectors + 1][kMaxRows + 1];
  SumRows<T> sum_rows[kMaxRows + 1];
  PackRows<T> pack_rows[kDTypes][kMaxRows + 1];
  PackLine<T> pack_line[kDTypes];
  Interleave<T> interleave;
};

namespace portable {
template <class T>
const Kernels<T>& kernels();
}
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
}

}  // namespace neq::cpu
