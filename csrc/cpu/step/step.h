#pragma once

#include <cstdint>
#include <vector>

#include "../../dtype.h"

namespace neq::cpu {

// A parameter [neurons, width] with its gradient and its optimizer's state, all contiguous, of one
// dtype and laid out alike. Only the rows named are read and written; each has to lie in [0,
// neurons), or std::invalid_argument is thrown before anything is written, and must be named once.
// Column-major is memory [width, neurons]: all of it is read, and other rows are written back as
// they were.
struct Parameter {
  void* param;
  const void* grad;
  void* momentum_buffer;  // SGD's; null without momentum
  void* exp_avg;          // AdamW's
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  int64_t neurons, width;
  bool is_column_major;
  const int64_t* rows;
  int64_t k;
  double step;  // AdamW's, this one included
};

struct SGD {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first;  // momentum buffers start as the gradient
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// One step, for DType::float32 or float64. The bits do not depend on the number of threads.
void sgd_rows(DType dtype, const std::vector<Parameter>& params, const SGD& options, int threads);
void adamw_rows(DType dtype, const std::vector<Parameter>& params, const AdamW& options,
                int threads);

}  // namespace neq::cpu
