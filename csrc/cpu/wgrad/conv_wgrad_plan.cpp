#include "conv_wgrad_plan.h"

#include <algorithm>

#include "../buffer.h"

namespace neq::cpu {
namespace {

// The X and dY that a block of a chunk reads: a small first-level cache.
constexpr int64_t kChunkBytes = 40 << 10;
// A chunk is one chain of additions, so a long chunk is inexact. Vendors' chains are shorter where
// vectors are shorter.
constexpr int64_t kChunkPixels = 128, kChunkPixelsOfShortVectors = 96, kLongVectorBytes = 64;
// The least work of a thread that repays waking it.
constexpr double kThreadCycles = 50e3;
// What a second-level cache holds of sums beside all else, and the rows that repay reading X again.
constexpr int64_t kSumsBytes = 2 << 20;
constexpr int64_t kRowsPerPart = 192;
// The uses of a value of dY, in lanes, that repay packing it; and of a value of X, in rows.
constexpr int64_t kPackedUses = 16, kPackedRows = 48;

// Merges the pixels of a 1x1 convolution into one long line, as far as its strides allow.
ConvWgrad flatten(ConvWgrad p) {
  if (p.kernel != Size3{1, 1, 1} || p.stride != p.kernel || p.padding != Size3{0, 0, 0}) return p;
  int64_t* const sizes[] = {&p.input[H], &p.input[D], &p.samples};
  const int strides[] = {3, 2, 0};
  int64_t &width = p.input[W], &x_pixel = p.x_strides[4], &dy_pixel = p.dy_strides[4];
  for (int i = 0; i < 3; ++i) {
    const int64_t x = p.x_strides[strides[i]], dy = p.dy_strides[strides[i]];
    if (*sizes[i] == 1) continue;
    if (width == 1) x_pixel = x, dy_pixel = dy;
    if (x != width * x_pixel || dy != width * dy_pixel) break;
    width *= *sizes[i];
    *sizes[i] = 1;
  }
  p.output = p.input;
  return p;
}

}  // namespace

Plan::Plan(const ConvWgrad& problem, const TileShapes& tiles, int split_for)
    : p(flatten(problem)), lanes(tiles.lanes) {
  choose_layout(tiles);
  choose_split(tiles, split_for);
}

void Plan::choose_layout(const TileShapes& tiles) {
  const auto vectors_of = [this](int64_t channels) { return ceil_div(channels, lanes); };
  const int64_t width = p.kernel[W];
  window = width > 1 && p.dilation[W] == 1 &&
           (p.channels <= lanes || vectors_of(width * p.channels) < width * vectors_of(p.channels));
  taps = {p.kernel[D], p.kernel[H], window ? 1 : width};
  tap_channels = window ? width * p.channels : p.channels;
  vectors = vectors_of(tap_channels);
  blocks = ceil_div(vectors, tiles.max_vectors);
  max_rows = tiles.max_rows[ceil_div(vectors, blocks)];

  const int64_t tap = vectors * lanes, line = taps[W] * tap;
  sums_row = taps[D] * taps[H] * line;
  sums_strides = {sums_row, 1, taps[H] * line, line, window ? p.channels : tap};

  const bool converts = bytes_of(p.dtype) != tiles.sum_bytes;
  // With one tap the panel of a chunk is read in order.
  const bool in_order = p.kernel == Size3{1, 1, 1} && p.k >= kPackedRows;
  packs_x = window || converts || p.channels % lanes || p.x_strides[1] != 1 || in_order;
  // Packed, the rows of a tile lie in the same cache lines at one address, whatever dY's strides.
  packs_dy = converts || sums_row >= kPackedUses * lanes;
}

void Plan::choose_split(const TileShapes& tiles, int split_for) {
  const int64_t planes = p.samples * p.output[D], lines = p.output[H], pixels = p.output[W];
  const int64_t block_channels = std::min(p.channels, ceil_div(vectors, blocks) * lanes);
  const bool is_long = lanes * tiles.sum_bytes >= kLongVectorBytes;
  int64_t chain = is_long ? kChunkPixels : kChunkPixelsOfShortVectors;
  if (sums_row <= lanes) chain /= 2;  // then adding up chunks costs little
  int64_t target = std::min(chain, kChunkBytes / (block_channels * tiles.sum_bytes + kLineBytes));
  // Input lines that two chunks both read are packed twice.
  const int64_t shared_lines = shift(p.kernel[H] - 1, H) - shift(0, H) + 1 - p.stride[H];
  if (packs_x) target = std::max(target, 4 * shared_lines / p.stride[H] * pixels);
  pixel_cuts = lines * pixels > target ? ceil_div(pixels, target) : 1;
  line_cuts = lines * pixels > target ? ceil_div(lines, std::max<int64_t>(1, target / pixels)) : 1;
  const int64_t cuts = pixel_cuts * line_cuts;
  const int64_t max_chunks = planes * cuts;

  // Threads split the pixels, each with its own sums, which are added up in the end; or the blocks,
  // each thread reading all of dY. Compares a thread's cycles, at 2 products or 8 bytes a cycle.
  const int64_t all_blocks = p.groups * blocks;
  const double all_pixels = double(planes) * lines * pixels;
  const double block_cycles = all_pixels * p.k * sums_row / lanes / all_blocks / 2;
  const int64_t team =
      int64_t(std::min<double>(split_for, 1 + block_cycles * all_blocks / kThreadCycles));
  double least = 0;
  for (int64_t by_block = 1; by_block <= std::min(team, all_blocks); ++by_block) {
    const int64_t by_pixel = std::min(team / by_block, max_chunks);
    const double adding = by_pixel > 1 ? double(by_pixel + 1) * p.k * sums_row / team : 0;
    const double cycles = block_cycles * ceil_div(all_blocks, by_block) / by_pixel +
                          (all_pixels * p.k / by_pixel + adding) * tiles.sum_bytes / 8;
    if (by_block > 1 && cycles >= least) continue;
    least = cycles;
    pixel_parts = by_pixel;
    block_parts = by_block;
  }
  const int64_t per_part = ceil_div(planes * lines * pixels, target * pixel_parts);
  chunks = cuts > 1 ? max_chunks : std::min(planes, per_part * pixel_parts);

  // Sums that exceed the cache are computed for some rows at a time, each time reading all of X.
  const int64_t held = p.k * sums_row * tiles.sum_bytes / kSumsBytes;
  row_parts = p.groups > 1 ? 1 : std::clamp<int64_t>(held, 1, 1 + p.k / kRowsPerPart);

  // If dw has the layout of the sums, they are computed in dw.
  in_place = pixel_parts == 1 && tap_channels % lanes == 0 && p.dw_strides[1] == 1;
  for (const int dim : {D, H, W})
    in_place &= p.kernel[dim] == 1 || p.dw_strides[dim + 2] == sums_strides[dim + 2];

  int64_t weights = p.channels, last = (p.channels - 1) * p.dw_strides[1];  // of a row
  for (const int dim : {D, H, W}) {
    weights *= p.kernel[dim];
    last += (p.kernel[dim] - 1) * p.dw_strides[dim + 2];
  }
  rows_are_dense = last + 1 == weights;
}

Chunk Plan::chunk(int64_t i) const {
  const int64_t planes = p.samples * p.output[D], cuts = line_cuts * pixel_cuts;
  if (cuts == 1) return {part(planes, i, chunks), {0, p.output[H]}, {0, p.output[W]}};
  return {{i / cuts, i / cuts + 1},
          part(p.output[H], i % cuts / pixel_cuts, line_cuts),
          part(p.output[W], i % pixel_cuts, pixel_cuts)};
}

Range Plan::rows_of(int64_t group, int64_t row_part) const {
  const int64_t size = p.neurons / p.groups, *end = p.rows + p.k;
  const int64_t first = std::lower_bound(p.rows, end, group * size) - p.rows;
  const int64_t last = std::lower_bound(p.rows, end, (group + 1) * size) - p.rows;
  const Range mine = part(last - first, row_part, row_parts);
  return {first + mine.begin, first + mine.end};
}

Range Plan::outputs_inside(Range outputs, int64_t tap, int dim) const {
  const int64_t stride = p.stride[dim], size = p.input[dim], shift = this->shift(tap, dim);
  const int64_t begin = shift < 0 ? ceil_div(-shift, stride) : 0;
  const int64_t end = shift < size ? (size - 1 - shift) / stride + 1 : 0;
  outputs.begin = std::max(outputs.begin, begin);
  outputs.end = std::max(outputs.begin, std::min(outputs.end, end));
  return outputs;
}

Panel Plan::panel(const Chunk& c, int64_t step) const {
  const auto window_of = [this](Range outputs, int dim) -> Range {
    return {outputs.begin * p.stride[dim] + shift(0, dim),
            (outputs.end - 1) * p.stride[dim] + shift(p.kernel[dim] - 1, dim) + 1};
  };
  Range lines = window_of(c.lines, H);
  lines.begin = std::clamp<int64_t>(lines.begin, 0, p.input[H]);
  lines.end = std::clamp<int64_t>(lines.end, lines.begin, p.input[H]);
  return {lines, window_of(c.pixels, W), step};
}

}  // namespace neq::cpu
