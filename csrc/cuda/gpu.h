#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace neq::cuda {

// The calling thread's device, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : error(cudaGetDevice(&previous_)), device_(device) {
    if (error == cudaSuccess && device_ != previous_) error = cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  cudaError_t error;

 private:
  int previous_ = 0;
  int device_;
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
  if (how.shared > 48 << 10)  // which has to be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(how.shared));
  return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, arguments...) : error;
}

}  // namespace neq::cuda
