"""What ``linear_wgrad`` and ``conv_wgrad`` mean, in plain torch. Every test compares with them.

A frozen row is exactly zero, also where the dense gradient would be infinite or NaN.
"""

import torch
from torch import Tensor

from neq_kernels.wgrad.geometry import Conv


def active_mask(order: Tensor, count: Tensor) -> Tensor:
    """Which neurons are active: the first ``count`` of ``order``.

    Args:
        order: int64 [n]: a permutation of the neurons, the active ones first.
        count: int64 []: how many neurons are active.

    Returns:
        bool [n].
    """
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[: int(count)]] = True
    return mask


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, count: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """dW = dYᵀ X and db = Σ dY of a linear layer. Frozen rows are exactly zero.

    Args:
        dy: The gradient of the output, [..., n].
        x: The input, [..., inputs], in the same dtype.
        weight: [n, inputs]. Only its dtype, shape and strides are read.
        order: int64 [n]: a permutation of the neurons, the active ones first.
        count: int64 [], on the CPU: how many neurons are active.
        bias: Is db wanted?

    Returns:
        dW in the dtype and strides of ``weight``, and db [n], or [0] without ``bias``.

    Examples:
        >>> dy, x = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 10.0]])
        >>> order, count = torch.tensor([0, 2, 1]), torch.tensor(2)
        >>> dw, db = neq_kernels.linear_wgrad(dy, x, torch.empty(3, 2), order, count, True)
        >>> dw
        tensor([[ 1., 10.],
                [ 0.,  0.],
                [ 3., 30.]])
        >>> db
        tensor([1., 0., 3.])
    """
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
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """dW and db of ``torch.convolution`` for a given dY. Frozen rows are exactly zero.

    Args:
        dy: The gradient of the output, [N, n, *pixels] with one to three dimensions of pixels.
        x: The input, [N, inputs, *pixels], in the same dtype.
        weight: [n, inputs / groups, *kernel]; of a transposed convolution
            [inputs, n / groups, *kernel]. Only its dtype, shape and strides are read.
        order: int64 [n]: a permutation of the neurons, the active ones first.
        count: int64 [], on the CPU: how many neurons are active.
        bias: Is db wanted?
        stride: One entry for each dimension of pixels, as in the next two.
        padding: As in torch.
        dilation: As in torch.
        transposed: Is it a transposed convolution?
        output_padding: As in torch; zeros unless it is transposed.
        groups: As in torch.

    Returns:
        dW in the dtype and strides of ``weight``, and db [n], or [0] without ``bias``.

    Examples:
        >>> dy, x = torch.ones(1, 2, 3), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        >>> order, count = torch.tensor([1, 0]), torch.tensor(1)
        >>> geometry = [1], [0], [1], False, [0], 1
        >>> dw, db = neq_kernels.conv_wgrad(
        ...     dy, x, torch.empty(2, 1, 2), order, count, True, *geometry
        ... )
        >>> dw
        tensor([[[0., 0.]],
        <BLANKLINE>
                [[6., 9.]]])
        >>> db
        tensor([0., 3.])
    """
    conv = Conv.of(stride, padding, dilation, transposed, output_padding, groups)
    frozen = ~active_mask(order, count)
    with torch.enable_grad():
        w = weight.detach().to(dy.dtype).requires_grad_()
        y = torch.convolution(x.detach(), w, None, *conv)
        (dw,) = torch.autograd.grad(y, w, dy.detach())
    dw = dw.masked_fill(conv.spread(frozen, weight), 0)
    db = dy.transpose(0, 1).flatten(1).sum(1).masked_fill(frozen, 0)
    return torch.empty_like(weight).copy_(dw), (db if bias else db[:0]).to(weight.dtype)
