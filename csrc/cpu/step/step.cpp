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

// Which elements of a line are stepped.
template <class T>
struct All {
  T operator()(int64_t, T next, T) const { return next; }
};

// Those where all bits of `active` are set; where it is zero, none. Picked bit by bit: a condition
// would become a branch around the arithmetic, and no loop vectors.
template <class T>
struct Chosen {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Lane* active;
  T operator()(int64_t i, T next, T before) const {
    const Lane a = active[i];
    return std::bit_cast<T>((std::bit_cast<Lane>(next) & a) | (std::bit_cast<Lane>(before) & ~a));
  }
};

// Each kernel steps a line of `length` elements from `at` on. Its constants are copied to where no
// store can reach them: else no loop becomes vectors.

template <class Number>
struct SGDLine {
  using T = Number;
  T lr, momentum, undamped, weight_decay;
  bool nesterov, maximize, begin;

  SGDLine(const SGD& o, const Stepped&)
      : lr(T(o.lr)),
        momentum(T(o.momentum)),
        undamped(T(1 - o.dampening)),
        weight_decay(T(o.weight_decay)),
        nesterov(o.nesterov),
        maximize(o.maximize),
        begin(o.begin) {}

  template <class Pick>
  NEQ_INLINE void operator()(const Stepped& s, int64_t at, int64_t length, Pick pick) const {
    T* __restrict p = (T*)s.param + at;
    const T* __restrict grad = (const T*)s.grad + at;
    T* __restrict m = (T*)s.first + at;
    const T rate = lr, decay = weight_decay, sign = maximize ? T(-1) : T(1);
    if (!s.first) {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i)
        p[i] = pick(i, p[i] - rate * (sign * grad[i] + decay * p[i]), p[i]);
      return;
    }
    const T keep = begin ? T(0) : momentum, add = begin ? T(1) : undamped;
    // the step is along gradient * ahead + momentum * behind
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
  T beta1, beta2, rest1, rest2, eps, keep, rate, scale;  // rest: 1 - beta, rounded once
  bool maximize;

  AdamWLine(const AdamW& o, const Stepped& s)
      : beta1(T(o.beta1)),
        beta2(T(o.beta2)),
        rest1(T(1 - o.beta1)),
        rest2(T(1 - o.beta2)),
        eps(T(o.eps)),
        keep(T(1 - o.lr * o.weight_decay)),
        rate(T(o.lr / (1 - std::pow(o.beta1, s.count)))),
        scale(T(1 / std::sqrt(1 - std::pow(o.beta2, s.count)))),
        maximize(o.maximize) {}

  template <class Pick>
  NEQ_INLINE void operator()(const Stepped& s, int64_t at, int64_t length, Pick pick) const {
    T* __restrict p = (T*)s.param + at;
    const T* __restrict grad = (const T*)s.grad + at;
    T* __restrict m = (T*)s.first + at;
    T* __restrict v = (T*)s.second + at;
    T* __restrict largest = s.largest ? (T*)s.largest + at : nullptr;
    const T old1 = beta1, old2 = beta2, new1 = rest1, new2 = rest2;
    const T decayed = keep, step = rate, root = scale, floor = eps;
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
      T most = largest[i] > second || largest[i] != largest[i] ? largest[i] : second;
      m[i] = pick(i, first, m[i]);
      v[i] = pick(i, second, v[i]);
      largest[i] = pick(i, most, largest[i]);
      p[i] = pick(i, decayed * p[i] - step * first / (std::sqrt(most) * root + floor), p[i]);
    }
  }
};

template <class T>
using Active = const typename Chosen<T>::Lane*;

// active: of a transposed parameter, whose lines hold an element of each row; else null.
template <class Line>
NEQ_INLINE void step_lines(const Line& line, const Stepped& s, Active<typename Line::T> active,
                           int64_t begin, int64_t end) {
  using T = typename Line::T;
  for (int64_t j = begin; j < end; ++j)
    if (active)
      line(s, j * s.neurons, s.neurons, Chosen<T>{active});
    else
      line(s, s.rows[j] * s.width, s.width, All<T>{});
}

