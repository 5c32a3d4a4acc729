#include "conv_wgrad.h"

#include <algorithm>
#include <new>
#include <vector>

#include "conv_wgrad_kernels.h"
#include "processor.h"

// The gradient is a product of matrices, dW [k, inputs] = dYᵀ [k, pixels] X [pixels, inputs], where
// an input is a channel at a tap of the kernel. Here is how it is cut up; the arithmetic is in
// conv_wgrad_kernels.inc.
//
//   chunk   pixels whose X and dY stay in the cache while all their rows, taps and channels meet
//   block   some vectors of channels, times some rows: what one tile sums in registers
//
// A tile takes one tap, and exactly those pixels where that tap meets the input: padding is neither
// stored nor multiplied. X is read in place if its channels are adjacent and fill whole vectors, and
// else from a panel in which they do. Where channels are few, the panel has zeros left and right, and
// the taps along the width, which are adjacent there, count as channels of one wide tap: a window.

namespace neq::cpu {
namespace {

constexpr int D = 0, H = 1, W = 2;  // indices of a Size3; those of a Strides5 are 2 more

constexpr int64_t kLineBytes = 64;
// The X and dY that a block of a chunk reads: a small first-level cache.
constexpr int64_t kChunkBytes = 32 << 10;
// A chunk is one chain of additions, so a long one is inexact.
constexpr int64_t kChunkPixels = 128;
// What a thread should have to do, for waking it to pay.
constexpr double kThreadCycles = 50e3;
// How often a value of dY should be read, in lanes, for packing it to pay.
constexpr int64_t kPackedUses = 32;
// Computing should take at least as many cycles as this for each cache line fetched ahead: with less
// to do, the thread waits for memory either way.
constexpr int64_t kCyclesPerLine = 8;

// Uninitialised memory, aligned to cache lines, that grows as needed.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlignment); }

