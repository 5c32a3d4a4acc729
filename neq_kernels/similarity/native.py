"""``row_similarity`` as a compiled CPU kernel, which reads both outputs once, in memory's order.

csrc/cpu/similarity/row_similarity.cpp. It computes in float64.
"""

import torch
from torch import Tensor

from neq_kernels.device import extension
from neq_kernels.similarity import in_torch

if extension.why_not("cpu") is None:
    from neq_kernels.device.extension import _C


def row_similarity(y: Tensor, y_: Tensor, isa: str = "best") -> Tensor:
    """float64 [3, samples, neurons] from y and y_ [samples, positions, neurons, positions].

    It gives the same bits for any number of threads.

    Args:
        y: Outputs.
        y_: Other outputs, in the same shape.
        isa: The instructions to use, for tests.
    """
    if y.dtype not in extension.DTYPES or y_.dtype not in extension.DTYPES:
        return in_torch.row_similarity(y, y_)
    inner = 3 if y.shape[3] > 1 else 2
    if y.stride(inner) != 1 or y_.stride(inner) != 1:
        y, y_ = y.contiguous(), y_.contiguous()
    out = y.new_empty((3, y.shape[0], y.shape[2]), dtype=torch.float64)
    _C.cpu_row_similarity(y, y_, out, getattr(_C.Isa, isa), torch.get_num_threads())
    return out
