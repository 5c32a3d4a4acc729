// A CUDA driver that runs nothing and records every launch, for machines without a GPU.
//
// Built as libcuda.so.1 (recording_cuda.py), so that Triton's own launcher uses it. Host code that
// nvcc compiled calls CUDA's runtime, which refuses a driver that is not NVIDIA's. So the few
// functions of the runtime that it calls are here too, and record the same.
//
// It refuses what a driver would refuse: grids, blocks and shared memory beyond the limits; devices
// and kernels that are not there. Of a launch's parameters it copies as many bytes as the table in
// the kernel's machine code says.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <elf.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

struct CUctx_st {
  int device;
};

struct CUfunc_st {
  struct Parameter {
    int offset, size;
  };
  std::string name;  // mangled
  std::vector<Parameter> parameters;
  int static_shared = 0;
  std::map<int, int> max_dynamic_shared;  // by device, where it was asked for
};

using Module = std::map<std::string, CUfunc_st>;
struct CUmod_st : Module {};

namespace {

constexpr int kDevices = 3;
constexpr int kShared = 48 << 10;  // dynamic, that no kernel has to ask for

CUctx_st contexts[kDevices] = {{0}, {1}, {2}};
thread_local CUcontext current = nullptr;
std::map<int, int> attributes;  // of every device
std::deque<CUmod_st> modules;   // all that were ever loaded

struct Launch {
  CUfunction kernel;
  unsigned grid[3], block[3], shared;
  int device;
  CUstream stream;
  std::vector<std::string> parameters;
};
std::vector<Launch> launches;

template <class T>
T read(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The kernels of a cubin: an ELF file in which each has a section .nv.info.<name>.
Module kernels_of(const char* elf) {
  const auto header = read<Elf64_Ehdr>(elf);
  const auto section = [&](int i) {
    return read<Elf64_Shdr>(elf + header.e_shoff + i * header.e_shentsize);
  };
  const char* const names = elf + section(header.e_shstrndx).sh_offset;
  const auto behind = [](std::string_view text, std::string_view prefix) {
    return text.starts_with(prefix) ? text.substr(prefix.size()) : std::string_view();
  };
  Module kernels;
  for (int i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr s = section(i);
    const char* const section_name = names + s.sh_name;
    if (const auto name = behind(section_name, ".nv.shared."); !name.empty())
      kernels[std::string(name)].static_shared = int(s.sh_size);
    const auto name = behind(section_name, ".nv.info.");
    if (name.empty()) continue;
    CUfunc_st& kernel = kernels[std::string(name)];
    kernel.name = name;
    // Attributes: format, kind, and two bytes that are the value, or the size of what follows.
    constexpr char kSized = 4, kParameter = 0x17;
    for (const char *at = elf + s.sh_offset, *end = at + s.sh_size; at < end;) {
      const char *value = at + 4, kind = at[1];
      const int size = at[0] == kSized ? read<uint16_t>(at + 2) : 0;
      at = value + size;
      if (kind != kParameter) continue;
      const auto number = read<uint16_t>(value + 4);
      if (kernel.parameters.size() <= number) kernel.parameters.resize(number + 1);
      kernel.parameters[number] = {read<uint16_t>(value + 6), read<int>(value + 8) >> 18};
    }
  }
  std::erase_if(kernels, [](const auto& entry) { return entry.second.name.empty(); });
  return kernels;
}

CUmodule load(const char* elf) { return &modules.emplace_back(CUmod_st{kernels_of(elf)}); }

int most_shared() { return attributes[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN]; }

CUresult set_max_shared(CUfunction kernel, int bytes) {
  if (bytes < 0 || bytes + kernel->static_shared > most_shared()) return CUDA_ERROR_INVALID_VALUE;
  kernel->max_dynamic_shared[current->device] = bytes;
  return CUDA_SUCCESS;
}

CUresult record(CUfunction kernel, const unsigned* grid, const unsigned* block, unsigned shared,
                CUstream stream, void** parameters) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const auto within = [](const unsigned* sizes, unsigned x, unsigned y, unsigned z) {
    return 0 < sizes[0] && sizes[0] <= x && 0 < sizes[1] && sizes[1] <= y && 0 < sizes[2] &&
           sizes[2] <= z;
  };
  const auto asked = kernel->max_dynamic_shared.find(current->device);
  const int most = asked == kernel->max_dynamic_shared.end() ? kShared : asked->second;
  if (!within(grid, 0x7fffffff, 0xffff, 0xffff) || !within(block, 1024, 1024, 64) ||
      block[0] * block[1] * block[2] > 1024 || int(shared) > most)
    return CUDA_ERROR_INVALID_VALUE;
  Launch launch{kernel,
                {grid[0], grid[1], grid[2]},
                {block[0], block[1], block[2]},
                shared,
                current->device,
                stream,
                {}};
  for (size_t i = 0; i < kernel->parameters.size(); ++i)
    launch.parameters.emplace_back(static_cast<const char*>(parameters[i]),
                                   kernel->parameters[i].size);
  launches.push_back(std::move(launch));
  return CUDA_SUCCESS;
}

CUresult make_current(int device) {
  if (device < 0 || device >= kDevices) return CUDA_ERROR_INVALID_DEVICE;
  current = contexts + device;
  return CUDA_SUCCESS;
}

}  // namespace

