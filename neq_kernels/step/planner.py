"""Picks the backend that steps a parameter: a kernel where there is one, else torch on packed rows.

The kernels read and write the active rows where they are. They want each row in one piece, and
alike in the parameter, its gradient and its state: any weight of a plain or channels_last layer.
The CPU's also takes a column-major matrix, of which packing would move the whole, many times.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from neq_kernels.device.gpu import triton_is_there
from neq_kernels.shapes import INT32, is_column_major
from neq_kernels.step import native, pack
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Backend(Protocol):
    """A way to step active rows; all parameters of a call are on one device and of one dtype."""

    def sgd_rows_(self, lists: SGDLists, options: SGD) -> None: ...
    def adamw_rows_(self, lists: AdamWLists, options: AdamW) -> None: ...


def sgd_rows_(lists: SGDLists, options: SGD) -> None:
    for backend, some in _divide(lists, alike=3):
        backend.sgd_rows_(some, options)


def adamw_rows_(lists: AdamWLists, options: AdamW) -> None:
    for backend, some in _divide(lists, alike=5):
        backend.adamw_rows_(some, options)


def choose(p: Tensor, *others: Tensor) -> Backend:
    """The backend for a parameter with its gradient and state."""
    whole = _in_one_piece((p, *others))
    if p.is_cpu and p.dtype in native.DTYPES:
        if whole or all(is_column_major(t) and t.t().is_contiguous() for t in (p, *others)):
            return native
    elif whole and p.is_cuda and p.numel() < INT32 and triton_is_there():
        from neq_kernels.step import fused

        if p.dtype in fused.DTYPES:
            return fused
    return pack


Lists = TypeVar("Lists", SGDLists, AdamWLists)


def _divide(lists: Lists, alike: int) -> Iterator[tuple[Backend, Lists]]:
    """Backends, and the lists for one call of each, on one device and of one dtype.

    ``alike``: so many of the lists, the first, hold tensors shaped like the parameters.
    """
    divided: dict[tuple[Backend, torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(lists.params):
        tensors = [tensors[i] for tensors in lists[:alike] if tensors]
        backend = choose(*tensors) if lists.orders[i].is_contiguous() else pack
        divided.setdefault((backend, p.device, p.dtype), []).append(i)
    for (backend, *_), chosen in divided.items():
        some = ([tensors[i] for i in chosen] if tensors else [] for tensors in lists)
        yield backend, type(lists)(*some)


def _in_one_piece(tensors: Sequence[Tensor]) -> bool:
    if all(t.is_contiguous() for t in tensors):
        return True
    other = _CHANNELS_LAST.get(tensors[0].dim())
    return other is not None and all(t.is_contiguous(memory_format=other) for t in tensors)
