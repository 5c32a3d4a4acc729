#pragma once

#include "conv_wgrad.h"

// The gradient is a product of matrices, dW [k, inputs] = dYᵀ [k, pixels] X [pixels, inputs], where
// an input is a channel at a tap of the kernel. Here is how it is cut up; the arithmetic is in
// conv_wgrad_kernels.inc.
//
//   chunk   pixels whose X and dY stay in the cache while all their rows, taps and channels meet
//   block   some vectors of channels, times some rows: what one tile sums in registers
//
// A tile takes one tap, and exactly those pixels where that tap meets the input: padding is neither
// stored nor multiplied. X is read in place if its channels are adjacent and fill whole vectors,
// and else from a panel in which they do. Where channels are few, the panel has zeros left and
// right, and the taps along the width, which are adjacent there, count as channels of one wide tap:
// a window. (Its zeros are multiplied: an infinity in dY beside them makes a NaN.)

namespace neq::cpu {

constexpr int D = 0, H = 1, W = 2;  // indices of a Size3; those of a Strides5 are 2 more

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The i-th of n even parts of [0, size).
inline Range part(int64_t size, int64_t i, int64_t n) { return {size * i / n, size * (i + 1) / n}; }

// What tiles there are: `lanes` of a vector, most vectors wide, and most rows of one so wide.
struct Tiles {
  int64_t lanes, sum_bytes, most_vectors;
  const int* most_rows;
};

// A box of output pixels; a plane is one depth of one sample.
struct Chunk {
  Range planes, lines, pixels;
  int64_t size() const { return planes.size() * lines.size() * pixels.size(); }
};

// Where a chunk keeps its X: [planes, taps in depth, lines, pixels, step channels].
struct Panel {
  Range lines, pixels;  // of the input; pixels also beyond its edges
  int64_t step;
  int64_t line() const { return pixels.size() * step; }
  int64_t plane() const { return lines.size() * line(); }
};

struct Plan {
  // The cut depends on `split_for`, the number of threads, and so does the order of summation.
  Plan(const ConvWgrad& problem, const Tiles& tiles, int split_for);

  Chunk chunk(int64_t i) const;
  Panel panel(const Chunk& c, int64_t step) const;
  // A part of the active rows of a group, as positions in p.rows.
  Range rows_of(int64_t group, int64_t row_part) const;
  // The outputs among `outputs` where a tap meets the input.
  Range meeting(Range outputs, int64_t tap, int dim) const;
  // The tap meets input o * stride + shift at output o.
  int64_t shift(int64_t tap, int dim) const { return tap * p.dilation[dim] - p.padding[dim]; }
  int64_t input_depth(int64_t plane, int64_t tap) const {
    return plane % p.output[D] * p.stride[D] + shift(tap, D);
  }

  const ConvWgrad p;
  const int64_t lanes;

  bool window;              // the taps along the width count as channels
  bool packs_x, packs_dy;   // else they are read in place
  bool in_place;            // sums are made in dw itself
  bool rows_are_dense;      // those of dw
  Size3 taps;               // that tiles take one by one
  int64_t tap_channels;     // of each of them
  int64_t vectors, blocks;  // of its channels
  int64_t most_rows;        // of a tile
  int64_t sums_row;         // how many sums there are for a row of dW
  Strides5 sums_strides;    // row, channel, depth, height, width

  int64_t line_cuts, pixel_cuts;             // of each plane
  int64_t chunks;                            // in all
  int64_t pixel_parts = 1, block_parts = 1;  // that threads take
  int64_t row_parts;                         // that a thread takes one after the other

 private:
  void choose_layout(const Tiles& tiles);
  void choose_split(const Tiles& tiles, int split_for);
};

}  // namespace neq::cpu