  T* reserve(int64_t size) {
    if (size > size_) {
      ::operator delete(data_, kAlignment);
      data_ = nullptr;
      data_ = static_cast<T*>(::operator new(size * sizeof(T), kAlignment));
      size_ = size;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{kLineBytes};
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The i-th of n even parts of [0, size).
Range part(int64_t size, int64_t i, int64_t n) { return {size * i / n, size * (i + 1) / n}; }

// The outputs o among `outputs` with 0 <= o * stride + shift < size.
Range meeting(Range outputs, int64_t stride, int64_t shift, int64_t size) {
  const int64_t begin = shift < 0 ? ceil_div(-shift, stride) : 0;
  const int64_t end = shift < size ? (size - 1 - shift) / stride + 1 : 0;
  outputs.begin = std::max(outputs.begin, begin);
  outputs.end = std::max(outputs.begin, std::min(outputs.end, end));
  return outputs;
}

int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A 1x1 convolution sees one long line of pixels, as far as its strides allow.
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

// Memory to be brought into the second-level cache, some lines at a time.
class Prefetch {
 public:
  void clear() {
    pieces_.clear();
    piece_ = 0;
    offset_ = lines = 0;
  }
  void add(const void* begin, int64_t bytes) {
    pieces_.push_back({static_cast<const char*>(begin), bytes});
    lines += ceil_div(bytes, kLineBytes);
  }
  void fetch(int64_t lines) {
    while (lines > 0 && piece_ < pieces_.size()) {
      const Piece piece = pieces_[piece_];
      const int64_t end = std::min(piece.bytes, offset_ + lines * kLineBytes);
      for (; offset_ < end; offset_ += kLineBytes, --lines)
        __builtin_prefetch(piece.begin + offset_, 0, 2);
      if (end == piece.bytes) ++piece_, offset_ = 0;
    }
  }

  int64_t lines = 0;  // in all

 private:
  struct Piece {
    const char* begin;
    int64_t bytes;
  };
  std::vector<Piece> pieces_;
  size_t piece_ = 0;
  int64_t offset_ = 0;
};

template <class T>
class Gradient {
 public:
  Gradient(const ConvWgrad& problem, const Kernels<T>& kernels, int split_for)
      : p(flatten(problem)), kernels(kernels), lanes(kernels.lanes) {
    choose_layout();
    choose_split(split_for);
  }

  void run(int threads) {
    Buffer<T> sums_buffer;
    Buffer<double> bias_buffer;
    sums = in_place ? static_cast<T*>(p.dw) : sums_buffer.reserve(pixel_parts * p.k * sums_row);
    bias_sums = p.db ? bias_buffer.reserve(pixel_parts * p.k) : nullptr;
    const int64_t parts = pixel_parts * block_parts;
    const int team = int(std::min<int64_t>(threads, parts));
#pragma omp parallel num_threads(team) if (team > 1)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < parts; ++i) sum_part(i / block_parts, i % block_parts);
#pragma omp for schedule(static)
      for (int64_t neuron = 0; neuron < p.neurons; ++neuron) write_row(neuron);
    }
  }

 private:
  // A box of output pixels; a plane is one depth of one sample.
  struct Chunk {
    Range planes, lines, pixels;
  };

  // Where a chunk keeps its X: [planes, taps in depth, lines, pixels, step channels].
  struct Panel {
    Range lines, pixels;  // of the input; pixels also beyond its edges
    int64_t step;
    int64_t line() const { return pixels.size() * step; }
    int64_t plane() const { return lines.size() * line(); }
  };

  // What one thread needs for its chunks.
  struct Memory {
    Buffer<T> x, dy;
    std::vector<std::vector<Run>> runs;
    std::vector<Strip<T>> strips;  // [taps], without pointers
    Prefetch next;  // the following chunk
  };

  void choose_layout() {
    const auto vectors_of = [this](int64_t channels) { return ceil_div(channels, lanes); };
    const int64_t width = p.kernel[W];
    window = width > 1 && p.dilation[W] == 1 &&
             (p.channels <= lanes || vectors_of(width * p.channels) < width * vectors_of(p.channels));
    taps = {p.kernel[D], p.kernel[H], window ? 1 : width};
    tap_channels = window ? width * p.channels : p.channels;
    vectors = vectors_of(tap_channels);
    blocks = ceil_div(vectors, kernels.most_vectors);
    most_rows = kernels.most_rows[ceil_div(vectors, blocks)];

    const int64_t tap = vectors * lanes, line = taps[W] * tap;
    sums_row = taps[D] * taps[H] * line;
    sums_strides = {sums_row, 1, taps[H] * line, line, window ? p.channels : tap};

    const bool converts = bytes_of(p.dtype) != sizeof(T);
    packs_x = window || converts || p.channels % lanes || p.x_strides[1] != 1;
    // Packed, the rows of a tile share cache lines, whatever the stride of a pixel.
    packs_dy = converts || (p.dy_strides[1] == 1 && sums_row >= kPackedUses * lanes);
  }

  void choose_split(int split_for) {
    const int64_t planes = p.samples * p.output[D], lines = p.output[H], pixels = p.output[W];
    const int64_t block_channels = std::min(p.channels, ceil_div(vectors, blocks) * lanes);
    int64_t target = std::min(
        kChunkPixels, kChunkBytes / (block_channels * int64_t(sizeof(T)) + kLineBytes));
    // Input lines that two chunks share are packed twice.
    const int64_t shared_lines = shift(p.kernel[H] - 1, H) - shift(0, H) + 1 - p.stride[H];
    if (packs_x) target = std::max(target, 4 * shared_lines / p.stride[H] * pixels);
    pixel_cuts = lines * pixels > target ? ceil_div(pixels, target) : 1;
    line_cuts = lines * pixels > target ? ceil_div(lines, std::max<int64_t>(1, target / pixels)) : 1;
    const int64_t cuts = pixel_cuts * line_cuts;
    const int64_t most_chunks = planes * cuts;

    // Threads share the pixels, each with sums of its own to be added up in the end, or the blocks,
    // each reading all of dY. Compare a thread's cycles, at 2 products or 8 bytes a cycle.
    const int64_t all_blocks = p.groups * blocks;
    const double all_pixels = double(planes) * lines * pixels;
    const double block_cycles = all_pixels * p.k * sums_row / lanes / all_blocks / 2;
    const int64_t team =
        int64_t(std::min<double>(split_for, 1 + block_cycles * all_blocks / kThreadCycles));
    double least = 0;
    for (int64_t by_block = 1; by_block <= std::min(team, all_blocks); ++by_block) {
      const int64_t by_pixel = std::min(team / by_block, most_chunks);
      const double adding = by_pixel > 1 ? double(by_pixel + 1) * p.k * sums_row / team : 0;
      const double cycles = block_cycles * ceil_div(all_blocks, by_block) / by_pixel +
                            (all_pixels * p.k / by_pixel + adding) * sizeof(T) / 8;
      if (by_block > 1 && cycles >= least) continue;
      least = cycles;
      pixel_parts = by_pixel;
      block_parts = by_block;
    }
    const int64_t per_part = ceil_div(planes * lines * pixels, target * pixel_parts);
    chunks = cuts > 1 ? most_chunks : std::min(planes, per_part * pixel_parts);

    // A gradient that lies in memory as the sums do takes them directly.
    in_place = pixel_parts == 1 && tap_channels % lanes == 0 && p.dw_strides[1] == 1;
    for (const int dim : {D, H, W})
      in_place &= p.kernel[dim] == 1 || p.dw_strides[dim + 2] == sums_strides[dim + 2];
  }

  Chunk chunk(int64_t i) const {
    const int64_t planes = p.samples * p.output[D], cuts = line_cuts * pixel_cuts;
    if (cuts == 1) return {part(planes, i, chunks), {0, p.output[H]}, {0, p.output[W]}};
    return {{i / cuts, i / cuts + 1},
            part(p.output[H], i % cuts / pixel_cuts, line_cuts),
            part(p.output[W], i % pixel_cuts, pixel_cuts)};
  }

  // The active rows of a group, as positions in p.rows.
  Range rows_of(int64_t group) const {
    const int64_t size = p.neurons / p.groups, *end = p.rows + p.k;
    return {std::lower_bound(p.rows, end, group * size) - p.rows,
            std::lower_bound(p.rows, end, (group + 1) * size) - p.rows};
  }

  // The tap meets input o * stride + shift at output o.
  int64_t shift(int64_t tap, int dim) const { return tap * p.dilation[dim] - p.padding[dim]; }

  int64_t input_depth(int64_t plane, int64_t tap) const {
    return plane % p.output[D] * p.stride[D] + shift(tap, D);
  }

  Panel panel(const Chunk& c, int64_t step) const {
    const auto met = [this](Range outputs, int dim) -> Range {
      return {outputs.begin * p.stride[dim] + shift(0, dim),
              (outputs.end - 1) * p.stride[dim] + shift(p.kernel[dim] - 1, dim) + 1};
    };
    Range lines = met(c.lines, H);
    lines.begin = std::clamp<int64_t>(lines.begin, 0, p.input[H]);
    lines.end = std::clamp<int64_t>(lines.end, lines.begin, p.input[H]);
    return {lines, met(c.pixels, W), step};
  }

  void pack_x(const Chunk& c, const Panel& to, Range channels, T* panel) const {
    const auto& stride = p.x_strides;
    const int64_t begin = std::clamp<int64_t>(to.pixels.begin, 0, p.input[W]);
    const int64_t end = std::clamp<int64_t>(to.pixels.end, begin, p.input[W]);
    const int64_t zeros = (begin - to.pixels.begin) * to.step, packed = (end - begin) * to.step;
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane)
      for (int64_t tap = 0; tap < p.kernel[D]; ++tap, panel += to.plane()) {
        const int64_t depth = input_depth(plane, tap);
        if (depth < 0 || depth >= p.input[D]) continue;
        for (int64_t h = to.lines.begin; h < to.lines.end; ++h) {
          T* line = panel + (h - to.lines.begin) * to.line();
          const int64_t at = plane / p.output[D] * stride[0] + channels.begin * stride[1] +
                             depth * stride[2] + h * stride[3] + begin * stride[4];
          std::fill(line, line + zeros, T(0));
          kernels.pack_line[int(p.dtype)](
              static_cast<const char*>(p.x) + at * bytes_of(p.dtype), end - begin, stride[4],
              channels.size(), stride[1], line + zeros, to.step);
          std::fill(line + zeros + packed, line + to.line(), T(0));
        }
      }
    std::fill(panel, panel + lanes, T(0));  // a window's last vector may end here
  }

  // panel [row blocks, pixels of the chunk, kMostRows]
  void pack_dy(const Chunk& c, Range rows, T* panel) const {
    const auto& stride = p.dy_strides;
    const int64_t row_blocks = ceil_div(rows.size(), most_rows);
    const int64_t size = c.planes.size() * c.lines.size() * c.pixels.size() * kMostRows;
    std::vector<int64_t> dy_rows(rows.size());
    for (int64_t j = 0; j < rows.size(); ++j) dy_rows[j] = p.rows[rows.begin + j] * stride[1];
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane)
      for (int64_t line = c.lines.begin; line < c.lines.end; ++line)
        for (int64_t pixel = c.pixels.begin; pixel < c.pixels.end; pixel += 16) {
          const int64_t pixels = std::min<int64_t>(16, c.pixels.end - pixel);
          const int64_t at = plane / p.output[D] * stride[0] + plane % p.output[D] * stride[2] +
                             line * stride[3] + pixel * stride[4];
          for (int64_t b = 0; b < row_blocks; ++b) {
            const Range block = part(rows.size(), b, row_blocks);
            kernels.pack_rows[int(p.dtype)][block.size()](
                static_cast<const char*>(p.dy) + at * bytes_of(p.dtype), pixels, stride[4],
                &dy_rows[block.begin], panel + b * size);
          }
          panel += pixels * kMostRows;
        }
  }

