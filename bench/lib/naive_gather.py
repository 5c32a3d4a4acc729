"""A naive gather: index the active channels, call the vendor, index the result into zeros.

It is the first thing to try, written as a backend of the planner to compare others with.
"""

import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from neq_kernels.shapes import as_matrix
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem


def supports(problem: Problem) -> bool:
    """Linear layers, and plain or depthwise convolutions that are not transposed."""
    if problem.conv is None:
        return True
    depthwise = problem.groups == problem.neurons == problem.x[1]
    return not problem.conv.transposed and (problem.groups == 1 or depthwise)


def cost(problem: Problem) -> float:
    """The active share: the time of the smaller gradient, were indexing free."""
    return problem.k / problem.neurons


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    dy, x, rows = as_matrix(dy), as_matrix(x), order[:k]
    some_dy = dy[:, rows]
    column_major = weight.stride(0) == 1
    some_dw = (x.t() @ some_dy).t() if column_major else some_dy.t() @ x
    return _scatter(weight, rows, some_dw, some_dy.sum(0) if bias else None)


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    rows = order[:k]
    if conv.groups > 1:  # depthwise: a neuron reads one channel of X
        x, conv = x[:, rows], conv._replace(groups=k)
    some_weight, biases = weight[:k].to(x.dtype), [k] if bias else None
    _, some_dw, some_db = torch.ops.aten.convolution_backward(
        dy[:, rows], x, some_weight, biases, *conv, [False, True, bias]
    )
    return _scatter(weight, rows, some_dw, some_db)


def _scatter(
    weight: Tensor, rows: Tensor, some_dw: Tensor, some_db: Tensor | None
) -> tuple[Tensor, Tensor]:
    dw = torch.zeros_like(weight)
    dw[rows] = some_dw.to(weight.dtype)
    if some_db is None:
        return dw, weight.new_empty(0)
    db = weight.new_zeros(len(weight))
    db[rows] = some_db.to(weight.dtype)
    return dw, db


def everywhere() -> AbstractContextManager[None]:
    """Inside, the planner picks this for every gradient that it supports."""
    return planner.only(sys.modules[__name__])
