"""Every address that a kernel uses in Triton's interpreter is that of an element it was given.

The interpreter reads and writes wherever it is told: beyond a tensor it finds other memory, and a
test passes. Inside ``checked()`` a load or a store of a lane that is not masked raises unless it
lies within one element of a tensor of the launch, or of one that ``lent()`` names: what lies
between the rows of a slice is nobody's too.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

_lent: list[Tensor] = []
_launches: list["Elements"] = []  # under way


class OutOfBoundsError(Exception):
    pass


class Elements:
    """The bytes of all elements of some tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        pairs = [_elements(t) for t in tensors if t.numel()]
        starts = np.concatenate([start for start, _ in pairs] or [np.zeros(0, np.int64)])
        ends = np.concatenate([end for _, end in pairs] or [np.zeros(0, np.int64)])
        order = np.lexsort((ends, starts))
        self.starts, self.ends = starts[order], np.maximum.accumulate(ends[order])

    def hold(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Which of the values of so many bytes lie in one of them."""
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        if not len(self.starts):
            return np.zeros(addresses.shape, bool)
        return (at >= 0) & (addresses + size <= self.ends[np.maximum(at, 0)])


def _elements(t: Tensor) -> tuple[np.ndarray, np.ndarray]:
    starts = np.full(1, t.data_ptr(), np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        steps = np.arange(size if stride else 1, dtype=np.int64) * (stride * t.element_size())
        starts = (starts[:, None] + steps).ravel()
    return starts, starts + t.element_size()


@contextmanager
def lent(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, launches may use these too: their addresses are given as numbers."""
    before = len(_lent)
    _lent.extend(tensors)
    try:
        yield
    finally:
        del _lent[before:]


@contextmanager
def checked() -> Iterator[None]:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def create_masked_load(self, ptrs, mask, *rest):
        _check("reads", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        _check("writes", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def call(self, *args, **kwargs):
        _launches.append(Elements([*_tensors([args, kwargs.values()]), *_lent]))
        try:
            return launch(self, *args, **kwargs)
        finally:
            _launches.pop()

    with (
        mock.patch.object(builder, "create_masked_load", create_masked_load),
        mock.patch.object(builder, "create_masked_store", create_masked_store),
        mock.patch.object(executor, "__call__", call),
    ):
        yield


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Iterable) and not isinstance(value, str):
            yield from _tensors(value)


def _check(what: str, ptrs, mask) -> None:
    size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    lanes = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
    addresses = ptrs.data[lanes].astype(np.int64)
    outside = ~_launches[-1].hold(addresses, size)
    if outside.any():
        first = addresses[outside][0]
        starts = _launches[-1].starts
        near = starts[np.abs(starts - first).argmin()] if len(starts) else 0
        raise OutOfBoundsError(
            f"{what} {outside.sum()} of {lanes.sum()} values outside of all tensors, the first "
            f"{first - near} bytes from the nearest element"
        )
