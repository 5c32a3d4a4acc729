"""The compiled kernel for CPUs, which steps the active rows where they are.

Packing them would move each twice more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neq_kernels import compiled
from neq_kernels.hyper import SGD, AdamW

if compiled.why_not("cpu") is None:
    from neq_kernels import _C

DTYPES = {torch.float32, torch.float64} & compiled.DTYPES.keys()


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: SGD,
) -> None:
    dtype, lr = compiled.DTYPES[params[0].dtype], options.lr.item()
    table = _table(rows, counts, params, grads, momentum_buffers, [], [])
    _C.cpu_sgd_rows(dtype, table, lr, *options[1:], torch.get_num_threads())
    torch.autograd.graph.increment_version([*params, *momentum_buffers])


def adamw_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: AdamW,
) -> None:
    moments = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    torch._foreach_add_(steps, 1)
    dtype, taken = compiled.DTYPES[params[0].dtype], [step.item() for step in steps]
    table = _table(rows, counts, params, grads, *moments)
    lr, beta1, beta2, eps, weight_decay, _, maximize = options
    numbers = lr.item(), beta1, beta2, eps, weight_decay
    _C.cpu_adamw_rows(dtype, table, taken, *numbers, maximize, torch.get_num_threads())
    torch.autograd.graph.increment_version([t for ts in (params, *moments) for t in ts])


def _table(
    rows: list[Tensor], counts: list[Tensor], *lists: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    """For each parameter the addresses of its tensors (0 where a list is empty) and of its rows,
    then its neurons, their width, how many are active, and whether it is transposed in memory.
    """
    addresses = [[t.data_ptr() for t in ts] if ts else [0] * len(rows) for ts in lists]
    return [
        (*tensors, r.data_ptr(), n := r.numel(), p.numel() // (n or 1), int(k), is_transposed(p))
        for p, r, k, *tensors in zip(lists[0], rows, counts, *addresses, strict=True)
    ]


def is_transposed(p: Tensor) -> bool:
    """Whether the neurons of a matrix, which are its rows, lie side by side in memory."""
    return p.dim() == 2 and not p.is_contiguous() and p.t().is_contiguous()
