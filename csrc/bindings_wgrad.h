#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"

// What the bindings of weight gradients check on CPUs and GPUs alike.

namespace neq {

inline DType sum_dtype(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

// db, with as many entries as dw has rows, of the dtype of the sums; or empty if it is not wanted:
// then null.
inline void* bias_gradient(const Tensor& db, DType dtype, int64_t rows) {
  if (db.numel() == 0) return nullptr;
  require(db.dims() == 1 && db.size(0) == rows && db.is_contiguous(), "db",
          "empty, or one for each row of dw");
  require(db.dtype() == dtype, "db", "of the dtype of the sums");
  return db.data();
}

// dy [samples, neurons] with adjacent columns, rows [k], packed [samples, k], and optional
// sums [k].
inline void check_pack(const Tensor& dy, const Tensor& rows, const Tensor& packed,
                       const std::optional<Tensor>& sums) {
  require(dy.dims() == 2, "dimensions of dy", dy.dims(), "2");
  require(dy.stride(1) == 1 && dy.stride(0) >= 0, "neurons of dy", "adjacent in memory");
  require_indices(rows, "rows");
  const int64_t k = rows.size(0), neurons = dy.size(1);
  require_between("k", k, 0, neurons);
  require(packed.dims() == 2 && packed.size(0) == dy.size(0) && packed.size(1) == k &&
              packed.dtype() == dy.dtype() && packed.is_contiguous(),
          "packed", "contiguous, a sample of dy's dtype and k columns for each of dy's");
  require(!sums || (sums->dims() == 1 && sums->size(0) == k && sums->is_contiguous() &&
                    sums->dtype() == sum_dtype(dy.dtype())),
          "sums", "contiguous, one for each of k columns, of the dtype of sums");
}

constexpr int64_t kMaxStep = 1 << 24;  // its product with any size fits into an int64

// A convolution of dy [images, neurons, pixels], x [images, groups * channels, pixels] and dw
// [rows, channels, kernel], in one to three spatial dimensions.
inline void check_conv(const Tensor& dy, const Tensor& x, const Tensor& dw, const Ints& stride,
                       const Ints& padding, const Ints& dilation, int64_t groups) {
  for (const Tensor* tensor : {&dy, &x, &dw})
    require(tensor->dims() == int64_t(stride.size()) + 2, "dimensions", tensor->dims(),
            std::to_string(stride.size() + 2));
  for (const Ints* sizes : {&stride, &padding, &dilation})
    require(sizes->size() >= 1 && sizes->size() <= 3 && sizes->size() == stride.size(),
            "spatial dimensions", int64_t(sizes->size()), "1, 2 or 3, and equal");
  for (const Tensor* tensor : {&dy, &x, &dw})
    for (const int64_t size : tensor->sizes()) require(size >= 1, "a size", size, "at least 1");
  for (const Ints* sizes : {&stride, &dilation})
    for (const int64_t size : *sizes) require(size >= 1, "a stride", size, "at least 1");
  for (const int64_t size : padding) require(size >= 0, "padding", size, "at least 0");
  for (const Ints* sizes : {&stride, &padding, &dilation})
    for (const int64_t size : *sizes)
      require(size < kMaxStep, "stride, padding or dilation", size,
              "below " + std::to_string(kMaxStep));
  const int64_t neurons = dy.size(1);
  require(x.dtype() == dy.dtype(), "x", "of dy's dtype");
  require(x.size(0) == dy.size(0), "samples of x", x.size(0), std::to_string(dy.size(0)));
  require(groups >= 1 && neurons % groups == 0 && x.size(1) == groups * dw.size(1), "groups",
          groups, "a divisor of neurons that makes x's channels groups times dw's");
  for (size_t i = 0; i < stride.size(); ++i) {
    const int d = int(i) + 2;
    const int64_t reach = (dy.size(d) - 1) * stride[i] + (dw.size(d) - 1) * dilation[i];
    require(reach < x.size(d) + 2 * padding[i], "reach of the kernel", reach,
            "within the padded input");
  }
}

}  // namespace neq
