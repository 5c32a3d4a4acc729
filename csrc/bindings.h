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

[[noreturn]] inline void refuse(const char* argument, int64_t given, const std::string& allowed) {
  throw std::invalid_argument(std::string(argument) + " must be " + allowed + ", got " +
                              std::to_string(given));
}

// Prefer a literal for `allowed`: a std::string is made on every call, also where all is well.
template <class Text>
void require(bool ok, const char* argument, int64_t given, const Text& allowed) {
  if (!ok) refuse(argument, given, allowed);
}

inline void require(bool ok, const char* argument, const char* allowed) {
  if (!ok) throw std::invalid_argument(std::string(argument) + " must be " + allowed);
}

template <class... Tensors>
void require_cpu(const Tensors&... tensors) {
  require((tensors.on_cpu() && ...), "every tensor", "on the CPU");
}

template <class... Tensors>
void require_cuda(int device, const Tensors&... tensors) {
  require(device >= 0, "device", device, "at least 0");
  if (!(tensors.on_cuda(device) && ...))
    throw std::invalid_argument("every tensor must be on cuda:" + std::to_string(device));
}

inline void require_threads(int threads) {
  require(threads >= 1, "threads", threads, "at least 1");
}

inline void require_indices(const Tensor& t, const char* argument) {
  require(t.is_int64() && t.dims() == 1 && t.is_contiguous(), argument,
          "contiguous int64 of one dimension");
}

// order [neurons]: a permutation of all neurons, the k active ones first.
inline void require_order(const Tensor& order, int64_t neurons) {
  require_indices(order, "order");
  if (order.size(0) != neurons)
    refuse("size of order", order.size(0), "neurons = " + std::to_string(neurons));
}

inline void require_between(const char* argument, int64_t given, int64_t least, int64_t neurons) {
  if (given < least || given > neurons)
    refuse(argument, given,
           "between " + std::to_string(least) + " and neurons = " + std::to_string(neurons));
}

// Each adds the functions of one family to the module; in bindings_<family>.cpp.
void bind_wgrad(pybind11::module_& m);
void bind_similarity(pybind11::module_& m);
void bind_step(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace neq
