#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor.h"

namespace neq {

using Ints = std::vector<int64_t>;

inline void require(bool ok, const char* argument, int64_t given, const std::string& allowed) {
  if (!ok)
    throw std::invalid_argument(std::string(argument) + " must be " + allowed + ", got " +
                                std::to_string(given));
}

inline void require(bool ok, const char* argument, const char* allowed) {
  if (!ok) throw std::invalid_argument(std::string(argument) + " must be " + allowed);
}

template <class... Tensors>
void require_cpu(const Tensors&... tensors) {
  require((tensors.on_cpu() && ...), "every tensor", "on the CPU");
}

inline void require_threads(int threads) {
  require(threads >= 1, "threads", threads, "at least 1");
}

inline void require_indices(const Tensor& rows) {
  require(rows.is_int64() && rows.dims() == 1 && rows.is_contiguous(), "rows",
          "contiguous int64 of one dimension");
}

// Each defines the functions of one family, in the file of its name.
void bind_wgrad(pybind11::module_& m);
void bind_similarity(pybind11::module_& m);
void bind_step(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace neq
