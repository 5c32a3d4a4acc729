"""``row_similarity`` on the CPU: both outputs read once, in the order in which they lie there.

csrc/cpu/similarity.cpp. It computes in float64.
"""

from torch import Tensor

from neq_kernels import chunked, compiled


def row_similarity(y: Tensor, y_: Tensor) -> Tensor:
    """[3, samples, neurons] from two of [samples, positions, neurons, positions]."""
    if y.dtype not in compiled.DTYPES or y_.dtype not in compiled.DTYPES:
        return chunked.row_similarity(y, y_)
    inner = 3 if y.shape[3] > 1 else 2
    if y.stride(inner) != 1 or y_.stride(inner) != 1:
        y, y_ = y.contiguous(), y_.contiguous()
    return compiled.row_similarity(y, y_)
