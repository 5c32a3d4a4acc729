#include "step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../processor.h"

namespace neq::cpu {
namespace {

// Which elements of a line are stepped: all of them.
template <class T>
struct All {
  T operator()(int64_t, T next, T) const { return next; }
};

// Those whose mask has all bits set; in the others it has none. Selected by bits: a condition would
// become a branch, and the loop would not vectorize.
template <class T>
struct Masked {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Lane* masks;
  T operator()(int64_t i, T next, T before) const {
    const Lane mask = masks[i];
    return std::bit_cast<T>((std::bit_cast<Lane>(next) & mask) |
                            (std::bit_cast<Lane>(before) & ~mask));
  }
};

// A kernel steps a line of `length` elements from `at` on. It copies its constants to local
// variables, which no store can alias: else the loop would not vectorize.

template <class Number>
struct SGDLine {
  using T = Number;
  T lr, momentum, undamped, weight_decay;
  bool nesterov, maximize, first;

  SGDLine(const SGD& o, const Parameter&)
      : lr(T(o.lr)),
        momentum(T(o.momentum)),
        undamped(T(1 - o.dampening)),
        weight_decay(T(o.weight_decay)),
        nesterov(o.nesterov),
        maximize(o.maximize),
        first(o.first) {}

  template <class Pick>
  NEQ_INLINE void operator()(const Parameter& s, int64_t at, int64_t length, Pick pick) const {
    T* __restrict p = (T*)s.param + at;
    const T* __restrict grad = (const T*)s.grad + at;
    T* __restrict m = (T*)s.momentum_buffer + at;
    const T rate = lr, decay = weight_decay, sign = maximize ? T(-1) : T(1);
    if (!s.momentum_buffer) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i)
        p[i] = pick(i, p[i] - rate * (sign * grad[i] + decay * p[i]), p[i]);
      return;
    }
    const T keep = first ? T(0) : momentum, add = first ? T(1) : undamped;
    // the direction is gradient * ahead + momentum buffer * behind
    const T ahead = nesterov ? T(1) : T(0), behind = nesterov ? momentum : T(1);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      T g = sign * grad[i] + decay * p[i];
      T next = keep * m[i] + add * g;
      m[i] = pick(i, next, m[i]);
      p[i] = pick(i, p[i] - rate * (ahead * g + behind * next), p[i]);
    }
  }
};

template <class Number>
struct AdamWLine {
  using T = Number;
  T beta1, beta2, one_minus_beta1, one_minus_beta2;
  T eps, decay, rate, scale;
  bool maximize;

  AdamWLine(const AdamW& o, const Parameter& s)
      : beta1(T(o.beta1)),
        beta2(T(o.beta2)),
        one_minus_beta1(T(1 - o.beta1)),
        one_minus_beta2(T(1 - o.beta2)),
        eps(T(o.eps)),
        decay(T(1 - o.lr * o.weight_decay)),
        rate(T(o.lr / (1 - std::pow(o.beta1, s.step)))),
        scale(T(1 / std::sqrt(1 - std::pow(o.beta2, s.step)))),
        maximize(o.maximize) {}

  template <class Pick>
  NEQ_INLINE void operator()(const Parameter& s, int64_t at, int64_t length, Pick pick) const {
    T* __restrict p = (T*)s.param + at;
    const T* __restrict grad = (const T*)s.grad + at;
    T* __restrict m = (T*)s.exp_avg + at;
    T* __restrict v = (T*)s.exp_avg_sq + at;
    T* __restrict largest = s.max_exp_avg_sq ? (T*)s.max_exp_avg_sq + at : nullptr;
    const T old1 = beta1, old2 = beta2, new1 = one_minus_beta1, new2 = one_minus_beta2;
    const T decayed = decay, step = rate, root = scale, floor = eps;
    const T sign = maximize ? T(-1) : T(1);
    if (!largest) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        T g = sign * grad[i], first = old1 * m[i] + new1 * g, second = old2 * v[i] + new2 * g * g;
        m[i] = pick(i, first, m[i]);
        v[i] = pick(i, second, v[i]);
        p[i] = pick(i, decayed * p[i] - step * first / (std::sqrt(second) * root + floor), p[i]);
      }
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      T g = sign * grad[i], first = old1 * m[i] + new1 * g, second = old2 * v[i] + new2 * g * g;
      T greater = largest[i] > second || largest[i] != largest[i] ? largest[i] : second;
      m[i] = pick(i, first, m[i]);
      v[i] = pick(i, second, v[i]);
      largest[i] = pick(i, greater, largest[i]);
      p[i] = pick(i, decayed * p[i] - step * first / (std::sqrt(greater) * root + floor), p[i]);
    }
  }
};

