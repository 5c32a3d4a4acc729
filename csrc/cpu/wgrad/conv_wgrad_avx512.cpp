#include <algorithm>
#include <type_traits>
#include <utility>

#include "../element.h"
#include "../processor.h"
#include "conv_wgrad_kernels.h"

#ifdef NEQ_X86
NEQ_BEGIN_TARGET(NEQ_AVX512)
#define NEQ_ISA avx512
#define NEQ_VECTOR_BYTES 64
#define NEQ_ACCUMULATORS 24
#include "conv_wgrad_kernels.inc"
NEQ_END_TARGET
#endif
