// What kernels need of a GPU beyond CUDA's C++: its instructions, by inline PTX. The guard has a
// name so that tests can define it and bring these functions in a form that runs on a CPU.
#ifndef NEQ_CUDA_PTX_H
#define NEQ_CUDA_PTX_H

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace neq::cuda {

// The dynamic shared memory, whose size the launch sets. Places in it are byte offsets.
__device__ inline char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

__device__ inline uint32_t shared_address(unsigned place) {
  return uint32_t(__cvta_generic_to_shared(shared_memory())) + place;
}

// Copies 16 bytes to shared memory, or if not `valid` writes zeros there and reads nothing. The
// copy is in flight until it is waited for.
__device__ inline void copy_async(unsigned to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}

// Ends a group of this thread's copies.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;"); }

// Waits for all groups of this thread's copies but the last `Pending`.
template <int Pending>
__device__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Loads four matrices of 8 x 8 elements of 16 bits: lane l gives the place of row l % 8 of matrix l
// / 8, and gets column l / 4 of rows 2 (l % 4) and 2 (l % 4) + 1 of each.
__device__ inline void load_transposed(uint32_t (&matrices)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], distributed over a warp as in PTX's mma.m16n8k16.
template <class T>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace neq::cuda

#endif