template <class T>
using Masks = const typename Masked<T>::Lane*;

// Steps lines [begin, end): active rows, or if there are masks [neurons] the columns of a
// column-major parameter.
template <class Line>
NEQ_INLINE void step_lines(const Line& line, const Parameter& s, Masks<typename Line::T> masks,
                           int64_t begin, int64_t end) {
  using T = typename Line::T;
  for (int64_t j = begin; j < end; ++j)
    if (masks)
      line(s, j * s.neurons, s.neurons, Masked<T>{masks});
    else
      line(s, s.rows[j] * s.width, s.width, All<T>{});
}

template <class Line>
void step_portable(const Line& line, const Parameter& s, Masks<typename Line::T> masks,
                   int64_t begin, int64_t end) {
  step_lines(line, s, masks, begin, end);
}

#ifdef NEQ_X86
template <class Line>
NEQ_TARGET(NEQ_AVX2)
void step_avx2(const Line& line, const Parameter& s, Masks<typename Line::T> masks, int64_t begin,
               int64_t end) {
  step_lines(line, s, masks, begin, end);
}

template <class Line>
NEQ_TARGET_WHOLE_VECTORS(NEQ_AVX512)
void step_avx512(const Line& line, const Parameter& s, Masks<typename Line::T> masks, int64_t begin,
                 int64_t end) {
  step_lines(line, s, masks, begin, end);
}
#endif

template <class Line>
using Kernel = void (*)(const Line&, const Parameter&, Masks<typename Line::T>, int64_t, int64_t);

template <class Line>
Kernel<Line> kernel() {
#ifdef NEQ_X86
  const Isa best = best_isa();
  if (best == Isa::avx512) return step_avx512<Line>;
  if (best == Isa::avx2) return step_avx2<Line>;
#endif
  return step_portable<Line>;
}

void check(const Parameter& s) {
  for (int64_t j = 0; j < s.k; ++j)
    if (s.rows[j] < 0 || s.rows[j] >= s.neurons)
      throw std::invalid_argument("rows must lie in [0, " + std::to_string(s.neurons) + "), got " +
                                  std::to_string(s.rows[j]));
}

template <class Line, class Options>
void step(const std::vector<Parameter>& params, const Options& options, int threads) {
  using T = typename Line::T;
  int64_t elements = 0;
  std::vector<std::vector<typename Masked<T>::Lane>> masks(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Parameter& s = params[i];
    check(s);
    elements += (s.is_column_major ? s.neurons : s.k) * s.width;
    if (!s.is_column_major) continue;
    masks[i].resize(s.neurons);
    for (int64_t j = 0; j < s.k; ++j) masks[i][s.rows[j]] = -1;
  }
  // Waking a thread costs microseconds: each should step at least 16 Ki elements.
  const int team = int(std::clamp<int64_t>(elements >> 14, 1, threads));
  const Kernel<Line> run = kernel<Line>();
#pragma omp parallel num_threads(team) if (team > 1)
  for (size_t i = 0; i < params.size(); ++i) {
    const Parameter& s = params[i];
    const Line line(options, s);
    const int64_t lines = s.is_column_major ? (s.k ? s.width : 0) : s.k;
    const int64_t length = s.is_column_major ? s.neurons : s.width;
    const int64_t piece = std::max<int64_t>(1, (int64_t(1) << 12) / std::max<int64_t>(length, 1));
#pragma omp for schedule(static) nowait
    for (int64_t begin = 0; begin < lines; begin += piece)
      run(line, s, s.is_column_major ? masks[i].data() : nullptr, begin,
          std::min(lines, begin + piece));
  }
}

}  // namespace

void sgd_rows(DType dtype, const std::vector<Parameter>& params, const SGD& options, int threads) {
  if (dtype == DType::float32) return step<SGDLine<float>>(params, options, threads);
  if (dtype == DType::float64) return step<SGDLine<double>>(params, options, threads);
  throw std::invalid_argument("dtype must be float32 or float64");
}

void adamw_rows(DType dtype, const std::vector<Parameter>& params, const AdamW& options,
                int threads) {
  if (dtype == DType::float32) return step<AdamWLine<float>>(params, options, threads);
  if (dtype == DType::float64) return step<AdamWLine<double>>(params, options, threads);
  throw std::invalid_argument("dtype must be float32 or float64");
}

}  // namespace neq::cpu
