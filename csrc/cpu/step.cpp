#include "step.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "processor.h"

#define NEQ_INLINE inline __attribute__((always_inline))

namespace neq::cpu {
namespace {

// Each kernel steps one row. The step is bound by memory, so 256-bit vectors are wide enough.

template <class T>
struct SGDRow {
  T lr, momentum, undamped, weight_decay;
  bool nesterov, maximize, begin;

  SGDRow(const SGD& o, const Stepped&)
      : lr(T(o.lr)),
        momentum(T(o.momentum)),
        undamped(T(1 - o.dampening)),
        weight_decay(T(o.weight_decay)),
        nesterov(o.nesterov),
        maximize(o.maximize),
        begin(o.begin) {}

  NEQ_INLINE void operator()(const Stepped& s, int64_t at) const {
    T* __restrict p = (T*)s.param + at;
    const T* __restrict grad = (const T*)s.grad + at;
    T* __restrict m = (T*)s.first + at;
    const bool has_momentum = s.first;
    const T sign = maximize ? T(-1) : T(1);
    const T keep = begin ? T(0) : momentum, add = begin ? T(1) : undamped;
    if (!has_momentum) {
#pragma omp simd
      for (int64_t i = 0; i < s.width; ++i) p[i] -= lr * (sign * grad[i] + weight_decay * p[i]);
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < s.width; ++i) {
      T g = sign * grad[i] + weight_decay * p[i];
      T next = keep * m[i] + add * g;
      m[i] = next;
      p[i] -= lr * (nesterov ? g + momentum * next : next);
    }
  }
};

template <class T>
struct AdamWRow {
  T beta1, beta2, eps, keep, rate, scale;
  bool maximize;

  AdamWRow(const AdamW& o, const Stepped& s)
      : beta1(T(o.beta1)),
        beta2(T(o.beta2)),
        eps(T(o.eps)),
        keep(T(1 - o.lr * o.weight_decay)),
        rate(T(o.lr / (1 - std::pow(o.beta1, s.count)))),
        scale(T(1 / std::sqrt(1 - std::pow(o.beta2, s.count)))),
        maximize(o.maximize) {}

  NEQ_INLINE void operator()(const Stepped& s, int64_t at) const {
    T* __restrict p = (T*)s.param + at;
    const T* __restrict grad = (const T*)s.grad + at;
    T* __restrict m = (T*)s.first + at;
    T* __restrict v = (T*)s.second + at;
    T* __restrict largest = s.largest ? (T*)s.largest + at : nullptr;
    const T sign = maximize ? T(-1) : T(1);
    const T new1 = 1 - beta1, new2 = 1 - beta2;
    if (!largest) {
#pragma omp simd
      for (int64_t i = 0; i < s.width; ++i) {
        T g = sign * grad[i];
        m[i] = beta1 * m[i] + new1 * g;
        v[i] = beta2 * v[i] + new2 * g * g;
        p[i] = keep * p[i] - rate * m[i] / (std::sqrt(v[i]) * scale + eps);
      }
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < s.width; ++i) {
      T g = sign * grad[i];
      m[i] = beta1 * m[i] + new1 * g;
      v[i] = beta2 * v[i] + new2 * g * g;
      largest[i] = std::max(largest[i], v[i]);
      p[i] = keep * p[i] - rate * m[i] / (std::sqrt(largest[i]) * scale + eps);
    }
  }
};

template <class Row>
NEQ_INLINE void step_rows(const Row& row, const Stepped& s, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) row(s, s.rows[j] * s.width);
}

template <class Row>
void step_portable(const Row& row, const Stepped& s, int64_t begin, int64_t end) {
  step_rows(row, s, begin, end);
}

#ifdef NEQ_X86
template <class Row>
__attribute__((target("avx2,fma"))) void step_avx2(const Row& row, const Stepped& s, int64_t begin,
                                                   int64_t end) {
  step_rows(row, s, begin, end);
}
#endif

template <class Row>
using Kernel = void (*)(const Row&, const Stepped&, int64_t, int64_t);

template <class Row>
Kernel<Row> kernel() {
#ifdef NEQ_X86
  static const Processor processor;
  if (processor.avx2) return step_avx2<Row>;
#endif
  return step_portable<Row>;
}

void check(const Stepped& s) {
  for (int64_t j = 0; j < s.k; ++j)
    if (s.rows[j] < 0 || s.rows[j] >= s.neurons)
      throw std::invalid_argument("rows must lie in [0, " + std::to_string(s.neurons) + "), got " +
                                  std::to_string(s.rows[j]));
}

template <class Row, class Options>
void step(const std::vector<Stepped>& all, const Options& options, int threads) {
  int64_t elements = 0;
  for (const Stepped& s : all) {
    check(s);
    elements += s.k * s.width;
  }
  // Waking a thread costs microseconds: each should step 16 Ki elements at least.
  const int team = int(std::clamp<int64_t>(elements >> 14, 1, threads));
  const Kernel<Row> run = kernel<Row>();
#pragma omp parallel num_threads(team) if (team > 1)
  for (const Stepped& s : all) {
    const Row row(options, s);
    const int64_t piece = std::max<int64_t>(1, (int64_t(1) << 12) / std::max<int64_t>(s.width, 1));
#pragma omp for schedule(static) nowait
    for (int64_t begin = 0; begin < s.k; begin += piece)
      run(row, s, begin, std::min(s.k, begin + piece));
  }
}

}  // namespace

void sgd_rows(DType dtype, const std::vector<Stepped>& all, const SGD& options, int threads) {
  if (dtype == DType::float32) return step<SGDRow<float>>(all, options, threads);
  if (dtype == DType::float64) return step<SGDRow<double>>(all, options, threads);
  throw std::invalid_argument("dtype must be float32 or float64");
}

void adamw_rows(DType dtype, const std::vector<Stepped>& all, const AdamW& options, int threads) {
  if (dtype == DType::float32) return step<AdamWRow<float>>(all, options, threads);
  if (dtype == DType::float64) return step<AdamWRow<double>>(all, options, threads);
  throw std::invalid_argument("dtype must be float32 or float64");
}

}  // namespace neq::cpu
