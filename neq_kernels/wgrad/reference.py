"""What ``linear_wgrad`` and ``conv_wgrad`` mean, in plain torch: the truth for every test.

A frozen row is exactly zero, also where the dense gradient would be infinite or NaN.
"""

from typing import Any

import torch
from torch import Tensor

from neq_kernels.wgrad.geometry import Conv


def active_mask(order: Tensor, count: Tensor) -> Tensor:
    """bool [n]: True for the first ``count`` neurons that ``order`` names."""
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[: int(count)]] = True
    return mask


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, count: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """dW = dYᵀ X [n, inputs] and db = Σ dY [n] (or [0] without bias), frozen order zero."""
    samples = dy.shape[:-1].numel()
    dy, x = dy.reshape(samples, dy.shape[-1]), x.reshape(samples, x.shape[-1])
    frozen = ~active_mask(order, count)
    dw = (dy.t() @ x).masked_fill(frozen[:, None], 0)
    db = dy.sum(0).masked_fill(frozen, 0)
    return torch.empty_like(weight).copy_(dw), (db if bias else db[:0]).to(weight.dtype)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``torch.convolution``'s weight and bias for a given dY, frozen order zero."""
    conv = Conv.of(*geometry)
    frozen = ~active_mask(order, count)
    with torch.enable_grad():
        w = weight.detach().to(dy.dtype).requires_grad_()
        y = torch.convolution(x.detach(), w, None, *conv)
        (dw,) = torch.autograd.grad(y, w, dy.detach())
    dw = dw.masked_fill(conv.spread(frozen, weight), 0)
    db = dy.transpose(0, 1).flatten(1).sum(1).masked_fill(frozen, 0)
    return torch.empty_like(weight).copy_(dw), (db if bias else db[:0]).to(weight.dtype)
