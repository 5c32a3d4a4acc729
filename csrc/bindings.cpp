#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/pack.h"
#include "cpu/step.h"
#ifdef NEQ_CUDA
#include "cuda/pack.h"
#endif

namespace py = pybind11;

namespace {

void require(bool ok, const char* argument, int64_t given, const std::string& allowed) {
  if (!ok)
    throw std::invalid_argument(std::string(argument) + " must be " + allowed + ", got " +
                                std::to_string(given));
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_pack(int64_t samples, int64_t neurons, int64_t stride, int64_t k) {
  require(samples >= 0, "samples", samples, "at least 0");
  require(neurons >= 0, "neurons", neurons, "at least 0");
  require(stride >= 0, "stride", stride, "at least 0");
  require(k >= 0 && k <= neurons, "k", k, "between 0 and neurons = " + std::to_string(neurons));
}

void cpu_pack_columns(neq::DType dtype, uintptr_t dy, int64_t samples, int64_t neurons,
                      int64_t stride, uintptr_t rows, int64_t k, uintptr_t packed, uintptr_t sums,
                      int threads) {
  check_pack(samples, neurons, stride, k);
  require(threads >= 1, "threads", threads, "at least 1");
  py::gil_scoped_release release;
  neq::cpu::pack_columns(dtype, pointer<const void>(dy), samples, neurons, stride,
                         pointer<const int64_t>(rows), k, pointer<void>(packed),
                         pointer<void>(sums), threads);
}

// One parameter: the addresses of it, its gradient, three states and its rows; neurons, width and k.
using Addresses = std::array<uintptr_t, 9>;

std::vector<neq::cpu::Stepped> stepped(const std::vector<Addresses>& all,
                                       const std::vector<double>& counts) {
  require(counts.empty() || counts.size() == all.size(), "counts", int64_t(counts.size()),
          "empty or one for each of " + std::to_string(all.size()) + " parameters");
  std::vector<neq::cpu::Stepped> result;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [param, grad, first, second, largest, rows, neurons, width, k] = all[i];
    require(k <= neurons, "k", int64_t(k), "at most neurons = " + std::to_string(neurons));
    result.push_back({pointer<void>(param), pointer<const void>(grad), pointer<void>(first),
                      pointer<void>(second), pointer<void>(largest), int64_t(neurons),
                      int64_t(width), pointer<const int64_t>(rows), int64_t(k),
                      counts.empty() ? 0 : counts[i]});
  }
  return result;
}

void cpu_sgd_rows(neq::DType dtype, const std::vector<Addresses>& all, double lr, double momentum,
                  double dampening, double weight_decay, bool nesterov, bool maximize, bool begin,
                  int threads) {
  require(threads >= 1, "threads", threads, "at least 1");
  const auto params = stepped(all, {});
  py::gil_scoped_release release;
  neq::cpu::sgd_rows(dtype, params,
                     {lr, momentum, dampening, weight_decay, nesterov, maximize, begin}, threads);
}

void cpu_adamw_rows(neq::DType dtype, const std::vector<Addresses>& all,
                    const std::vector<double>& counts, double lr, double beta1, double beta2,
                    double eps, double weight_decay, bool maximize, int threads) {
  require(threads >= 1, "threads", threads, "at least 1");
  const auto params = stepped(all, counts);
  py::gil_scoped_release release;
  neq::cpu::adamw_rows(dtype, params, {lr, beta1, beta2, eps, weight_decay, maximize}, threads);
}

#ifdef NEQ_CUDA
int64_t cuda_pack_scratch_bytes(neq::DType dtype, int64_t samples, int64_t k) {
  require(samples >= 0, "samples", samples, "at least 0");
  require(k >= 0, "k", k, "at least 0");
  return neq::cuda::pack_scratch_bytes(dtype, samples, k);
}

void cuda_pack_columns(neq::DType dtype, uintptr_t dy, int64_t samples, int64_t neurons,
                       int64_t stride, uintptr_t rows, int64_t k, uintptr_t packed, uintptr_t sums,
                       uintptr_t scratch, int device, uintptr_t stream) {
  check_pack(samples, neurons, stride, k);
  require(device >= 0, "device", device, "at least 0");
  const char* error = neq::cuda::pack_columns(
      dtype, pointer<const void>(dy), samples, stride, pointer<const int64_t>(rows), k,
      pointer<void>(packed), pointer<void>(sums), pointer<void>(scratch), device,
      pointer<void>(stream));
  if (error) throw std::runtime_error(std::string("pack_columns on CUDA: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::enum_<neq::DType>(m, "DType")
      .value("float32", neq::DType::float32)
      .value("float64", neq::DType::float64)
      .value("bfloat16", neq::DType::bfloat16)
      .value("float16", neq::DType::float16);
  m.def("cpu_pack_columns", &cpu_pack_columns, py::arg("dtype"), py::arg("dy"), py::arg("samples"),
        py::arg("neurons"), py::arg("stride"), py::arg("rows"), py::arg("k"), py::arg("packed"),
        py::arg("sums"), py::arg("threads"));
  m.def("cpu_sgd_rows", &cpu_sgd_rows, py::arg("dtype"), py::arg("all"), py::arg("lr"),
        py::arg("momentum"), py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"),
        py::arg("maximize"), py::arg("begin"), py::arg("threads"));
  m.def("cpu_adamw_rows", &cpu_adamw_rows, py::arg("dtype"), py::arg("all"), py::arg("counts"),
        py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
        py::arg("weight_decay"), py::arg("maximize"), py::arg("threads"));
#ifdef NEQ_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_pack_scratch_bytes", &cuda_pack_scratch_bytes, py::arg("dtype"), py::arg("samples"),
        py::arg("k"));
  m.def("cuda_pack_columns", &cuda_pack_columns, py::arg("dtype"), py::arg("dy"),
        py::arg("samples"), py::arg("neurons"), py::arg("stride"), py::arg("rows"), py::arg("k"),
        py::arg("packed"), py::arg("sums"), py::arg("scratch"), py::arg("device"),
        py::arg("stream"));
#else
  m.attr("has_cuda") = false;
#endif
}
