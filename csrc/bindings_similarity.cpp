#include <algorithm>
#include <array>

#include "bindings.h"
#include "cpu/similarity/row_similarity.h"

namespace py = pybind11;

namespace neq {
namespace {

void cpu_row_similarity(const Tensor& y, const Tensor& y_, const Tensor& out, cpu::Isa isa,
                        int threads) {
  require_cpu(y, y_, out);
  require(y.dims() == 4 && std::ranges::equal(y.sizes(), y_.sizes()), "both outputs",
          "of one size, with 4 dimensions");
  std::array<int64_t, 4> sizes;
  std::ranges::copy(y.sizes(), sizes.begin());
  require(out.dims() == 3 && out.size(0) == 3 && out.size(1) == sizes[0] &&
              out.size(2) == sizes[2] && out.dtype() == DType::float64 && out.is_contiguous(),
          "out", "contiguous float64 [3, samples, neurons]");
  const int inner = sizes[3] > 1 ? 3 : 2;
  const bool any_stride = sizes[inner] < 2 || y.numel() == 0;
  const auto output = [&](const Tensor& t) {
    require(any_stride || t.stride(inner) == 1, "innermost stride", t.stride(inner), "1");
    cpu::Output output{t.dtype(), t.data(), {}};
    std::ranges::copy(t.strides(), output.strides.begin());
    return output;
  };
  const auto first = output(y), second = output(y_);
  require(cpu::has_isa(isa), "isa", int64_t(isa), "one that this processor has");
  require_threads(threads);
  py::gil_scoped_release release;
  cpu::row_similarity(first, second, sizes, out.data<double>(), isa, threads);
}

}  // namespace

void bind_similarity(py::module_& m) {
  m.def("cpu_row_similarity", &cpu_row_similarity, py::arg("y"), py::arg("y_"), py::arg("out"),
        py::arg("isa"), py::arg("threads"));
}

}  // namespace neq
