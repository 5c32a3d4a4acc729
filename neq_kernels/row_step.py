"""Who steps the active rows: a compiled kernel where there is one, else torch on packed rows.

The compiled kernel takes float32 and float64 on a CPU, where each row lies in one piece, alike in
the parameter, its gradient and its state: any weight of a plain or channels_last layer. It reads
and writes the active rows where they are; packing moves each of them twice more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neq_kernels import compiled, pack_step

if compiled.why_not("cpu") is None:
    from neq_kernels import _C

    _DTYPES = {torch.float32: _C.DType.float32, torch.float64: _C.DType.float64}
else:
    _DTYPES = {}

_FORMATS = {
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    lists = params, grads, momentum_buffers, rows, counts
    options = momentum, dampening, weight_decay, nesterov, maximize, first
    for dtype, chosen in _divide(params, grads, momentum_buffers).items():
        p, g, m, r, k = (_choose(tensors, chosen) for tensors in lists)
        if dtype is None:
            pack_step.sgd_rows_(p, g, m, r, k, lr, *options)
            continue
        table = _table(r, k, p, g, m, [], [])
        _C.cpu_sgd_rows(dtype, table, lr.item(), *options, torch.get_num_threads())
        torch.autograd.graph.increment_version([*p, *m])


def adamw_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
) -> None:
    moments = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    lists = params, grads, *moments, steps, rows, counts
    options = beta1, beta2, eps, weight_decay
    for dtype, chosen in _divide(params, grads, *moments).items():
        p, g, m, v, v_max, s, r, k = (_choose(tensors, chosen) for tensors in lists)
        if dtype is None:
            pack_step.adamw_rows_(p, g, m, v, v_max, s, r, k, lr, *options, amsgrad, maximize)
            continue
        torch._foreach_add_(s, 1)
        table, taken = _table(r, k, p, g, m, v, v_max), [step.item() for step in s]
        threads = torch.get_num_threads()
        _C.cpu_adamw_rows(dtype, table, taken, lr.item(), *options, maximize, threads)
        torch.autograd.graph.increment_version([*p, *m, *v, *v_max])


def _divide(params: list[Tensor], *others: list[Tensor]) -> dict[Any, list[int]]:
    """The compiled kernel's dtypes, and the numbers of the parameters that it takes in each; under
    None the numbers of those that it does not take.
    """
    divided: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        dtype = _DTYPES.get(p.dtype) if p.is_cpu else None
        if dtype is not None:
            alike = [p, *(tensors[i] for tensors in others if tensors)]
            formats = _FORMATS.get(p.dim(), (torch.contiguous_format,))
            if not any(all(t.is_contiguous(memory_format=f) for t in alike) for f in formats):
                dtype = None
        divided.setdefault(dtype, []).append(i)
    return divided


def _choose(tensors: list[Tensor], chosen: list[int]) -> list[Tensor]:
    return [tensors[i] for i in chosen] if tensors else []


def _table(
    rows: list[Tensor], counts: list[Tensor], *lists: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    """For each parameter the addresses of its tensors (0 where a list is empty) and of its rows,
    then its neurons, their width, and how many are active.
    """
    addresses = [[t.data_ptr() for t in ts] if ts else [0] * len(rows) for ts in lists]
    return [
        (*tensors, r.data_ptr(), len(r), p.numel() // len(r), int(k))
        for p, r, k, *tensors in zip(lists[0], rows, counts, *addresses, strict=True)
    ]
