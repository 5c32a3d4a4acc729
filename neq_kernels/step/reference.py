"""What ``sgd_rows_`` and ``adamw_rows_`` mean, in plain torch. Every test compares with them."""

import torch
from torch import Tensor

from neq_kernels.step.options import SGD, AdamW


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    orders: list[Tensor],
    counts: list[Tensor],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    """The step of ``torch.optim.SGD`` on the active rows. Frozen rows are not even read.

    Each list has one tensor for each parameter.

    Args:
        params: [n, ...] each, to be changed.
        grads: Like the parameters.
        momentum_buffers: Like the parameters, to be changed; empty without momentum.
        orders: int64 [n] each: a permutation of the neurons, the active ones first.
        counts: int64 [] each, on the CPU: how many neurons are active.
        lr: The learning rate [], on any device.
        momentum: As in torch.
        dampening: As in torch.
        weight_decay: As in torch.
        nesterov: As in torch.
        maximize: As in torch.
        first: Is it the first step? Then the momentum buffers start with the gradient.

    Examples:
        >>> p, g = torch.ones(3, 2), torch.ones(3, 2)
        >>> order, count = torch.tensor([0, 2, 1]), torch.tensor(2)
        >>> lists = [p], [g], [], [order], [count]
        >>> neq_kernels.sgd_rows_(*lists, torch.tensor(0.5), 0.0, 0.0, 0.0, False, False, True)
        >>> p
        tensor([[0.5000, 0.5000],
                [1.0000, 1.0000],
                [0.5000, 0.5000]])
    """
    o = SGD(lr, momentum, dampening, weight_decay, nesterov, maximize, first)
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
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """The step of ``torch.optim.AdamW`` on the active rows. Frozen rows are not even read.

    Each list has one tensor for each parameter.

    Args:
        params: [n, ...] each, to be changed.
        grads: Like the parameters.
        exp_avgs: The first moments, like the parameters, to be changed.
        exp_avg_sqs: The second moments, like the parameters, to be changed.
        max_exp_avg_sqs: Their maxima, like the parameters, to be changed; empty without
            ``amsgrad``.
        steps: [] each: how many steps the parameter has taken. One is added.
        orders: int64 [n] each: a permutation of the neurons, the active ones first.
        counts: int64 [] each, on the CPU: how many neurons are active.
        lr: The learning rate [], on any device.
        beta1: As in torch.
        beta2: As in torch.
        eps: As in torch.
        weight_decay: As in torch.
        amsgrad: As in torch.
        maximize: As in torch.
    """
    o = AdamW(lr, beta1, beta2, eps, weight_decay, amsgrad, maximize)
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
