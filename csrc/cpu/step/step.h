#pragma once

#include <cstdint>
#include <vector>

#include "../../dtype.h"

namespace neq::cpu {

// One parameter [neurons, width] with what its optimizer keeps, all of them contiguous and of one
// dtype. Only the rows named are read and written; each has to lie in [0, neurons), or
// std::invalid_argument is thrown before anything is written, and must be named once.
// `transposed` is for memory [width, neurons]: there all of it is read, and what belongs to other
// rows written back as it was.
struct Stepped {
  void* param;
  const void* grad;
  void* first;    // momentum, or Adam's first moment; null without momentum
  void* second;   // Adam's second moment
  void* largest;  // the largest second moment yet; null without amsgrad
  int64_t neurons, width;
  bool transposed;
  const int64_t* rows;
  int64_t k;
  double count;  // of Adam's steps, this one included
};

struct SGD {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool begin;  // the momentum starts with the gradient
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// One step, for DType::float32 or float64. The results do not depend on the number of threads.
void sgd_rows(DType dtype, const std::vector<Stepped>& all, const SGD& options, int threads);
void adamw_rows(DType dtype, const std::vector<Stepped>& all, const AdamW& options, int threads);

}  // namespace neq::cpu
