"""The compiled kernel for CPUs, which steps the active rows where they are.

Packing them would move each twice more.
"""

import torch
from torch import Tensor

from neq_kernels import compiled
from neq_kernels.hyper import SGD, AdamW

if compiled.why_not("cpu") is None:
    from neq_kernels import _C

DTYPES = {torch.float32, torch.float64} & compiled.DTYPES


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: SGD,
) -> None:
    lr, momentum, dampening, weight_decay, nesterov, maximize, first = options
    lists = params, grads, momentum_buffers, rows, counts
    numbers = lr.item(), momentum, dampening, weight_decay
    _C.cpu_sgd_rows(lists, *numbers, nesterov, maximize, first, torch.get_num_threads())
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
    lr, beta1, beta2, eps, weight_decay, _, maximize = options
    lists = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, rows, counts
    numbers = lr.item(), beta1, beta2, eps, weight_decay
    _C.cpu_adamw_rows(lists, *numbers, maximize, torch.get_num_threads())
    torch.autograd.graph.increment_version([t for ts in (params, *moments) for t in ts])


def is_transposed(p: Tensor) -> bool:
    """Whether the neurons of a matrix, which are its rows, lie side by side in memory."""
    return p.dim() == 2 and not p.is_contiguous() and p.t().is_contiguous()
