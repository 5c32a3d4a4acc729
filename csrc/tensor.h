#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtype.h"

// torch's tensors without torch's headers and libraries: one build serves every version.
// torch.Tensor has a table of C functions, DLPack's exchange API, one of which describes a tensor
// in place.

namespace neq {

namespace dlpack {

struct Version {
  uint32_t major, minor;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };
enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Tensor {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  void* previous;
  void* others[3];
  int (*describe)(void* object, Tensor* out);  // not 0 if it sets a Python error
};

}  // namespace dlpack

// An argument of a call, valid as long as the call lasts.
class Tensor {
 public:
  // Every module calls this once, before it is given a tensor.
  static void find_torch() {
    namespace py = pybind11;
    py::object type = py::module_::import("torch").attr("Tensor");
    const py::object table = type.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version.major != 1 || !api->describe)
      throw std::runtime_error("torch's DLPack exchange API must be of version 1");
    describe = api->describe;
    type_ = type.release().ptr();  // for as long as the process lasts
  }
  // torch's function; public, so that a test can stand in for torch.
  inline static int (*describe)(void* object, dlpack::Tensor* out) = nullptr;

  template <class T = void>
  T* data() const {
    char* const begin = static_cast<char*>(described_.data);
    return reinterpret_cast<T*>(begin + described_.byte_offset);
  }
  bool on_cpu() const { return described_.device_type == dlpack::kCpu; }
  bool on_cuda(int device) const {
    return described_.device_type == dlpack::kCuda && described_.device == device;
  }
  int dims() const { return described_.dims; }
  std::span<const int64_t> sizes() const { return {described_.sizes, size_t(dims())}; }
  std::span<const int64_t> strides() const { return {described_.strides, size_t(dims())}; }
  int64_t size(int dim) const { return described_.sizes[dim]; }
  int64_t stride(int dim) const { return described_.strides[dim]; }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes()) product *= size;
    return product;
  }
  int64_t bytes() const { return numel() * described_.dtype.bits / 8; }
  bool is_contiguous() const {
    int64_t adjacent = 1;
    for (int d = dims(); d-- > 0; adjacent *= size(d))
      if (size(d) != 1 && stride(d) != adjacent) return numel() == 0;
    return true;
  }
  // Is it dense, in whatever order of dimensions?
  bool fills_its_memory() const {
    std::vector<int> order;
    for (int d = 0; d < dims(); ++d)
      if (size(d) != 1) order.push_back(d);
    std::ranges::sort(order, {}, [&](int d) { return stride(d); });
    int64_t adjacent = 1;
    for (const int d : order) {
      if (stride(d) != adjacent) return false;
      adjacent *= size(d);
    }
    return true;
  }
  bool is_int64() const { return is(dlpack::kInt, 64); }
  // The value of a tensor of one element.
  double value() const {
    if (numel() != 1) throw std::invalid_argument("a tensor must have one value");
    if (is_int64()) return double(*data<const int64_t>());
    switch (dtype()) {
      case DType::float32: return *data<const float>();
      case DType::float64: return *data<const double>();
      default: throw std::invalid_argument("a single value must be of 32 or 64 bits");
    }
  }
  DType dtype() const {
    if (is(dlpack::kFloat, 32)) return DType::float32;
    if (is(dlpack::kFloat, 64)) return DType::float64;
    if (is(dlpack::kBfloat, 16)) return DType::bfloat16;
    if (is(dlpack::kFloat, 16)) return DType::float16;
    throw std::invalid_argument("a tensor must be of a floating-point dtype of 16 to 64 bits");
  }

 private:
  friend struct pybind11::detail::type_caster<Tensor>;
  bool is(dlpack::Code code, int bits) const {
    return described_.dtype.code == code && described_.dtype.bits == bits;
  }
  inline static PyObject* type_ = nullptr;
  dlpack::Tensor described_{};
};

}  // namespace neq

namespace pybind11::detail {

template <>
struct type_caster<neq::Tensor> {
  PYBIND11_TYPE_CASTER(neq::Tensor, const_name("Tensor"));

  bool load(handle source, bool) {
    auto* type = reinterpret_cast<PyTypeObject*>(neq::Tensor::type_);
    if (!PyObject_TypeCheck(source.ptr(), type)) return false;
    if (neq::Tensor::describe(source.ptr(), &value.described_) != 0) throw error_already_set();
    if (!value.data() && value.numel() > 0)  // a fake one, or its storage was freed
      throw std::invalid_argument("a tensor must have memory");
    return true;
  }
};

}  // namespace pybind11::detail