  // Where the chunk's dY and X meet at a tap. Pointers are left out.
  Strip<T> strip(const Chunk& c, const Panel& panel, Size3 tap, std::vector<Run>& runs) const {
    const Range lines = meeting(c.lines, p.stride[H], shift(tap[H], H), p.input[H]);
    const Range pixels =
        window ? c.pixels : meeting(c.pixels, p.stride[W], shift(tap[W], W), p.input[W]);
    const int64_t h = lines.begin * p.stride[H] + shift(tap[H], H);
    const int64_t w = pixels.begin * p.stride[W] + shift(tap[W], W);

    const auto& x = p.x_strides;
    const int64_t x_line = packs_x ? panel.line() : x[3], x_pixel = packs_x ? panel.step : x[4];
    runs.clear();
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane) {
      const int64_t depth = input_depth(plane, tap[D]);
      if (depth < 0 || depth >= p.input[D] || lines.size() * pixels.size() == 0) continue;
      const int64_t x_at =
          packs_x ? ((plane - c.planes.begin) * p.kernel[D] + tap[D]) * panel.plane() +
                        (h - panel.lines.begin) * x_line + (w - panel.pixels.begin) * x_pixel
                  : plane / p.output[D] * x[0] + depth * x[2] + h * x_line + w * x_pixel;
      runs.push_back({dy_at(c, plane, lines.begin, pixels.begin), x_at, lines.size()});
    }
    return {runs.data(), int64_t(runs.size()),  pixels.size(),
            nullptr,     dy_pixel(),            dy_line(c),
            nullptr,     p.stride[W] * x_pixel, p.stride[H] * x_line};
  }

