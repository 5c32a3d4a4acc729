#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace neq::cuda {

// Makes `device` the calling thread's, and gives it back the one it had.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&previous_);
    if (error != cudaSuccess || device == previous_) return;
    error = cudaSetDevice(device);
    changed_ = error == cudaSuccess;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t error;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct Launch {
  dim3 grid, block;
  size_t shared;  // bytes of shared_memory()
  cudaStream_t stream;
};

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how,
                   const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  cudaError_t error = cudaSuccess;
  if (how.shared > 48 << 10)  // beyond which it has to be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared));
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, arguments...) : error;
}

}  // namespace neq::cuda
