#include <algorithm>
#include <type_traits>
#include <utility>

#include "../element.h"
#include "conv_wgrad_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,prefer-vector-width=512")
#endif
#define NEQ_ISA avx2
#define NEQ_VECTOR_BYTES 32
#define NEQ_ACCUMULATORS 12
#include "conv_wgrad_kernels.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