template <class Line>
void step_portable(const Line& line, const Stepped& s, Active<typename Line::T> active,
                   int64_t begin, int64_t end) {
  step_lines(line, s, active, begin, end);
}

#ifdef NEQ_X86
template <class Line>
__attribute__((target("avx2,fma"))) void step_avx2(const Line& line, const Stepped& s,
                                                   Active<typename Line::T> active, int64_t begin,
                                                   int64_t end) {
  step_lines(line, s, active, begin, end);
}

template <class Line>
__attribute__((target("avx512f,avx512vl,avx512dq,fma,prefer-vector-width=512"))) void step_avx512(
    const Line& line, const Stepped& s, Active<typename Line::T> active, int64_t begin,
    int64_t end) {
  step_lines(line, s, active, begin, end);
}
#endif

template <class Line>
using Kernel = void (*)(const Line&, const Stepped&, Active<typename Line::T>, int64_t, int64_t);

template <class Line>
Kernel<Line> kernel() {
#ifdef NEQ_X86
  static const Processor processor;
  if (processor.avx512) return step_avx512<Line>;
  if (processor.avx2) return step_avx2<Line>;
#endif
  return step_portable<Line>;
}

void check(const Stepped& s) {
  for (int64_t j = 0; j < s.k; ++j)
    if (s.rows[j] < 0 || s.rows[j] >= s.neurons)
      throw std::invalid_argument("rows must lie in [0, " + std::to_string(s.neurons) + "), got " +
                                  std::to_string(s.rows[j]));
}

template <class Line, class Options>
void step(const std::vector<Stepped>& all, const Options& options, int threads) {
  using T = typename Line::T;
  int64_t elements = 0;
  std::vector<std::vector<typename Chosen<T>::Lane>> active(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Stepped& s = all[i];
    check(s);
    elements += (s.transposed ? s.neurons : s.k) * s.width;
    if (!s.transposed) continue;
    active[i].resize(s.neurons);
    for (int64_t j = 0; j < s.k; ++j) active[i][s.rows[j]] = -1;
  }
  // Waking a thread costs microseconds: each should step 16 Ki elements at least.
  const int team = int(std::clamp<int64_t>(elements >> 14, 1, threads));
  const Kernel<Line> run = kernel<Line>();
#pragma omp parallel num_threads(team) if (team > 1)
  for (size_t i = 0; i < all.size(); ++i) {
    const Stepped& s = all[i];
    const Line line(options, s);
    const int64_t lines = s.transposed ? (s.k ? s.width : 0) : s.k;
    const int64_t length = s.transposed ? s.neurons : s.width;
    const int64_t piece = std::max<int64_t>(1, (int64_t(1) << 12) / std::max<int64_t>(length, 1));
#pragma omp for schedule(static) nowait
    for (int64_t begin = 0; begin < lines; begin += piece)
      run(line, s, s.transposed ? active[i].data() : nullptr, begin,
          std::min(lines, begin + piece));
  }
}

}  // namespace

void sgd_rows(DType dtype, const std::vector<Stepped>& all, const SGD& options, int threads) {
  if (dtype == DType::float32) return step<SGDLine<float>>(all, options, threads);
  if (dtype == DType::float64) return step<SGDLine<double>>(all, options, threads);
  throw std::invalid_argument("dtype must be float32 or float64");
}

void adamw_rows(DType dtype, const std::vector<Stepped>& all, const AdamW& options, int threads) {
  if (dtype == DType::float32) return step<AdamWLine<float>>(all, options, threads);
  if (dtype == DType::float64) return step<AdamWLine<double>>(all, options, threads);
  throw std::invalid_argument("dtype must be float32 or float64");
}

}  // namespace neq::cpu
