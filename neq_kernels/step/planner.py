"""Who steps the active rows: a kernel where there is one for the device, else torch on packed rows.

The kernels read and write the active rows where they are. They want each row in one piece, and
alike in the parameter, its gradient and its state: any weight of a plain or channels_last layer.
The CPU's also takes a transposed matrix, of which packing would move the whole, many times.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from neq_kernels.device.gpu import triton_is_there
from neq_kernels.step import native as native_step
from neq_kernels.step import pack as pack_step
from neq_kernels.step.options import SGD, AdamW

INT32 = 2**31
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def sgd_rows_(*lists: list[Tensor], options: SGD) -> None:
    """params, grads, momentum_buffers, rows, counts"""
    for backend, some in _divide(lists, alike=3):
        backend.sgd_rows_(*some, options)


def adamw_rows_(*lists: list[Tensor], options: AdamW) -> None:
    """params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, rows, counts"""
    for backend, some in _divide(lists, alike=5):
        backend.adamw_rows_(*some, options)


def backend(p: Tensor, *others: Tensor) -> ModuleType:
    """Who steps a parameter with its gradient and state."""
    whole = _in_one_piece((p, *others))
    if p.is_cpu and p.dtype in native_step.DTYPES:
        if whole or all(map(native_step.is_transposed, (p, *others))):
            return native_step
    elif whole and p.is_cuda and p.numel() < INT32 and triton_is_there():
        from neq_kernels.step import fused as triton_step

        if p.dtype in triton_step.DTYPES:
            return triton_step
    return pack_step


def _divide(
    lists: Sequence[list[Tensor]], alike: int
) -> Iterator[tuple[ModuleType, list[list[Tensor]]]]:
    """Backends, and of each list what one call of them takes, on one device and of one dtype.

    ``alike``: so many of the lists, the first, hold tensors shaped like the parameters.
    """
    params, rows = lists[0], lists[-2]
    divided: dict[tuple[ModuleType, torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(params):
        tensors = [tensors[i] for tensors in lists[:alike] if tensors]
        step = backend(*tensors) if rows[i].is_contiguous() else pack_step
        divided.setdefault((step, p.device, p.dtype), []).append(i)
    for (step, *_), chosen in divided.items():
        yield step, [[tensors[i] for i in chosen] if tensors else [] for tensors in lists]


def _in_one_piece(tensors: Sequence[Tensor]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    other = _CHANNELS_LAST.get(tensors[0].dim())
    return other is not None and all(t.is_contiguous(memory_format=other) for t in tensors)
