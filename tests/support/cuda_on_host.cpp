// The CUDA kernels, compiled for a CPU: a module with the functions of csrc/bindings_cuda.cpp.
//
// What CUDA declares and what csrc/cuda/ptx.h has of a GPU's instructions is written here in plain
// C++; all else is the code that runs on a GPU. CUDA's headers are empty files (cuda_on_host.py).
//
// The threads of a block are contexts that run one at a time until they wait for each other: one
// warp as far as it can, in random order, then another, so that what lacks a barrier reads what is
// not there yet. Shared memory begins as NaN, and asynchronous copies arrive when they are waited
// for, or in every other block at once.
#define NEQ_CUDA_PTX_H

#include <pybind11/pybind11.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using std::min;

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// The 16-bit types.
struct __half {
  __half() = default;
  explicit __half(float value) : value(static_cast<_Float16>(value)) {}
  _Float16 value;
};
struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    const auto wide = std::bit_cast<uint32_t>(value);
    bits = value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  uint16_t bits;
};
inline float __half2float(__half x) { return x.value; }
inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t(x.bits) << 16);
}

using cudaStream_t = void*;
using cudaError_t = const char*;  // of what went wrong
constexpr cudaError_t cudaSuccess = nullptr;

namespace emulated {

constexpr size_t kSharedBytes = 99 << 10;  // of a block, on the GPU that has least
constexpr int kDevices = 3;

inline int device = 0;                                        // the current one
inline std::vector<std::pair<int, cudaStream_t>> used;        // by launches
inline std::map<std::pair<void*, int>, size_t> shared_bytes;  // that a kernel may take on a device

// Threads that wait for each other.
struct Barrier {
  int threads = 0, arrived = 0;
  unsigned phase = 0;
};

struct Copy {
  char* to;
  const void* from;
  bool valid;
};

struct Warp;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  dim3 index;
  int lane;
  Warp* warp;
  bool running;
  Barrier* waits_for;
  unsigned phase;                        // of that barrier
  std::deque<std::vector<Copy>> copies;  // in groups, the last of which has not ended
};

struct Warp {
  Barrier barrier;
  // what its threads exchange, for this and the next exchange
  const char* rows[2][32];
  bool votes[2][32];
  uint32_t a[2][32][4], b[2][32][2];
};

struct Block {
  Barrier barrier;
  std::vector<uint4> shared;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  bool copies_at_once = false;
};

inline Block block;
inline Thread* me;
inline std::function<void()> body;
inline const char* failure;
inline std::minstd_rand random;  // goes on from one launch to the next, so that no two are alike

inline void fail(const char* why) { failure = failure ? failure : why; }

inline void wait(Barrier& barrier) {
  me->phase = barrier.phase;
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.phase;
    return;
  }
  me->waits_for = &barrier;
  swapcontext(&me->context, &block.scheduler);
}

inline void leave(Barrier& barrier) {
  if (--barrier.threads > 0 && barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
}

inline void run_thread() {
  body();
  for (const auto& group : me->copies)
    if (!group.empty()) fail("a thread ended before its copies arrived");
  leave(me->warp->barrier);
  leave(block.barrier);
  me->running = false;
  swapcontext(&me->context, &block.scheduler);
}

// Whether it got any further.
inline bool resume(Thread& thread) {
  if (!thread.running || (thread.waits_for && thread.waits_for->phase == thread.phase))
    return false;
  thread.waits_for = nullptr;
  me = &thread;
  threadIdx = thread.index;
  swapcontext(&block.scheduler, &thread.context);
  return true;
}

inline void run_block(const dim3& size, size_t shared) {
  const unsigned count = size.x * size.y * size.z;
  block.barrier = {int(count)};
  block.shared.assign(shared / sizeof(uint4), {~0u, ~0u, ~0u, ~0u});
  block.warps.assign((count + 31) / 32, {});
  while (block.threads.size() < count) block.threads.push_back(std::make_unique<Thread>());
  std::vector<std::vector<Thread*>> warps(block.warps.size());
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = *block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.lane = int(i % 32);
    thread.warp = &block.warps[i / 32];
    thread.running = true;
    thread.waits_for = nullptr;
    thread.copies.assign(1, {});
    ++thread.warp->barrier.threads;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
    warps[i / 32].push_back(&thread);
  }
  for (bool further = true; further;) {
    further = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (auto& warp : warps) {
      std::shuffle(warp.begin(), warp.end(), random);
      for (bool more = true; more; further |= more) {
        more = false;
        for (Thread* thread : warp) more |= resume(*thread);
      }
    }
  }
  for (unsigned i = 0; i < count; ++i)
    if (block.threads[i]->running) fail("threads wait for some that will not come");
}

inline void arrive(const Copy& copy) {
  // as 16 bytes that have to be aligned
  *reinterpret_cast<uint4*>(copy.to) = copy.valid ? *static_cast<const uint4*>(copy.from) : uint4{};
}

// 16 bytes of shared memory, or if there are none, of nothing.
inline char* shared(unsigned place) {
  static uint4 nothing;
  const bool exists = place % 16 == 0 && place / 16 < block.shared.size();
  if (!exists) fail("16 bytes of shared memory that are not there");
  return reinterpret_cast<char*>(exists ? &block.shared[place / 16] : &nothing);
}

