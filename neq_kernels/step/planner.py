"""Picks the backend that steps a parameter: a kernel if there is one, else torch on packed rows.

The kernels read and write the active rows where they are, with the same layout in the parameter,
its gradient and its state. All step rows in one piece, those of contiguous and channels_last
weights, and column-major matrices. The GPU's also step the weights of transposed convolutions.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from neq_kernels.device.gpu import triton_is_there
from neq_kernels.shapes import INT32
from neq_kernels.step import native, pack
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Backend(Protocol):
    """One way to step active rows. The parameters of a call share a device and a dtype."""

    def sgd_rows_(self, lists: SGDLists, options: SGD) -> None:
        """The operator for such parameters."""

    def adamw_rows_(self, lists: AdamWLists, options: AdamW) -> None:
        """The operator for such parameters."""


def sgd_rows_(lists: SGDLists, options: SGD) -> None:
    """The operator, for arguments that were checked."""
    for backend, some in _divide(lists, alike=3):
        backend.sgd_rows_(some, options)


def adamw_rows_(lists: AdamWLists, options: AdamW) -> None:
    """The operator, for arguments that were checked."""
    for backend, some in _divide(lists, alike=5):
        backend.adamw_rows_(some, options)


def choose(p: Tensor, *others: Tensor) -> Backend:
    """The backend for a parameter p [n, ...]. ``others``: its gradient and its state, like p."""
    alike = p, *others
    if p.is_cpu and p.dtype in native.DTYPES:
        if _in_one_piece(alike) or (p.dim() == 2 and _in_lines(alike)):
            return native
    elif p.is_cuda and p.numel() < INT32 and triton_is_there():
        from neq_kernels.step import fused

        if p.dtype in fused.DTYPES and (_in_one_piece(alike) or _in_lines(alike)):
            return fused
    return pack


Lists = TypeVar("Lists", SGDLists, AdamWLists)


def _divide(lists: Lists, alike: int) -> Iterator[tuple[Backend, Lists]]:
    """The lists divided into calls of one backend, device and dtype each.

    ``alike``: how many of the lists, from the first on, hold tensors shaped like the parameters.
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
    """Is each row of these tensors in one piece, with one layout for all of them?"""
    if all(t.is_contiguous() for t in tensors):
        return True
    other = _CHANNELS_LAST.get(tensors[0].dim())
    return other is not None and all(t.is_contiguous(memory_format=other) for t in tensors)


def _in_lines(tensors: Sequence[Tensor]) -> bool:
    """Are these tensors [n, inputs, ...] stored as [inputs, n, ...], with one layout for all?"""
    return tensors[0].dim() > 1 and _in_one_piece([t.transpose(0, 1) for t in tensors])
