"""What ``linear_wgrad`` and ``conv_wgrad`` mean, in plain torch. Every test compares with them.

A frozen row is exactly zero, also where the dense gradient would be infinite or NaN.

The gradient is shaped like the weight that is given. If that has a row for each neuron, so has the
gradient. If it has m rows, k <= m < n, it is compact: the rows of the gradient are those of the
active neurons, in their order, then zeros.
"""

import torch
from torch import Tensor

from neq_kernels.wgrad.geometry import Conv, full_shape, is_compact


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
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    *,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    """dW = dYᵀ X and db = Σ dY of a linear layer. Frozen rows are exactly zero.

    Args:
        dy: The gradient of the output, [..., n].
        x: The input, [..., inputs], in the same dtype.
        weight: [n, inputs], or a compact one [m, inputs]. Only its dtype, shape and strides are
            read.
        order: int64 [n]: a permutation of the neurons, the active ones first.
        count: int64 [], on the CPU: how many neurons are active.
        bias: Is db wanted?
        granule: The active neurons come in whole aligned granules of so many, a power of two. A
            backend is chosen by it; the gradients do not depend on it.

    Returns:
        dW in the dtype, shape and strides of ``weight``, and db with an entry for each of its
        rows, or [0] without ``bias``.

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
        >>> neq_kernels.linear_wgrad(dy, x, torch.empty(2, 2), order, count, True)  # compact
        (tensor([[ 1., 10.],
                [ 3., 30.]]), tensor([1., 3.]))
    """
    samples = dy.shape[:-1].numel()
    dy, x = dy.reshape(samples, dy.shape[-1]), x.reshape(samples, x.shape[-1])
    return _like(weight, dy.t() @ x, dy.sum(0), order, count, bias)


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
    *,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    """dW and db of ``torch.convolution`` for a given dY. Frozen rows are exactly zero.

    Args:
        dy: The gradient of the output, [N, n, *pixels] with one to three dimensions of pixels.
        x: The input, [N, inputs, *pixels], in the same dtype.
        weight: [n, inputs / groups, *kernel]; of a transposed convolution
            [inputs, n / groups, *kernel]. A compact one has fewer rows; if transposed, it has no
            groups. Only its dtype, shape and strides are read.
        order: int64 [n]: a permutation of the neurons, the active ones first.
        count: int64 [], on the CPU: how many neurons are active.
        bias: Is db wanted?
        stride: One entry for each dimension of pixels, as in the next two.
        padding: As in torch.
        dilation: As in torch.
        transposed: Is it a transposed convolution?
        output_padding: As in torch; zeros unless it is transposed.
        groups: As in torch.
        granule: As for ``linear_wgrad``.

    Returns:
        dW in the dtype, shape and strides of ``weight``, and db with an entry for each of its
        neurons, or [0] without ``bias``.

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
    with torch.enable_grad():
        w = x.new_empty(full_shape(weight, len(order), conv), requires_grad=True)
        y = torch.convolution(x.detach(), w, None, *conv)
        (dw,) = torch.autograd.grad(y, w, dy.detach())
    db = dy.transpose(0, 1).flatten(1).sum(1)
    return _like(weight, dw, db, order, count, bias, conv)


def _like(
    weight: Tensor,
    dw: Tensor,
    db: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    conv: Conv | None = None,
) -> tuple[Tensor, Tensor]:
    """dW and db of all neurons, with frozen rows zeroed or left out as ``weight`` is made."""
    if is_compact(weight, len(order), conv):
        dim, rows = int(conv is not None and conv.transposed), order[: int(count)]
        active = dw.index_select(dim, rows), db.index_select(0, rows)
        dw = dw.new_zeros(weight.shape)
        dw.narrow(dim, 0, len(rows)).copy_(active[0])
        db = db.new_zeros(weight.shape[dim])
        db[: len(rows)] = active[1]
    else:
        frozen = ~active_mask(order, count)
        dw = dw.masked_fill(frozen[:, None] if conv is None else conv.spread(frozen, weight), 0)
        db = db.masked_fill(frozen, 0)
    return torch.empty_like(weight).copy_(dw), (db if bias else db[:0]).to(weight.dtype)
