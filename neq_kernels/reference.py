"""What each operator means, in plain torch: the truth that every test compares with.

A frozen row is exactly zero, also where the dense gradient would be infinite or NaN.
"""

from typing import Any

import torch
from torch import Tensor

from neq_kernels.step.options import SGD, AdamW
from neq_kernels.wgrad.geometry import Conv


def active_mask(rows: Tensor, count: Tensor) -> Tensor:
    """bool [n]: True for the first ``count`` neurons that ``rows`` names."""
    mask = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    mask[rows[: int(count)]] = True
    return mask


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, count: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """dW = dYᵀ X [n, inputs] and db = Σ dY [n] (or [0] without bias), frozen rows zero."""
    samples = dy.shape[:-1].numel()
    dy, x = dy.reshape(samples, dy.shape[-1]), x.reshape(samples, x.shape[-1])
    frozen = ~active_mask(rows, count)
    dw = (dy.t() @ x).masked_fill(frozen[:, None], 0)
    db = dy.sum(0).masked_fill(frozen, 0)
    return torch.empty_like(weight).copy_(dw), (db if bias else db[:0]).to(weight.dtype)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    count: Tensor,
    bias: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``torch.convolution``'s weight and bias for a given dY, frozen rows zero."""
    conv = Conv.of(*geometry)
    frozen = ~active_mask(rows, count)
    with torch.enable_grad():
        w = weight.detach().to(dy.dtype).requires_grad_()
        y = torch.convolution(x.detach(), w, None, *conv)
        (dw,) = torch.autograd.grad(y, w, dy.detach())
    dw = dw.masked_fill(conv.spread(frozen, weight), 0)
    db = dy.transpose(0, 1).flatten(1).sum(1).masked_fill(frozen, 0)
    return torch.empty_like(weight).copy_(dw), (db if bias else db[:0]).to(weight.dtype)


def row_similarity(current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool) -> Tensor:
    """⟨y, y'⟩, |y|² and |y'|² of each neuron, over all that is not the channel; float64 [3, n].

    Or over one sample (dimension 0) at a time: [3, samples, n].
    """
    y, y_ = current.double().movedim(channel_dim, -1), previous.double().movedim(channel_dim, -1)
    start = 1 if per_sample else 0
    products = (y * y_, y * y, y_ * y_)
    return torch.stack([p.unsqueeze(start).flatten(start, -2).sum(start) for p in products])


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    *options: Any,
) -> None:
    """The step of ``torch.optim.SGD`` on the active rows; the others are not even read.

    Dimension 0 of each parameter [n, ...], its gradient and its buffer counts the neurons. No
    buffers without momentum.
    """
    o = SGD(*options)
    for i, param in enumerate(params):
        active = rows[i][: int(counts[i])]
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
    rows: list[Tensor],
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
        active = rows[i][: int(counts[i])]
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
