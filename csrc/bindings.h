#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

namespace neq {

using Ints = std::vector<int64_t>;

inline void require(bool ok, const char* argument, int64_t given, const std::string& allowed) {
  if (!ok)
    throw std::invalid_argument(std::string(argument) + " must be " + allowed + ", got " +
                                std::to_string(given));
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void check_pack(int64_t samples, int64_t neurons, int64_t stride, int64_t k) {
  require(samples >= 0, "samples", samples, "at least 0");
  require(neurons >= 0, "neurons", neurons, "at least 0");
  require(stride >= 0, "stride", stride, "at least 0");
  require(k >= 0 && k <= neurons, "k", k, "between 0 and neurons = " + std::to_string(neurons));
}

// A convolution of dy [images, neurons, pixels], x [images, groups * channels, pixels] and dw [neurons,
// channels, kernel], in one to three spatial dimensions.
inline void check_conv(const Ints& dy_size, const Ints& dy_strides, const Ints& x_size,
                       const Ints& x_strides, const Ints& dw_size, const Ints& dw_strides,
                       const Ints& stride, const Ints& padding, const Ints& dilation,
                       int64_t groups) {
  for (const Ints* sizes : {&dy_size, &dy_strides, &x_size, &x_strides, &dw_size, &dw_strides})
    require(sizes->size() == stride.size() + 2, "dimensions", int64_t(sizes->size()),
            std::to_string(stride.size() + 2));
  for (const Ints* sizes : {&stride, &padding, &dilation})
    require(sizes->size() >= 1 && sizes->size() <= 3 && sizes->size() == stride.size(),
            "spatial dimensions", int64_t(sizes->size()), "1, 2 or 3, and equal");
  for (const Ints* sizes : {&dy_size, &x_size, &dw_size, &stride, &dilation})
    for (const int64_t size : *sizes) require(size >= 1, "a size or stride", size, "at least 1");
  for (const int64_t size : padding) require(size >= 0, "padding", size, "at least 0");
  const int64_t neurons = dy_size[1];
  require(dw_size[0] == neurons, "neurons of dw", dw_size[0], std::to_string(neurons));
  require(x_size[0] == dy_size[0], "samples of x", x_size[0], std::to_string(dy_size[0]));
  require(groups >= 1 && neurons % groups == 0 && x_size[1] == groups * dw_size[1], "groups",
          groups, "a divisor of neurons that makes x's channels groups times dw's");
  for (size_t i = 0; i < stride.size(); ++i) {
    const int64_t reach = (dy_size[i + 2] - 1) * stride[i] + (dw_size[i + 2] - 1) * dilation[i];
    require(reach < x_size[i + 2] + 2 * padding[i], "reach of the kernel", reach,
            "within the padded input");
  }
}

// What of this module runs on GPUs; in bindings_cuda.cpp.
void bind_cuda(pybind11::module_& m);

}  // namespace neq
