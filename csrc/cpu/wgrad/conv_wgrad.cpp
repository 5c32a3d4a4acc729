#include "conv_wgrad.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <vector>

#include "../buffer.h"
#include "conv_wgrad_kernels.h"
#include "conv_wgrad_plan.h"

namespace neq::cpu {
namespace {

// The most cache lines of the next chunk that are prefetched between two tiles. If there are more,
// a tile prefetches one with each pixel.
constexpr int64_t kFewLines = 8;
// The cycles of computing for each cache line prefetched between tiles, below which the thread
// waits for memory either way.
constexpr int64_t kCyclesPerLine = 8;
// The neurons that are written together.
constexpr int64_t kWrittenRows = 64;

template <class T>
class Gradient : Plan {
 public:
  Gradient(const ConvWgrad& problem, const Kernels<T>& kernels, int split_for)
      : Plan(problem, {kernels.lanes, sizeof(T), kernels.max_vectors, kernels.max_rows.data()},
             split_for),
        kernels(kernels) {}

  void run(int threads) {
    Buffer<T> sums_buffer;
    Buffer<double> bias_buffer;
    sums = in_place ? static_cast<T*>(p.dw) : sums_buffer.reserve(pixel_parts * p.k * sums_row);
    bias_sums = p.db ? bias_buffer.reserve(pixel_parts * p.k) : nullptr;
    const int64_t parts = pixel_parts * block_parts;
    const int team = int(std::min<int64_t>(threads, parts));
    const int64_t written = ceil_div(p.dw_rows, kWrittenRows);
    std::exception_ptr error;  // no exception may leave a parallel region
    std::mutex mutex;
#pragma omp parallel num_threads(team) if (team > 1)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < parts; ++i) try {
          sum_part(i / block_parts, i % block_parts);
        } catch (...) {
          const std::lock_guard lock(mutex);
          error = std::current_exception();
        }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < written; ++i)
        if (!error) write_rows(part(p.dw_rows, i, written));
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  // The rows of a tile: how many, the index of the first in p.rows, offsets in dY and in the sums.
  struct TileRows {
    int64_t size, first;
    int64_t dy[kMaxRows], sums[kMaxRows];
  };

  // The scratch of a thread.
  struct Memory {
    Buffer<T> x, dy;
    std::vector<std::vector<Run>> runs;
    std::vector<Strip<T>> strips;  // [taps]
    std::vector<TileRows> rows;
    Prefetch next;  // the following chunk
  };

  void pack_x(const Chunk& c, const Panel& to, Range channels, T* panel) const {
    const auto& stride = p.x_strides;
    const int64_t begin = std::clamp<int64_t>(to.pixels.begin, 0, p.input[W]);
    const int64_t end = std::clamp<int64_t>(to.pixels.end, begin, p.input[W]);
    const int64_t left = std::clamp<int64_t>(begin - to.pixels.begin, 0, to.pixels.size());
    const int64_t zeros = left * to.step, packed = (end - begin) * to.step;
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane)
      for (int64_t tap = 0; tap < p.kernel[D]; ++tap, panel += to.plane()) {
        const int64_t depth = input_depth(plane, tap);
        if (depth < 0 || depth >= p.input[D]) continue;
        for (int64_t h = to.lines.begin; h < to.lines.end; ++h) {
          T* line = panel + (h - to.lines.begin) * to.line();
          const int64_t at = plane / p.output[D] * stride[0] + channels.begin * stride[1] +
                             depth * stride[2] + h * stride[3] + begin * stride[4];
          std::fill(line, line + zeros, T(0));
          kernels.pack_line[int(p.dtype)](static_cast<const char*>(p.x) + at * bytes_of(p.dtype),
                                          end - begin, stride[4], channels.size(), stride[1],
                                          line + zeros, to.step);
          std::fill(line + zeros + packed, line + to.line(), T(0));
        }
      }
    std::fill(panel, panel + lanes, T(0));  // a window's last vector may reach in here
  }