template <class T>
float value(uint32_t pair, int half) {
  const auto bits = uint16_t(pair >> 16 * half);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(std::bit_cast<__half>(bits));
  else
    return __bfloat162float(std::bit_cast<__nv_bfloat16>(bits));
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::block.barrier); }

// Of a whole warp.
inline bool __all_sync(unsigned lanes, bool mine) {
  emulated::Warp& warp = *emulated::me->warp;
  if (lanes != ~0u || warp.barrier.threads != 32) emulated::fail("a vote of a part of a warp");
  const int phase = warp.barrier.phase % 2;
  warp.votes[phase][emulated::me->lane] = mine;
  emulated::wait(warp.barrier);
  return std::all_of(warp.votes[phase], warp.votes[phase] + 32, [](bool vote) { return vote; });
}

// CUDA's runtime. All devices have the same memory.

inline const char* cudaGetErrorString(cudaError_t error) { return error; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated::device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulated::kDevices) return "invalid device ordinal";
  emulated::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  emulated::used.emplace_back(emulated::device, stream);
  std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > emulated::kSharedBytes) return "invalid argument";
  emulated::shared_bytes[{reinterpret_cast<void*>(kernel), emulated::device}] = bytes;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto asked =
      emulated::shared_bytes.find({reinterpret_cast<void*>(kernel), emulated::device});
  const size_t shared = config->dynamicSmemBytes;
  if (shared > (asked == emulated::shared_bytes.end() ? 48 << 10 : asked->second))
    return "invalid argument: too much shared memory";
  for (const dim3& size : {config->gridDim, config->blockDim})
    if (size.x * uint64_t(size.y) * size.z == 0) return "invalid configuration argument";
  if (config->gridDim.y >= 1 << 16 || config->gridDim.z >= 1 << 16)
    return "invalid configuration argument";
  emulated::used.emplace_back(emulated::device, config->stream);
  emulated::body = [&] { kernel(arguments...); };
  emulated::failure = nullptr;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        emulated::block.copies_at_once ^= true;
        emulated::run_block(blockDim, shared);
      }
  return emulated::failure;
}

namespace neq::cuda {

inline char* shared_memory() { return reinterpret_cast<char*>(emulated::block.shared.data()); }

inline void copy_async(unsigned to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulated::fail("a copy of 16 bytes out of line");
  const emulated::Copy copy{emulated::shared(to), from, valid};
  if (emulated::block.copies_at_once)
    emulated::arrive(copy);
  else
    emulated::me->copies.back().push_back(copy);
}

inline void end_copies() { emulated::me->copies.emplace_back(); }

template <int Pending>
void await_copies() {
  auto& copies = emulated::me->copies;
  while (copies.size() > Pending + 1) {
    for (const auto& copy : copies.front()) emulated::arrive(copy);
    copies.pop_front();
  }
}

// PTX ISA, "ldmatrix": of a row of an 8 x 8 matrix, and transposed of a column, each of four
// threads gets two elements.
inline void load_transposed(uint32_t (&matrices)[4], unsigned row) {
  emulated::Warp& warp = *emulated::me->warp;
  const int phase = warp.barrier.phase % 2, lane = emulated::me->lane;
  warp.rows[phase][lane] = emulated::shared(row);
  emulated::wait(warp.barrier);
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const char* from = warp.rows[phase][m * 8 + lane % 4 * 2 + i];
      std::memcpy(&pair[i], from + lane / 4 * 2, 2);
    }
    matrices[m] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": with group = lane / 4 and
// member = lane % 4, and elements i counted in halves of registers,
//   a lies in row group, + 8 for i = 2, 3, 6, 7, and in column 2 member + i % 2, + 8 from i = 4 on;
//   b in row 2 member + i % 2, + 8 from i = 2 on, and in column group;
//   the sum in row group, + 8 from i = 2 on, and in column 2 member + i % 2.
template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Warp& warp = *emulated::me->warp;
  const int phase = warp.barrier.phase % 2, lane = emulated::me->lane;
  std::copy(a, a + 4, warp.a[phase][lane]);
  std::copy(b, b + 2, warp.b[phase][lane]);
  emulated::wait(warp.barrier);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = warp.a[phase][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = warp.b[phase][column * 4 + k % 8 / 2][k / 8];
      sum[i] += emulated::value<T>(left, k % 2) * emulated::value<T>(right, k % 2);
    }
  }
}

}  // namespace neq::cuda

#include "../../csrc/bindings_cuda.cpp"
#include "../../csrc/cuda/wgrad/conv_wgrad.cu"
#include "../../csrc/cuda/wgrad/pack.cu"
#include "../../csrc/cuda/wgrad/place.cu"
#include "../../csrc/cuda/wgrad/zero.cu"
#include "placed_tensors.h"

PYBIND11_MODULE(cuda_on_host, m) {
  placed::bind(m);
  neq::bind_cuda(m);
  m.def("current_device", [] { return emulated::device; });
  m.def("set_device", [](int device) {
    if (const auto error = cudaSetDevice(device)) throw std::invalid_argument(error);
  });
  m.def("used", [] {  // (device, stream) of all launches since the last call
    std::vector<std::pair<int, uintptr_t>> all;
    for (const auto& [device, stream] : std::exchange(emulated::used, {}))
      all.emplace_back(device, reinterpret_cast<uintptr_t>(stream));
    return all;
  });
}