// What tests ask (recording_cuda.py).

EXPORTED void recording_set_attribute(int attribute, int value) { attributes[attribute] = value; }

EXPORTED void recording_set_device(int device) { make_current(device); }

EXPORTED int recording_device() { return current ? current->device : -1; }

EXPORTED int recording_launches() { return int(launches.size()); }

EXPORTED void recording_forget() { launches.clear(); }

EXPORTED const char* recording_name(int i) { return launches[i].kernel->name.c_str(); }

EXPORTED int recording_parameters(int i) { return int(launches[i].parameters.size()); }

EXPORTED int recording_offset(int i, int j) { return launches[i].kernel->parameters[j].offset; }

EXPORTED int recording_size(int i, int j) { return int(launches[i].parameters[j].size()); }

EXPORTED const char* recording_parameter(int i, int j) { return launches[i].parameters[j].data(); }

// grid, block, dynamic shared memory, static, device, stream
EXPORTED void recording_geometry(int i, uint64_t* to) {
  const Launch& l = launches[i];
  for (const unsigned* sizes : {l.grid, l.block})
    for (int d = 0; d < 3; ++d) *to++ = sizes[d];
  *to++ = l.shared;
  *to++ = l.kernel->static_shared;
  *to++ = l.device;
  *to++ = reinterpret_cast<uint64_t>(l.stream);
}

// The driver, as far as Triton calls it.

EXPORTED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

EXPORTED CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE    ? "invalid argument"
          : error == CUDA_ERROR_INVALID_DEVICE ? "invalid device ordinal"
          : error == CUDA_ERROR_NOT_FOUND      ? "named symbol not found"
                                               : "some other error";
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetCount(int* count) {
  *count = kDevices;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return number < kDevices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const auto found = attributes.find(attribute);
  *value = found == attributes.end() ? 0 : found->second;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = contexts + device;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxGetDevice(CUdevice* device) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current->device;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  std::memcpy(value, &address, sizeof address);  // all memory is the device's
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void* elf) {
  *module = load(static_cast<const char*>(elf));
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

EXPORTED CUresult cuModuleGetFunction(CUfunction* kernel, CUmodule module, const char* name) {
  const auto found = module->find(name);
  if (found == module->end()) return CUDA_ERROR_NOT_FOUND;
  *kernel = &found->second;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES   ? f->static_shared
                                                                : 0;
  return CUDA_SUCCESS;
}

EXPORTED CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  return set_max_shared(f, value);
}

EXPORTED CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction kernel, void** parameters,
                                   void**) {
  const unsigned grid[] = {c->gridDimX, c->gridDimY, c->gridDimZ};
  const unsigned block[] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return record(kernel, grid, block, c->sharedMemBytes, c->hStream, parameters);
}

// Triton links these. None of its launches here may need them.
EXPORTED CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus*) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORTED CUresult cuCtxGetLimit(size_t*, CUlimit) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORTED CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_ERROR_NOT_SUPPORTED; }

// The runtime, as far as nvcc's host code calls it for csrc/cuda. It is compiled for one target,
// and its machine code is left uncompressed.

namespace {

struct FatBinary {
  uint32_t magic, version;
  const char* data;
};

std::map<const void*, CUfunction> kernels;  // by the host function that stands for it

// `data` is a header, then entries: their kind, sizes of their headers and of what follows them.
const char* machine_code(const char* data) {
  constexpr uint16_t kElf = 2;
  const char* entry = data + read<uint16_t>(data + 6);
  const char* const end = entry + read<uint64_t>(data + 8);
  while (entry < end && read<uint16_t>(entry) != kElf)
    entry += read<uint32_t>(entry + 4) + read<uint64_t>(entry + 8);
  return entry + read<uint32_t>(entry + 4);
}

cudaError_t as_runtime(CUresult error) {
  return error == CUDA_ERROR_INVALID_DEVICE ? cudaErrorInvalidDevice
         : error == CUDA_SUCCESS            ? cudaSuccess
                                            : cudaErrorInvalidValue;
}

CUfunction kernel_of(const void* host) {
  if (!current) make_current(0);
  return kernels.at(host);
}

}  // namespace

EXPORTED void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(load(machine_code(static_cast<FatBinary*>(wrapper)->data)));
}

EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}

EXPORTED void __cudaUnregisterFatBinary(void**) {}

EXPORTED void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int,
                                     uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[host] = &reinterpret_cast<CUmodule>(module)->at(name);
}

EXPORTED cudaError_t cudaGetDevice(int* device) {
  *device = current ? current->device : 0;
  return cudaSuccess;
}

EXPORTED cudaError_t cudaSetDevice(int device) { return as_runtime(make_current(device)); }

EXPORTED cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute,
                                          int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  return as_runtime(set_max_shared(kernel_of(host), value));
}

EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host,
                                         void** parameters) {
  const auto [grid, block] = std::pair(c->gridDim, c->blockDim);
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return as_runtime(record(kernel_of(host), sizes, sizes + 3, unsigned(c->dynamicSmemBytes),
                           c->stream, parameters));
}

EXPORTED const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}

// Bound, but not called: by functions of the host that would launch with <<<>>>, and for no
// samples.
EXPORTED cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
EXPORTED cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaErrorNotSupported;
}