  // panel [blocks of rows, pixels of the chunk, rows]
  void pack_dy(const Chunk& c, Range rows, T* panel) const {
    const auto& stride = p.dy_strides;
    const int64_t row_blocks = ceil_div(rows.size(), max_rows);
    std::vector<int64_t> dy_rows(rows.size());
    for (int64_t j = 0; j < rows.size(); ++j) dy_rows[j] = p.rows[rows.begin + j] * stride[1];
    int64_t packed = 0;
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
                &dy_rows[block.begin], panel + block.begin * c.size() + packed * block.size());
          }
          packed += pixels;
        }
  }

  // The pixels of a chunk whose input at a tap is inside of the image; without addresses.
  Strip<T> strip(const Chunk& c, const Panel& panel, Size3 tap, std::vector<Run>& runs) const {
    const Range lines = outputs_inside(c.lines, tap[H], H);
    const Range pixels = window ? c.pixels : outputs_inside(c.pixels, tap[W], W);
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
    const int64_t n_runs = runs.size(), size = n_runs * lines.size() * pixels.size();
    return {runs.data(),
            n_runs,
            pixels.size(),
            size,
            nullptr,
            packs_dy,
            dy_pixel(),
            dy_line(c),
            nullptr,
            p.stride[W] * x_pixel,
            p.stride[H] * x_line,
            nullptr};
  }

  // The offset of dY [plane, line, pixel] in the tensor, or packed, its number in the panel.
  int64_t dy_at(const Chunk& c, int64_t plane, int64_t line, int64_t pixel) const {
    if (packs_dy)
      return ((plane - c.planes.begin) * c.lines.size() + line - c.lines.begin) * dy_line(c) +
             pixel - c.pixels.begin;
    const auto& dy = p.dy_strides;
    return plane / p.output[D] * dy[0] + plane % p.output[D] * dy[2] + line * dy[3] + pixel * dy[4];
  }
  int64_t dy_line(const Chunk& c) const { return packs_dy ? c.pixels.size() : p.dy_strides[3]; }
  int64_t dy_pixel() const { return packs_dy ? 1 : p.dy_strides[4]; }

  void sum_part(int64_t pixel_part, int64_t block_part) const {
    Memory memory;
    memory.runs.resize(taps[D] * taps[H] * taps[W]);
    memory.strips.resize(memory.runs.size());
    const Range my_chunks = part(chunks, pixel_part, pixel_parts);
    for (int64_t rows = 0; rows < row_parts; ++rows)
      for (int64_t i = my_chunks.begin; i < my_chunks.end; ++i) {
        memory.next.clear();
        if (i + 1 < my_chunks.end) look_ahead(chunk(i + 1), rows, memory.next);
        sum_chunk(chunk(i), part(p.groups * blocks, block_part, block_parts), rows,
                  i == my_chunks.begin, pixel_part, memory);
      }
  }

  // Adds the memory that a chunk reads for a part of the rows.
  void look_ahead(const Chunk& c, int64_t row_part, Prefetch& next) const {
    const Panel in = panel(c, 0);
    const int64_t begin = std::clamp<int64_t>(in.pixels.begin, 0, p.input[W]);
    const int64_t end = std::clamp<int64_t>(in.pixels.end, begin, p.input[W]);
    const int64_t used_lines = p.kernel[H] == 1 ? p.stride[H] : 1;
    const Range rows = row_parts > 1 ? rows_of(0, row_part) : Range{0, p.k};
    const auto &x = p.x_strides, &dy = p.dy_strides;
    const auto add = [&](const void* data, int64_t at, int64_t elements) {
      const int64_t bytes = bytes_of(p.dtype);
      next.add(static_cast<const char*>(data) + at * bytes, elements * bytes);
    };
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane) {
      const int64_t sample = plane / p.output[D];
      const int64_t depth = input_depth(plane, p.kernel[D] - 1);  // a tap whose plane is new
      if (depth >= 0 && depth < p.input[D] && begin < end) {
        const int64_t at = sample * x[0] + depth * x[2] + begin * x[4];
        const int64_t channels = p.groups * p.channels, pixels = (end - begin - 1) * x[4];
        if (x[1] == 1)
          for (int64_t h = in.lines.begin; h < in.lines.end; h += used_lines)
            add(p.x, at + h * x[3], pixels + channels);
        else
          for (int64_t i = 0; i < channels; ++i)
            add(p.x, at + i * x[1] + in.lines.begin * x[3],
                (in.lines.size() - 1) * x[3] + pixels + 1);
      }
      const int64_t at = sample * dy[0] + plane % p.output[D] * dy[2] + c.lines.begin * dy[3] +
                         c.pixels.begin * dy[4];
      const int64_t pixels = (c.pixels.size() - 1) * dy[4];
      if (dy[1] == 1 && row_parts == 1)
        for (int64_t i = 0; i < c.lines.size(); ++i) add(p.dy, at + i * dy[3], pixels + p.neurons);
      else if (dy[1] == 1)
        for (int64_t i = 0; i < c.lines.size() * c.pixels.size(); ++i)
          add(p.dy,
              at + i / c.pixels.size() * dy[3] + i % c.pixels.size() * dy[4] + p.rows[rows.begin],
              p.rows[rows.end - 1] - p.rows[rows.begin] + 1);
      else
        for (int64_t j = rows.begin; j < rows.end; ++j)
          add(p.dy, at + p.rows[j] * dy[1], (c.lines.size() - 1) * dy[3] + pixels + 1);
    }
  }

  // `my_blocks` counts through all groups.
  void sum_chunk(const Chunk& c, Range my_blocks, int64_t row_part, bool overwrite,
                 int64_t pixel_part, Memory& m) const {
    for (int64_t first = my_blocks.begin; first < my_blocks.end;) {
      const int64_t group = first / blocks;
      const int64_t end = std::min(my_blocks.end, (group + 1) * blocks);
      sum_group(c, group, {first % blocks, end - group * blocks}, rows_of(group, row_part),
                overwrite, pixel_part, m);
      first = end;
    }
  }

  void sum_group(const Chunk& c, int64_t group, Range my_blocks, Range rows, bool overwrite,
                 int64_t pixel_part, Memory& m) const {
    if (rows.size() == 0) return;

    const T* dy = static_cast<const T*>(p.dy);
    if (packs_dy) {
      T* to = m.dy.reserve(rows.size() * c.size());
      pack_dy(c, rows, to);
      dy = to;
    }
    const int64_t row_blocks = ceil_div(rows.size(), max_rows);
    m.rows.resize(row_blocks);
    for (int64_t r = 0; r < row_blocks; ++r) {
      const Range block = part(rows.size(), r, row_blocks);
      m.rows[r].size = block.size();
      m.rows[r].first = rows.begin + block.begin;
      for (int64_t j = 0; j < block.size(); ++j) {
        const int64_t i = m.rows[r].first + j, row = p.rows[i];
        m.rows[r].dy[j] = packs_dy ? block.begin * c.size() + j : row * p.dy_strides[1];
        m.rows[r].sums[j] = in_place ? p.places[i] * p.dw_strides[0]
                                     : (pixel_part * p.k + i) * sums_row;
      }
    }

    const int64_t tiles = my_blocks.size() * row_blocks * int64_t(m.strips.size());
    const int64_t cycles = c.size() * tiles * max_rows * kernels.max_vectors / 2;
    const int64_t ahead = ceil_div(m.next.lines, tiles);
    const int64_t at_once = cycles < kCyclesPerLine * m.next.lines ? 0 : ahead;

    for (int64_t b = my_blocks.begin; b < my_blocks.end; ++b) {
      const Range block = part(vectors, b, blocks);
      const T* x = block_x(c, group, block, b == my_blocks.begin, m);
      for (Strip<T>& strip : m.strips) strip.dy = dy, strip.x = x;
      for (const TileRows& rows : m.rows) {
        const auto tile = kernels.tile[block.size()][rows.size];
        T* out = sums + block.begin * lanes;
        for (Strip<T>& strip : m.strips) {
          strip.next = ahead > kFewLines ? m.next.take(strip.size) : nullptr;
          if (!strip.next) m.next.fetch(at_once);
          tile(strip, rows.dy, out, rows.sums, overwrite);
          out += vectors * lanes;
        }
        if (p.db && b == 0) sum_bias(c, dy, rows, overwrite, pixel_part);
      }
    }
  }

  // X of a chunk and the channels of a block. Sets in m.strips where the taps begin in it. One
  // panel of a window serves all blocks of a group.
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

  void sum_bias(const Chunk& c, const T* dy, const TileRows& rows, bool overwrite,
                int64_t pixel_part) const {
    double* totals = bias_sums + pixel_part * p.k + rows.first;
    if (overwrite) std::fill(totals, totals + rows.size, 0.0);
    const auto sum = kernels.sum_rows[rows.size];
    if (packs_dy) return sum(dy, c.size(), rows.size, rows.dy, totals);
    for (int64_t plane = c.planes.begin; plane < c.planes.end; ++plane)
      for (int64_t line = c.lines.begin; line < c.lines.end; ++line)
        sum(dy + dy_at(c, plane, line, c.pixels.begin), c.pixels.size(), dy_pixel(), rows.dy,
            totals);
  }

  // Writes these places, at most kWrittenRows, of dw and db: sums, or zeros.
  void write_rows(Range places) const {
    const T* from[kWrittenRows];       // their sums, or kZeros
    int64_t masks[kWrittenRows] = {};  // all bits set in active rows
    const int64_t* active = std::lower_bound(p.places, p.places + p.k, places.begin);
    alignas(kLineBytes) static constexpr T kZeros[kLineBytes / sizeof(T)] = {};
    for (int64_t place = places.begin; place < places.end; ++place) {
      const int64_t i = place - places.begin, j = active - p.places;
      from[i] = kZeros;
      if (j < p.k && *active == place) {
        ++active;
        masks[i] = -1;
        if (!in_place) from[i] = add_parts(j);
      }
      if (!p.db) continue;
      double total = 0;
      for (int64_t part = 0; part < pixel_parts && masks[i]; ++part)
        total += bias_sums[part * p.k + j];
      static_cast<T*>(p.db)[place] = T(total);
    }
    T* row = static_cast<T*>(p.dw) + places.begin * p.dw_strides[0];
    if (p.dw_strides[0] == 1 && !in_place)  // columns: a cache line holds many neurons
      return for_each_tap([&](int64_t to, int64_t at) {
        kernels.interleave(from, masks, places.size(), at, p.channels, row + to, p.dw_strides[1]);
      });
    const int64_t step = p.dw_strides[1];  // that of the sums is 1
    for (int64_t i = 0; i < places.size(); ++i, row += p.dw_strides[0])
      if (!masks[i] && rows_are_dense)
        std::fill_n(row, p.channels * p.kernel[D] * p.kernel[H] * p.kernel[W], T(0));
      else if (!masks[i])
        for_each_tap([&](int64_t to, int64_t) {
          for (int64_t c = 0; c < p.channels; ++c) row[to + c * step] = 0;
        });
      else if (!in_place)
        for_each_tap([&](int64_t to, int64_t at) {
          for (int64_t c = 0; c < p.channels; ++c) row[to + c * step] = from[i][at + c];
        });
  }

  // The sums of active row j over all parts.
  const T* add_parts(int64_t j) const {
    T* total = sums + j * sums_row;
    for (int64_t i = 1; i < pixel_parts; ++i) {
      const T* more = total + i * p.k * sums_row;
      for (int64_t e = 0; e < sums_row; ++e) total[e] += more[e];
    }
    return total;
  }

  // Calls visit(offset in a row of dw, offset in a row of sums) for each tap.
  template <class Visit>
  void for_each_tap(Visit visit) const {
    const auto &to = p.dw_strides, &from = sums_strides;
    for (int64_t d = 0; d < p.kernel[D]; ++d)
      for (int64_t h = 0; h < p.kernel[H]; ++h)
        for (int64_t w = 0; w < p.kernel[W]; ++w)
          visit(d * to[2] + h * to[3] + w * to[4], d * from[2] + h * from[3] + w * from[4]);
  }

  const Kernels<T>& kernels;
  T* sums;            // [pixel_parts, k, sums_row], or dw
  double* bias_sums;  // [pixel_parts, k]
};

template <class T>
const Kernels<T>& kernels_of(Isa isa) {
#ifdef NEQ_X86
  if (isa == Isa::avx512) return avx512::kernels<T>();
  if (isa == Isa::avx2) return avx2::kernels<T>();
#endif
  return portable::kernels<T>();
}

}  // namespace

void conv_wgrad(const ConvWgrad& problem, Isa isa, int threads, int split_for) {
  if (problem.dtype == DType::float64)
    Gradient<double>(problem, kernels_of<double>(chosen(isa)), split_for).run(threads);
  else
    Gradient<float>(problem, kernels_of<float>(chosen(isa)), split_for).run(threads);
}

}  // namespace neq::cpu
