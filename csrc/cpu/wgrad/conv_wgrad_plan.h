#pragma once

#include "conv_wgrad.h"

// The gradient is a product of matrices, dW [k, inputs] = dYᵀ [k, pixels] X [pixels, inputs], where
// an input is a channel at a tap of the kernel. A Plan says how it is blocked; the arithmetic is in
// conv_wgrad_kernels.inc.
//
//   chunk   pixels whose X and dY stay in cache while all their rows and taps are multiplied
//   block   some vectors of channels, times some rows: what one tile sums in registers
//
// A tile takes one tap, and exactly those pixels whose input at that tap is inside of the image:
// padding is neither stored nor multiplied. X is read in place if its channels are adjacent and
// fill whole vectors, and else from a packed panel. If there are few channels, the panel has zeros
// left and right, and the taps along the width, which are adjacent there, count as channels of one
// wide tap: a window. (Its zeros are multiplied: an infinity in dY beside them makes a NaN.)

namespace neq::cpu {

constexpr int D = 0, H = 1, W = 2;  // indices of a Size3; those of a Strides5 are 2 more

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The i-th of n even parts of [0, size).
inline Range part(int64_t size, int64_t i, int64_t n) { return {size * i / n, size * (i + 1) / n}; }

// The tiles that an instruction set has: lanes of a vector, the most vectors of a tile, and for
// each number of vectors the most rows.
struct TileShapes {
  int64_t lanes, sum_bytes, max_vectors;
  const int* max_rows;
};

// A box of output pixels; a plane is one depth of one sample.
struct Chunk {
  Range planes, lines, pixels;
  int64_t size() const { return planes.size() * lines.size() * pixels.size(); }
};

// The packed X of a chunk: [planes, taps in depth, lines, pixels, step channels].
struct Panel {
  Range lines, pixels;  // of the input; pixels also in the padding
  int64_t step;
  int64_t line() const { return pixels.size() * step; }
  int64_t plane() const { return lines.size() * line(); }
};

struct Plan {
  // The blocking depends on `split_for`, the number of threads, and so does the order of summation.
  Plan(const ConvWgrad& problem, const TileShapes& tiles, int split_for);

  Chunk chunk(int64_t i) const;
  Panel panel(const Chunk& c, int64_t step) const;
  // A part of the active rows of a group, as indices into p.rows.
  Range rows_of(int64_t group, int64_t row_part) const;
  // The outputs among `outputs` whose input at a tap is inside of the image.
  Range outputs_inside(Range outputs, int64_t tap, int dim) const;
  // Output o reads input o * stride + shift at the tap.
  int64_t shift(int64_t tap, int dim) const { return tap * p.dilation[dim] - p.padding[dim]; }
  int64_t input_depth(int64_t plane, int64_t tap) const {
    return plane % p.output[D] * p.stride[D] + shift(tap, D);
  }

  const ConvWgrad p;
  const int64_t lanes;

  bool window;              // the taps along the width count as channels
  bool packs_x, packs_dy;   // else they are read in place
  bool in_place;            // dw itself holds the sums
  bool rows_are_dense;      // of dw
  Size3 taps;               // that tiles take one by one
  int64_t tap_channels;     // of each such tap
  int64_t vectors, blocks;  // of each such tap's channels
  int64_t max_rows;         // of a tile
  int64_t sums_row;         // the number of sums of a row of dW
  Strides5 sums_strides;    // row, channel, depth, height, width

  int64_t line_cuts, pixel_cuts;             // of each plane
  int64_t chunks;                            // in all
  int64_t pixel_parts = 1, block_parts = 1;  // split among threads
  int64_t row_parts;                         // that a thread takes one after the other

 private:
  void choose_layout(const TileShapes& tiles);
  void choose_split(const TileShapes& tiles, int split_for);
};

}  // namespace neq::cpu
