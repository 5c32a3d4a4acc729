// The CUDA bindings as nvcc builds them, but on the recording runtime (recording_cuda.cpp), and
// with tensors on the CPU that are described as on a GPU.

#include "../../csrc/bindings_cuda.cpp"
#include "placed_tensors.h"

PYBIND11_MODULE(recorded_bindings, m) {
  placed::bind(m);
  neq::bind_cuda(m);
}
