#pragma once

#include <array>
#include <cstdint>

#include "../../dtype.h"

namespace neq::cpu {

// Pixels of dY and the input pixels that one tap of the kernel pairs them with: `lines` lines of
// Strip::pixels each, starting at these offsets.
struct Run {
  int64_t dy, x, lines;
};

template <class T>
struct Strip {
  const Run* runs;
  int64_t n_runs;
  int64_t pixels, size;  // of a line, of all
  const T* dy;
  bool packed;  // a pixel's values of the R rows lie side by side; offsets within dy count pixels
  int64_t dy_step, dy_line;  // from one pixel, and from one line, to the next
  const T* x;
  int64_t x_step, x_line;
  const char* next;  // memory to bring into the second-level cache, a line with each pixel; or null
};

// out[out_rows[j] + i] (+)= sum over the strip's pixels of dy[dy_rows[j]] * x[i] for R rows j and
// the V * lanes inputs i. `fresh` overwrites out.
template <class T>
using Tile = void (*)(const Strip<T>& strip, const int64_t* dy_rows, T* out,
                      const int64_t* out_rows, bool fresh);

// totals[j] += sum over pixels i of dy[dy_rows[j] + i * dy_step] for R rows j. In double: there are
// few of them, and as many summands as there are pixels.
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

// out[i * step + j] = rows[j][(at + i) & summed[j]] for `length` values i of n rows j. summed: all
// bits set, or none where the row is zero: then rows[j] has a cache line of zeros.
template <class T>
using Interleave = void (*)(const T* const* rows, const int64_t* summed, int64_t n, int64_t at,
                            int64_t length, T* out, int64_t step);

constexpr int kMostRows = 8;
constexpr int kMostVectors = 4;
constexpr int kDTypes = 4;

// What one instruction set offers for sums in T.
template <class T>
struct Kernels {
  int64_t lanes;
  int64_t most_vectors;                         // that a tile is wide
  std::array<int, kMostVectors + 1> most_rows;  // of a tile V vectors wide
  Tile<T> tile[kMostVectors + 1][kMostRows + 1];
  SumRows<T> sum_rows[kMostRows + 1];
  PackRows<T> pack_rows[kDTypes][kMostRows + 1];
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
