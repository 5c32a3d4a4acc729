"""Packs columns of dY side by side, and adds them up in the same pass.

csrc/cpu/wgrad/pack.cpp and csrc/cuda/wgrad/pack.cu, or plain torch where neither applies.
"""

import torch
from torch import Tensor

from neq_kernels import _torch
from neq_kernels.device import extension

if extension.devices:
    from neq_kernels.device.extension import _C


def pack_columns(dy: Tensor, rows: Tensor, want_sums: bool) -> tuple[Tensor, Tensor | None]:
    """``dy[:, rows]``, contiguous, and its column sums from the same pass.

    The sums have the same bits each time.

    Args:
        dy: [T, n].
        rows: int64 [k], in any order; ascending rows are fast. On a GPU it is not checked that they
            lie in [0, n).
        want_sums: Are the sums wanted?

    Returns:
        The columns [T, k]; the sums [k] or None, in float32, or in float64 if ``dy`` is.

    Raises:
        ValueError: If a shape, dtype or device is wrong, or on the CPU a row is out of range.
    """
    if dy.dim() != 2:
        raise ValueError(f"dy must be [samples, neurons], got {list(dy.shape)}")
    if rows.dtype is not torch.int64 or rows.dim() != 1:
        raise ValueError(f"rows must be int64 of shape [k], got {rows.dtype} {list(rows.shape)}")
    if rows.get_device() != dy.get_device() or rows.is_cpu != dy.is_cpu:
        raise ValueError(f"rows must be on the device of dy, {dy.device}, got {rows.device}")
    device = extension.gpu_of(dy)
    is_there = device is not None or (dy.is_cpu and "cpu" in extension.devices)
    if dy.dtype not in extension.DTYPES or dy.stride(1) != 1 or not is_there:
        return _pack_columns_in_torch(dy, rows, want_sums)
    samples, k = dy.shape[0], rows.numel()
    packed = dy.new_empty((samples, k))
    sums = dy.new_empty(k, dtype=extension.sum_dtype(dy)) if want_sums else None
    problem = dy, rows.contiguous(), packed, sums
    if device is None:
        _C.cpu_pack_columns(*problem, torch.get_num_threads())
    else:
        size = _C.cuda_pack_scratch_bytes(dy, k) if want_sums else 0
        scratch = dy.new_empty(size, dtype=torch.uint8)
        _C.cuda_pack_columns(*problem, scratch, device, _torch.current_stream(device))
    return packed, sums


def _pack_columns_in_torch(
    dy: Tensor, rows: Tensor, want_sums: bool
) -> tuple[Tensor, Tensor | None]:
    packed = dy.index_select(1, rows)
    return packed, packed.sum(0, dtype=extension.sum_dtype(dy)) if want_sums else None
