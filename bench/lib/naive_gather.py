"""The naive way to skip frozen rows: index the active channels, call the vendor, index into zeros.

What anyone would write first, as a backend of neq_kernels.planner, to compare others with.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from neq_kernels.shapes import as_matrix
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    dy, x = as_matrix(dy), as_matrix(x)
    some_dy = dy[:, rows[:k]]
    some_dw = (x.t() @ some_dy).t() if weight.stride(0) == 1 else some_dy.t() @ x
    return _scatter(weight, rows[:k], some_dw, some_dy.sum(0) if bias else None)


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    active = rows[:k]
    if conv.groups > 1:  # depthwise: a neuron reads one channel of X
        x, conv = x[:, active], conv._replace(groups=k)
    _, some_dw, some_db = torch.ops.aten.convolution_backward(
        *(dy[:, active], x, weight[:k].to(x.dtype), [k] if bias else None, *conv),
        [False, True, bias],
    )
    return _scatter(weight, active, some_dw, some_db)


def _scatter(
    weight: Tensor, active: Tensor, some_dw: Tensor, some_db: Tensor | None
) -> tuple[Tensor, Tensor]:
    dw = torch.zeros_like(weight)
    dw[active] = some_dw.to(weight.dtype)
    if some_db is None:
        return dw, weight.new_empty(0)
    db = weight.new_zeros(len(weight))
    db[active] = some_db.to(weight.dtype)
    return dw, db


@contextmanager
def everywhere() -> Iterator[None]:
    """Inside, the planner picks this for every layer."""
    with (
        mock.patch.dict(planner.BACKENDS, gather=sys.modules[__name__]),
        mock.patch.object(planner, "planned", return_value="gather"),
    ):
        yield
