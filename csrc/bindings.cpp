#include "bindings.h"

#include "cpu/processor.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  neq::Tensor::find_torch();
  py::enum_<neq::cpu::Isa>(m, "Isa")
      .value("best", neq::cpu::Isa::best)
      .value("avx512", neq::cpu::Isa::avx512)
      .value("avx2", neq::cpu::Isa::avx2)
      .value("portable", neq::cpu::Isa::portable);
  m.def("cpu_has_isa", &neq::cpu::has_isa, py::arg("isa"));
  neq::bind_wgrad(m);
  neq::bind_similarity(m);
  neq::bind_step(m);
#ifdef NEQ_CUDA
  neq::bind_cuda(m);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