  // Where dY [plane, line, pixel] is, in the tensor or in the panel of the chunk.
  int64_t dy_at(const Chunk& c, int64_t plane, int64_t line, int64_t pixel) const {
    if (packs_dy)
      return ((plane - c.planes.begin) * c.lines.size() + line - c.lines.begin) * dy_line(c) +
             (pixel - c.pixels.begin) * dy_pixel();
    const auto& dy = p.dy_strides;
    return plane / p.output[D] * dy[0] + plane % p.output[D] * dy[2] + line * dy[3] + pixel * dy[4];
  }
  int64_t dy_line(const Chunk& c) const {
    return packs_dy ? c.pixels.size() * kMostRows : p.dy_strides[3];
  }
  int64_t dy_pixel() const { return packs_dy ? kMostRows : p.dy_strides[4]; }

  void sum_part(int64_t pixel_part, int64_t block_part) const {
    Memory memory;
    memory.runs.resize(taps[D] * taps[H] * taps[W]);
    memory.strips.resize(memory.runs.size());
    const Range mine = part(chunks, pixel_part, pixel_parts);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      memory.next.clear();
      if (i + 1 < mine.end) look_ahead(chunk(i + 1), memory.next);
      sum_chunk(chunk(i), part(p.groups * blocks, block_part, block_parts), i == mine.begin,
                pixel_part, memory);
    }
  }

  // Names the memory that a chunk reads out of order, for which a processor would wait: all but
  // adjacent channels on their way to a panel.
  void look_ahead(const Chunk& c, Prefetch& next) const {
    const auto &x = p.x_strides, &dy = p.dy_strides;
    const int64_t bytes = bytes_of(p.dtype);
    const Panel in = panel(c, 0);
    const int64_t begin = std::clamp<int64_t>(in.pixels.begin, 0, p.input[W]);
    const int64_t end = std::clamp<int64_t>(in.pixels.end, begin, p.input[W]);
    const int64_t used_lines = p.kernel[H] == 1 ? p.stride[H] : 1;
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane) {
      const int64_t depth = input_depth(plane, p.kernel[D] - 1);  // a tap whose plane is new
      if (depth >= 0 && depth < p.input[D] && begin < end && !(packs_x && x[1] == 1)) {
        const char* at = static_cast<const char*>(p.x) +
                         (plane / p.output[D] * x[0] + depth * x[2] + begin * x[4]) * bytes;
        const int64_t channels = p.groups * p.channels, pixels = (end - begin - 1) * x[4];
        if (x[1] == 1)
          for (int64_t h = in.lines.begin; h < in.lines.end; h += used_lines)
            next.add(at + h * x[3] * bytes, (pixels + channels) * bytes);
        else
          for (int64_t i = 0; i < channels; ++i)
            next.add(at + (i * x[1] + in.lines.begin * x[3]) * bytes,
                     ((in.lines.size() - 1) * x[3] + pixels + 1) * bytes);
      }
      if (!packs_dy) {
        const char* at = static_cast<const char*>(p.dy) +
                         dy_at(c, plane, c.lines.begin, c.pixels.begin) * bytes;
        const int64_t pixels = (c.pixels.size() - 1) * dy[4];
        if (dy[1] == 1)
          for (int64_t i = 0; i < c.lines.size(); ++i)
            next.add(at + i * dy[3] * bytes, (pixels + p.neurons) * bytes);
        else
          for (int64_t j = 0; j < p.k; ++j)
            next.add(at + p.rows[j] * dy[1] * bytes,
                     ((c.lines.size() - 1) * dy[3] + pixels + 1) * bytes);
      }
    }
  }

  // Blocks count through all groups.
  void sum_chunk(const Chunk& c, Range my_blocks, bool fresh, int64_t pixel_part, Memory& m) const {
    for (int64_t first = my_blocks.begin; first < my_blocks.end;) {
      const int64_t group = first / blocks;
      const int64_t end = std::min(my_blocks.end, (group + 1) * blocks);
      sum_group(c, group, {first % blocks, end - group * blocks}, fresh, pixel_part, m);
      first = end;
    }
  }

  void sum_group(const Chunk& c, int64_t group, Range my_blocks, bool fresh, int64_t pixel_part,
                 Memory& m) const {
    const Range rows = rows_of(group);
    if (rows.size() == 0) return;

    const int64_t row_blocks = ceil_div(rows.size(), most_rows);
    const int64_t dy_panel = c.planes.size() * c.lines.size() * c.pixels.size() * kMostRows;
    const T* dy = static_cast<const T*>(p.dy);
    if (packs_dy) {
      T* to = m.dy.reserve(row_blocks * dy_panel);
      pack_dy(c, rows, to);
      dy = to;
    }

    const int64_t n_taps = m.strips.size();
    const int64_t tiles = my_blocks.size() * row_blocks * n_taps;
    const int64_t cycles = dy_panel / kMostRows * tiles * most_rows * kernels.most_vectors / 2;
    const int64_t ahead =
        cycles < kCyclesPerLine * m.next.lines ? 0 : ceil_div(m.next.lines, tiles);

    for (int64_t b = my_blocks.begin; b < my_blocks.end; ++b) {
      const Range block = part(vectors, b, blocks);
      const T* x = block_x(c, group, block, b == my_blocks.begin, m);
      for (int64_t r = 0; r < row_blocks; ++r) {
        Range tile_rows = part(rows.size(), r, row_blocks);
        tile_rows = {rows.begin + tile_rows.begin, rows.begin + tile_rows.end};
        int64_t dy_rows[kMostRows], sum_rows[kMostRows];
        for (int64_t j = 0; j < tile_rows.size(); ++j) {
          const int64_t at = tile_rows.begin + j;
          dy_rows[j] = packs_dy ? r * dy_panel + j : p.rows[at] * p.dy_strides[1];
          sum_rows[j] = in_place ? p.rows[at] * p.dw_strides[0]
                                 : (pixel_part * p.k + at) * sums_row;
        }
        const auto tile = kernels.tile[block.size()][tile_rows.size()];
        for (int64_t tap = 0; tap < n_taps; ++tap) {
          m.next.fetch(ahead);
          Strip<T> s = m.strips[tap];
          s.dy = dy;
          s.x = x;
          tile(s, dy_rows, sums + (tap * vectors + block.begin) * lanes, sum_rows, fresh);
        }
        if (p.db && b == 0) sum_bias(c, dy, dy_rows, tile_rows, fresh, pixel_part);
      }
    }
  }

  // X of the chunk and the block's channels, and in m.strips where in it the taps begin. A window's
  // panel serves all blocks of a group.
  const T* block_x(const Chunk& c, int64_t group, Range block, bool first, Memory& m) const {
    const int64_t group_channel = group * p.channels;
    Range packed{0, p.channels};
    if (!window) packed = {block.begin * lanes, std::min(block.end * lanes, p.channels)};
    const Panel to = panel(c, window ? p.channels : block.size() * lanes);
    const T* x = static_cast<const T*>(p.x) + group_channel + block.begin * lanes;
    if (packs_x) {
      T* panel = m.x.reserve(c.planes.size() * p.kernel[D] * to.plane() + lanes);
      if (first || !window)
        pack_x(c, to, {group_channel + packed.begin, group_channel + packed.end}, panel);
      x = window ? panel + block.begin * lanes : panel;
    }
    if (first || packs_x) {
      int64_t tap = 0;
      for (int64_t d = 0; d < taps[D]; ++d)
        for (int64_t h = 0; h < taps[H]; ++h)
          for (int64_t w = 0; w < taps[W]; ++w, ++tap)
            m.strips[tap] = strip(c, to, {d, h, w}, m.runs[tap]);
    }
    return x;
  }

  // In double: there are few of them, and as many summands as there are pixels.
  void sum_bias(const Chunk& c, const T* dy, const int64_t* dy_rows, Range rows, bool fresh,
                int64_t pixel_part) const {
    double total[kMostRows] = {};
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane)
      for (int64_t line = c.lines.begin; line < c.lines.end; ++line) {
        const T* at = dy + dy_at(c, plane, line, c.pixels.begin);
        for (int64_t i = 0; i < c.pixels.size(); ++i, at += dy_pixel())
          for (int64_t j = 0; j < rows.size(); ++j) total[j] += at[dy_rows[j]];
      }
    double* sums = bias_sums + pixel_part * p.k + rows.begin;
    for (int64_t j = 0; j < rows.size(); ++j) sums[j] = fresh ? total[j] : sums[j] + total[j];
  }

  void write_row(int64_t neuron) const {
    const int64_t j = std::lower_bound(p.rows, p.rows + p.k, neuron) - p.rows;
    const bool active = j < p.k && p.rows[j] == neuron;
    if (p.db) {
      double total = 0;
      for (int64_t i = 0; i < pixel_parts && active; ++i) total += bias_sums[i * p.k + j];
      static_cast<T*>(p.db)[neuron] = T(total);
    }
    T* row = static_cast<T*>(p.dw) + neuron * p.dw_strides[0];
    if (active && !in_place) {
      T* total = sums + j * sums_row;
      for (int64_t i = 1; i < pixel_parts; ++i) {
        const T* more = total + i * p.k * sums_row;
        for (int64_t e = 0; e < sums_row; ++e) total[e] += more[e];
      }
      for_each_weight([&](int64_t to, int64_t from) { row[to] = total[from]; });
    } else if (!active) {
      for_each_weight([&](int64_t to, int64_t) { row[to] = 0; });
    }
  }

  // Calls visit(its place in a row of dw, its place in a row of sums) for each weight, in the order
  // of dw.
  template <class Visit>
  void for_each_weight(Visit visit) const {
    const auto &to = p.dw_strides, &from = sums_strides;
    const bool channels_last = to[1] == 1;
    const int64_t outer = channels_last ? 1 : p.channels, inner = channels_last ? p.channels : 1;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t d = 0; d < p.kernel[D]; ++d)
        for (int64_t h = 0; h < p.kernel[H]; ++h)
          for (int64_t w = 0; w < p.kernel[W]; ++w)
            for (int64_t i = 0; i < inner; ++i)
              visit((o + i) * to[1] + d * to[2] + h * to[3] + w * to[4],
                    (o + i) * from[1] + d * from[2] + h * from[3] + w * from[4]);
  }

  const ConvWgrad p;
  const Kernels<T>& kernels;
  const int64_t lanes;

  bool window;              // the taps along the width count as channels
  bool packs_x, packs_dy;   // else they are read in place
  bool in_place;            // sums are made in dw itself
  Size3 taps;               // that tiles take one by one
  int64_t tap_channels;     // of each of them
  int64_t vectors, blocks;  // of its channels
  int64_t most_rows;        // of a tile
  int64_t sums_row;         // how many sums there are for a row of dW
  Strides5 sums_strides;    // row, channel, depth, height, width

  int64_t line_cuts, pixel_cuts;             // of each plane
  int64_t chunks;                            // in all
  int64_t pixel_parts = 1, block_parts = 1;  // that threads take

  T* sums;            // [pixel_parts, k, sums_row], or dw
  double* bias_sums;  // [pixel_parts, k]
};

template <class T>
const Kernels<T>& kernels_of(Isa isa) {
  static const Processor processor;
  if (isa == Isa::best)
    isa = processor.avx512 ? Isa::avx512 : processor.avx2 ? Isa::avx2 : Isa::portable;
#ifdef NEQ_X86
  if (isa == Isa::avx512) return avx512::kernels<T>();
  if (isa == Isa::avx2) return avx2::kernels<T>();
#endif
  return portable::kernels<T>();
}

}  // namespace

bool has_isa(Isa isa) {
#ifdef NEQ_X86
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::best || isa == Isa::portable;
}

void conv_wgrad(const ConvWgrad& problem, Isa isa, int threads, int split_for) {
  if (problem.dtype == DType::float64)
    Gradient<double>(problem, kernels_of<double>(isa), split_for).run(threads);
  else
    Gradient<float>(problem, kernels_of<float>(isa), split_for).run(threads);
}

}  // namespace neq::cpu
