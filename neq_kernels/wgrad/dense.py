"""The vendor's dense weight gradient, then zeros in the frozen rows.

It saves nothing and costs little. It runs where no other backend is faster. A compact gradient it
computes of the active columns of dY only; of grouped convolutions it has to compute all first.
"""

from math import inf, prod

import torch
from torch import Tensor

from neq_kernels import _torch
from neq_kernels.device import extension
from neq_kernels.device.bypass import are_mere_memory, may_bypass_dispatcher
from neq_kernels.shapes import as_matrix
from neq_kernels.wgrad.geometry import Conv, full_shape, is_compact
from neq_kernels.wgrad.problem import Problem

if extension.why_not("cpu") is None:
    from neq_kernels.device.extension import _C

# FLOPs that a CPU does in the time for one byte of dW: to write it; to zero it with its row; to
# pass over it where some columns are zeroed (docs/notes/cpu-wgrad.md#the-cost-models).
WRITE_FLOPS, ROWS_FLOPS, COLUMNS_FLOPS = 10, 10, 8


def supports(problem: Problem) -> bool:
    """Always."""
    return True


def cost(problem: Problem) -> float:
    """The vendor's time, which is the unit of all costs, and the time to zero frozen rows.

    Of a compact gradient, all other backends leave out more: it is the last resort.
    """
    if problem.compact:
        return inf
    if problem.device != "cpu" or problem.flops == 0:
        return 1.0
    frozen = 1 - problem.k / problem.neurons
    per_byte = COLUMNS_FLOPS if problem.column_major else frozen * ROWS_FLOPS
    return 1 + per_byte * _dw_bytes(problem) / unit(problem)


def unit(problem: Problem) -> float:
    """The vendor's time for all rows, in FLOPs. With few samples, it is the time to write dW."""
    if problem.device != "cpu":
        return problem.flops
    return max(problem.flops, WRITE_FLOPS * _dw_bytes(problem))


def _dw_bytes(problem: Problem) -> int:
    return prod(problem.weight) * problem.dtype.itemsize


def as_weight(dw: Tensor, weight: Tensor) -> Tensor:
    """``dw`` in the dtype and strides of ``weight``, so that autograd takes it without a copy."""
    if dw.dtype == weight.dtype and dw.stride() == weight.stride():
        return dw
    return torch.empty_like(weight).copy_(dw)


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    dy, x = as_matrix(dy), as_matrix(x)
    if is_compact(weight, len(order)):
        dw, db = linear_wgrad(dy.index_select(1, order[:k]), x, weight[:k], order[:k], k, bias)
        return compact(weight, dw, db)
    if weight.stride(0) == 1:  # column-major
        dw = as_weight((x.t() @ dy).t(), weight)
    else:
        dw = as_weight(dy.t() @ x, weight)
    db = dy.sum(0, dtype=weight.dtype) if bias else weight.new_empty(0)
    if k < len(order):
        zero_frozen_(dw, order[k:], 0, None, db if bias else None)
    return dw, db


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    if is_compact(weight, len(order), conv):
        dim = int(conv.transposed)
        dw = vendor_conv_wgrad(dy, x, weight.new_empty(full_shape(weight, len(order), conv)), conv)
        db = channel_sum(dy, weight.dtype)[order[:k]] if bias else None
        return compact(weight, dw.index_select(dim, order[:k]), db, dim)
    dw = as_weight(vendor_conv_wgrad(dy, x, weight, conv), weight)
    db = channel_sum(dy, weight.dtype) if bias else weight.new_empty(0)
    if k < len(order):
        zero_frozen_(dw, order[k:], int(conv.transposed), conv, db if bias else None)
    return dw, db


