#include "row_similarity.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "../processor.h"

namespace neq::cpu {
namespace {

// The elements of a part, and the most parts.
constexpr int64_t kPart = 1 << 14;
constexpr int64_t kMaxParts = 64;
// The least positions of a part: its sums should be few, compared with what it reads.
constexpr int64_t kPositions = 64;
// The rows that are added up in registers before the sums in memory.
constexpr int64_t kRows = 8;

// `rows` rows of two outputs, `step` and `step_` elements apart, and where their sums go.
struct Rows {
  const void *y, *y_;
  int64_t rows, step, step_;
  int64_t neurons, neuron, neuron_;  // their number, and their strides
  int64_t after;                     // adjacent positions of a neuron
  double *dot, *square, *square_;    // [neurons]
};

template <class A, class B, int64_t Count>
NEQ_INLINE void add_columns(const Rows& r, int64_t row) {
  const auto* __restrict y = (const typename A::Bits*)r.y + row * r.step;
  const auto* __restrict y_ = (const typename B::Bits*)r.y_ + row * r.step_;
  double* __restrict dot = r.dot;
  double* __restrict square = r.square;
  double* __restrict square_ = r.square_;
  const int64_t neurons = r.neurons, step = r.step, step_ = r.step_;
#pragma omp simd
  for (int64_t i = 0; i < neurons; ++i) {
    double sum = 0, sum_a = 0, sum_b = 0;
#pragma GCC unroll 8
    for (int64_t j = 0; j < Count; ++j) {
      const double a = A::value(y[j * step + i]), b = B::value(y_[j * step_ + i]);
      sum += a * b;
      sum_a += a * a;
      sum_b += b * b;
    }
    dot[i] += sum;
    square[i] += sum_a;
    square_[i] += sum_b;
  }
}

template <class A, class B>
NEQ_INLINE void add_positions(const Rows& r, int64_t row) {
  for (int64_t i = 0; i < r.neurons; ++i) {
    const auto* y = (const typename A::Bits*)r.y + row * r.step + i * r.neuron;
    const auto* y_ = (const typename B::Bits*)r.y_ + row * r.step_ + i * r.neuron_;
    double sum = 0, sum_a = 0, sum_b = 0;
    const int64_t after = r.after;
#pragma omp simd reduction(+ : sum, sum_a, sum_b)
    for (int64_t j = 0; j < after; ++j) {
      const double a = A::value(y[j]), b = B::value(y_[j]);
      sum += a * b;
      sum_a += a * a;
      sum_b += b * b;
    }
    r.dot[i] += sum;
    r.square[i] += sum_a;
    r.square_[i] += sum_b;
  }
}

template <class A, class B>
NEQ_INLINE void add_rows(const Rows& r) {
  int64_t row = 0;
  if (r.after > 1) {
    for (; row < r.rows; ++row) add_positions<A, B>(r, row);
  } else {
    for (; row + kRows <= r.rows; row += kRows) add_columns<A, B, kRows>(r, row);
    for (; row < r.rows; ++row) add_columns<A, B, 1>(r, row);
  }
}

using Kernel = void (*)(const Rows&);

template <class A, class B>
void add_portable(const Rows& r) {
  add_rows<A, B>(r);
}

#ifdef NEQ_X86
template <class A, class B>
NEQ_TARGET(NEQ_AVX2)
void add_avx2(const Rows& r) {
  add_rows<A, B>(r);
}

template <class A, class B>
NEQ_TARGET_WHOLE_VECTORS(NEQ_AVX512)
void add_avx512(const Rows& r) {
  add_rows<A, B>(r);
}
#endif

template <class A, class B>
Kernel kernel(Isa isa) {
#ifdef NEQ_X86
  if (isa == Isa::avx512) return add_avx512<A, B>;
  if (isa == Isa::avx2) return add_avx2<A, B>;
#endif
  return add_portable<A, B>;
}

template <class A>
Kernel kernel(DType dtype, Isa isa) {
  return dtype == DType::float32    ? kernel<A, Float>(isa)
         : dtype == DType::float64  ? kernel<A, Double>(isa)
         : dtype == DType::bfloat16 ? kernel<A, BFloat16>(isa)
                                    : kernel<A, Half>(isa);
}

Kernel kernel(DType a, DType b, Isa isa) {
  return a == DType::float32    ? kernel<Float>(b, isa)
         : a == DType::float64  ? kernel<Double>(b, isa)
         : a == DType::bfloat16 ? kernel<BFloat16>(b, isa)
                                : kernel<Half>(b, isa);
}

}  // namespace

void row_similarity(const Output& y, const Output& y_, const std::array<int64_t, 4>& sizes,
                    double* out, Isa isa, int threads) {
  const auto [samples, before, neurons, after] = sizes;
  const Kernel add = kernel(y.dtype, y_.dtype, chosen(isa));
  std::fill(out, out + 3 * samples * neurons, 0.0);
  if (samples * before * neurons * after == 0) return;

  // Splits each sample by its rows, and if these are few or short, by its neurons.
  const int64_t wanted =
      std::clamp<int64_t>(before * neurons * after / kPart, 1, ceil_div(kMaxParts, samples));
  const int64_t row_parts =
      std::clamp<int64_t>(before * after / kPositions, 1, std::min(wanted, before));
  const int64_t neuron_parts =
      std::min(ceil_div(wanted, row_parts), after > 1 ? neurons : ceil_div(neurons, kPositions));
  const int64_t sums = samples * neurons;
  // The sums of all row parts but the first, which sums into `out`.
  std::vector<double> partial((row_parts - 1) * 3 * sums);
  const int64_t parts = samples * row_parts * neuron_parts;
  const int team = int(std::min<int64_t>(threads, parts));
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t sample = i / (row_parts * neuron_parts);
      const int64_t row_part = i / neuron_parts % row_parts, neuron_part = i % neuron_parts;
      const int64_t row = before * row_part / row_parts;
      const int64_t first = neurons * neuron_part / neuron_parts;
      const auto at = [&](const Output& o) {
        const int64_t offset = sample * o.strides[0] + row * o.strides[1] + first * o.strides[2];
        return static_cast<const char*>(o.data) + offset * bytes_of(o.dtype);
      };
      double* to = (row_part ? partial.data() + (row_part - 1) * 3 * sums : out) +
                   sample * neurons + first;
      add({at(y), at(y_), before * (row_part + 1) / row_parts - row, y.strides[1], y_.strides[1],
           neurons * (neuron_part + 1) / neuron_parts - first, y.strides[2], y_.strides[2], after,
           to, to + sums, to + 2 * sums});
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 3 * sums; ++i)
      for (int64_t part = 0; part < row_parts - 1; ++part) out[i] += partial[part * 3 * sums + i];
  }
}

}  // namespace neq::cpu
