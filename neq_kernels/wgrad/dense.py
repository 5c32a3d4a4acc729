"""The vendor's dense weight gradient, then zeros in the frozen rows.

Saves nothing and costs little: what runs where nothing else would pay.
"""

from math import prod

import torch
from torch import Tensor

from neq_kernels.device import extension
from neq_kernels.device.bypass import may_bypass_dispatcher
from neq_kernels.shapes import as_matrix
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem

if extension.why_not("cpu") is None:
    from neq_kernels import _C

# Arithmetic that a CPU does while a byte of dW is written; is zeroed with its row; or is in a
# matrix some columns of which are zeroed (docs/notes/cpu-wgrad.md).
WRITE_FLOPS, ROWS_FLOPS, COLUMNS_FLOPS = 10, 10, 8


def supports(problem: Problem) -> bool:
    return True


def cost(problem: Problem) -> float:
    """The vendor's time is the unit of all costs; frozen rows are zeroed besides."""
    if problem.device != "cpu" or problem.flops == 0:
        return 1.0
    frozen = 1 - problem.k / problem.neurons
    per_byte = COLUMNS_FLOPS if problem.column_major else frozen * ROWS_FLOPS
    return 1 + per_byte * _dw_bytes(problem) / unit(problem)


def unit(problem: Problem) -> float:
    """The vendor's time for all rows, in its arithmetic: of few samples, it is that to write dW."""
    if problem.device != "cpu":
        return problem.flops
    return max(problem.flops, WRITE_FLOPS * _dw_bytes(problem))


def _dw_bytes(problem: Problem) -> int:
    return prod(problem.weight) * problem.dtype.itemsize


def as_weight(dw: Tensor, weight: Tensor) -> Tensor:
    """``dw`` in the weight's dtype and strides, in which autograd takes it without a copy."""
    if dw.dtype == weight.dtype and dw.stride() == weight.stride():
        return dw
    return torch.empty_like(weight).copy_(dw)


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    dy, x = as_matrix(dy), as_matrix(x)
    if weight.stride(0) == 1:  # column-major
        dw = as_weight((x.t() @ dy).t(), weight)
    else:
        dw = as_weight(dy.t() @ x, weight)
    db = dy.sum(0, dtype=weight.dtype) if bias else weight.new_empty(0)
    if k < len(order):
        zero_frozen_(dw, order[k:], 0)
        if bias:
            db.index_fill_(0, order[k:], 0)
    return dw, db


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    dw = as_weight(vendor_conv_wgrad(dy, x, weight, conv), weight)
    db = channel_sum(dy, weight.dtype) if bias else weight.new_empty(0)
    if k < len(order):
        zero_frozen_(dw, order[k:], int(conv.transposed), conv)
        if bias:
            db.index_fill_(0, order[k:], 0)
    return dw, db


def zero_frozen_(dw: Tensor, frozen: Tensor, dim: int, conv: Conv | None = None) -> None:
    """Zero the rows ``frozen`` (int64), which lie along dimension ``dim``, NaN or not.

    conv: of a transposed convolution, whose groups have neurons of their own along ``dim``.
    """
    if conv is not None and conv.transposed and conv.groups > 1:
        mask = frozen.new_zeros(dw.shape[1] * conv.groups, dtype=torch.bool)
        dw.masked_fill_(conv.spread(mask.index_fill_(0, frozen, True), dw), 0)
    elif dw.dim() == 2 and dw.stride(dim) == 1 and not dw.requires_grad:
        _zero_columns(dw if dim == 1 else dw.t(), frozen)
    elif _zeroed_in_memory(dw, frozen, dim):
        torch.autograd.graph.increment_version(dw)
    else:
        dw.index_fill_(dim, frozen, 0)


def _zeroed_in_memory(dw: Tensor, frozen: Tensor, dim: int) -> bool:
    """Done by the compiled kernel, where it can: torch goes value by value."""
    return (
        dw.is_cpu
        and dw.dtype in extension.DTYPES
        and not (dw.requires_grad or torch.compiler.is_compiling())
        and may_bypass_dispatcher(dw)
        and _C.cpu_zero_rows(dw, frozen.contiguous(), dim, torch.get_num_threads())
    )


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def _zero_columns(matrix: Tensor, columns: Tensor) -> None:
    """Zero some ``columns``, NaN or not, in one pass over the memory.

    Filling columns one by one would touch each cache line many times.
    """
    bits = _BITS[matrix.element_size()]
    keep = columns.new_full(matrix.shape[1:], -1, dtype=bits).index_fill_(0, columns, 0)
    matrix.view(bits).bitwise_and_(keep)


def vendor_conv_wgrad(dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """dW of the whole of ``weight``, whose values are not read: only dtype, shape and layout."""
    if weight.dtype != x.dtype:
        weight = torch.empty_like(weight, dtype=x.dtype)
    dw: Tensor = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, *conv, [False, True, False]
    )[1]
    return dw


def channel_sum(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """[n]: dY [N, n, *pixels] summed over all but its channels."""
    return dy.sum([0, *range(2, dy.dim())], dtype=dtype)
