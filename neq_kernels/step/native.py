"""The compiled CPU kernel, which steps the active rows where they are.

Packing would move each row two more times.
"""

import torch

from neq_kernels import _torch
from neq_kernels.device import extension
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists

if extension.why_not("cpu") is None:
    from neq_kernels.device.extension import _C

DTYPES = {torch.float32, torch.float64} & extension.DTYPES


def sgd_rows_(lists: SGDLists, options: SGD) -> None:
    lr, momentum, dampening, weight_decay, nesterov, maximize, first = options
    numbers = lr.item(), momentum, dampening, weight_decay
    _C.cpu_sgd_rows(lists, *numbers, nesterov, maximize, first, torch.get_num_threads())
    torch.autograd.graph.increment_version([*lists.params, *lists.momentum_buffers])


def adamw_rows_(lists: AdamWLists, options: AdamW) -> None:
    _torch.foreach_add_(lists.steps, 1)
    lr, beta1, beta2, eps, weight_decay, _, maximize = options
    numbers = lr.item(), beta1, beta2, eps, weight_decay
    _C.cpu_adamw_rows(lists, *numbers, maximize, torch.get_num_threads())
    moments = *lists.exp_avgs, *lists.exp_avg_sqs, *lists.max_exp_avg_sqs
    torch.autograd.graph.increment_version([*lists.params, *moments])
