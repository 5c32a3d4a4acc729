#include <algorithm>
#include <type_traits>
#include <utility>

#include "../element.h"
#include "conv_wgrad_kernels.h"

#define NEQ_ISA portable
#define NEQ_VECTOR_BYTES 16
#define NEQ_ACCUMULATORS 12
#include "conv_wgrad_kernels.inc"