def compact(weight: Tensor, dw: Tensor, db: Tensor | None, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Compact gradients of a ``weight`` with m rows, given those of its first k; zeros follow.

    Args:
        weight: Only its dtype, shape and strides are read.
        dw: k rows.
        db: [k]; None or [0] if it is not wanted.
        dim: The dimension of weight and ``dw`` that counts rows.
    """
    m, k = weight.shape[dim], dw.shape[dim]
    if k < m:
        rows, dw = dw, torch.empty_like(weight)
        dw.narrow(dim, 0, k).copy_(rows)
        dw.narrow(dim, k, m - k).zero_()
    dw = as_weight(dw, weight)
    if db is None or len(db) == 0:
        return dw, weight.new_empty(0)
    db = db.to(weight.dtype)
    return dw, db if k == m else torch.cat([db, db.new_zeros(m - k)])


def zero_frozen_(
    dw: Tensor, frozen: Tensor, dim: int, conv: Conv | None = None, db: Tensor | None = None
) -> None:
    """Zero the frozen rows of dW, and of db, also where they are NaN.

    Args:
        dw: The gradient of a weight with n neurons.
        frozen: int64 [n - k].
        dim: The dimension of ``dw`` that counts the neurons.
        conv: The geometry of a convolution. In a transposed one, ``dim`` counts the neurons of one
            group.
        db: [n], the gradient of the bias.
    """
    by_group = conv is not None and conv.transposed and conv.groups > 1
    if not by_group and _zeroed_on_gpu(dw, frozen, dim, db):
        return
    if db is not None:
        db.index_fill_(0, frozen, 0)
    if conv is not None and by_group:
        mask = frozen.new_zeros(dw.shape[1] * conv.groups, dtype=torch.bool)
        dw.masked_fill_(conv.spread(mask.index_fill_(0, frozen, True), dw), 0)
    elif dw.dim() == 2 and dw.stride(dim) == 1 and _has_bits(dw):
        _zero_columns(dw if dim == 1 else dw.t(), frozen)
    elif _zeroed_in_memory(dw, frozen, dim):
        torch.autograd.graph.increment_version(dw)
    else:
        dw.index_fill_(dim, frozen, 0)


def _zeroed_on_gpu(dw: Tensor, frozen: Tensor, dim: int, db: Tensor | None) -> bool:
    """Zero both in one launch, if the compiled kernel can. torch takes three to five."""
    device = extension.gpu_of(dw)
    both = [dw] if db is None else [dw, db]
    done = (
        device is not None
        and not torch.compiler.is_compiling()
        and not any(t.requires_grad or t.dtype not in extension.DTYPES for t in both)
        and may_bypass_dispatcher(*both)
        and _C.cuda_zero_rows(
            dw, dim, db, frozen.contiguous(), device, _torch.current_stream(device)
        )
    )
    if done:
        torch.autograd.graph.increment_version(both)
    return bool(done)


def _zeroed_in_memory(dw: Tensor, frozen: Tensor, dim: int) -> bool:
    """Zero with the compiled kernel, if it can. torch is slower: it goes value by value."""
    return (
        dw.is_cpu
        and dw.dtype in extension.DTYPES
        and not (dw.requires_grad or torch.compiler.is_compiling())
        and may_bypass_dispatcher(dw)
        and _C.cpu_zero_rows(dw, frozen.contiguous(), dim, torch.get_num_threads())
    )


def _has_bits(dw: Tensor) -> bool:
    """May its values be looked at as integers?"""
    return not dw.requires_grad and (torch.compiler.is_compiling() or are_mere_memory(dw))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def _zero_columns(matrix: Tensor, columns: Tensor) -> None:
    """Zero some ``columns`` (int64) of a matrix, also where they are NaN, in one pass over memory.

    To fill columns one by one would touch each cache line many times.
    """
    bits = _BITS[matrix.element_size()]
    keep = columns.new_full(matrix.shape[1:], -1, dtype=bits).index_fill_(0, columns, 0)
    matrix.view(bits).bitwise_and_(keep)


def vendor_conv_wgrad(dy: Tensor, x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """dW of all neurons, by the vendor. Of ``weight`` no value is read.

    dy is [N, n, *pixels], x [N, inputs, *pixels].
    """
    if weight.dtype != x.dtype:
        weight = torch.empty_like(weight, dtype=x.dtype)
    dw: Tensor = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, *conv, [False, True, False]
    )[1]
    return dw


def channel_sum(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [N, n, *pixels] summed over samples and pixels: [n]."""
    return dy.sum([0, *range(2, dy.dim())], dtype=dtype)
