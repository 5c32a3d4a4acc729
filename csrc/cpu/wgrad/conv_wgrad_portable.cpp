#include <algorithm>
#include <type_traits>
#include <utility>

#include "conv_wgrad_kernels.h"
#include "../element.h"

#define NEQ_ISA portable
#define NEQ_VECTOR_BYTES 16
#define NEQ_ACCUMULATORS 12
#include "conv_wgrad_kernels.inc"
