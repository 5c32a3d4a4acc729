#include <algorithm>
#include <type_traits>
#include <utility>

#include "../element.h"
#include "../processor.h"
#include "conv_wgrad_kernels.h"

#ifdef NEQ_X86
NEQ_BEGIN_TARGET(NEQ_AVX2)
#define NEQ_ISA avx2
#define NEQ_VECTOR_BYTES 32
#define NEQ_ACCUMULATORS 12
#include "conv_wgrad_kernels.inc"
NEQ_END_TARGET
#endif
