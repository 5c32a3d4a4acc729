"""What ``sgd_rows_`` and ``adamw_rows_`` mean, in plain torch: the truth for every test."""

from typing import Any

import torch
from torch import Tensor

from neq_kernels.step.options import SGD, AdamW


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    orders: list[Tensor],
    counts: list[Tensor],
    *options: Any,
) -> None:
    """The step of ``torch.optim.SGD`` on the active rows; the others are not even read.

    Dimension 0 of each parameter [n, ...], its gradient and its buffer counts the neurons. No
    buffers without momentum.
    """
    o = SGD(*options)
    for i, param in enumerate(params):
        active = orders[i][: int(counts[i])]
        p, g = param[active], grads[i][active]
        if o.maximize:
            g = -g
        g = g + o.weight_decay * p
        if momentum_buffers:
            m = g
            if not o.first:
                m = o.momentum * momentum_buffers[i][active] + (1 - o.dampening) * g
            momentum_buffers[i][active] = m
            g = g + o.momentum * m if o.nesterov else m
        param[active] = p - float(o.lr) * g


def adamw_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    orders: list[Tensor],
    counts: list[Tensor],
    *options: Any,
) -> None:
    """The step of ``torch.optim.AdamW`` on the active rows; the others are not even read.

    Dimension 0 of each parameter [n, ...], its gradient and its moments counts the neurons.
    ``steps``: how many steps each parameter has taken, which this one adds to. The maxima are for
    ``amsgrad`` only.
    """
    o = AdamW(*options)
    for i, param in enumerate(params):
        active = orders[i][: int(counts[i])]
        p, g = param[active], grads[i][active]
        if o.maximize:
            g = -g
        steps[i] += 1
        t = float(steps[i])
        m = o.beta1 * exp_avgs[i][active] + (1 - o.beta1) * g
        v = o.beta2 * exp_avg_sqs[i][active] + (1 - o.beta2) * g * g
        exp_avgs[i][active], exp_avg_sqs[i][active] = m, v
        if o.amsgrad:
            v = torch.maximum(v, max_exp_avg_sqs[i][active])
            max_exp_avg_sqs[i][active] = v
        m_hat, v_hat = m / (1 - o.beta1**t), v / (1 - o.beta2**t)
        p = p * (1 - float(o.lr) * o.weight_decay)
        param[active] = p - float(o.lr) * m_hat / (v_hat.sqrt() + o.eps)
