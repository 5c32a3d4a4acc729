"""``neq::linear_wgrad`` and ``neq::conv_wgrad``: schemas, checks and fakes."""

from typing import Any

import torch
from torch import Tensor

from neq_kernels.library import check_rows, define
from neq_kernels.wgrad import planner, reference
from neq_kernels.wgrad.geometry import Conv


def _check_alike(dy: Tensor, x: Tensor) -> None:
    if dy.dtype != x.dtype:
        raise ValueError(f"dy and x must have one dtype, got {dy.dtype} and {x.dtype}")
    if dy.device != x.device:
        raise ValueError(f"dy and x must be on one device, got {dy.device} and {x.device}")


def _check_linear(dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, count: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [neurons, inputs], got {list(weight.shape)}")
    rows, inputs = weight.shape
    neurons = _neurons(rows, order)
    if dy.dim() == 0 or dy.shape[-1] != neurons or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must be x's leading dimensions and {neurons} neurons, "
            f"got {list(dy.shape)} for x {list(x.shape)}"
        )
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"x must end in {inputs} inputs, got {list(x.shape)}")
    _check_alike(dy, x)
    check_rows(neurons, dy, order, count)


def _check_conv(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, count: Tensor, conv: Conv
) -> None:
    if not weight.dim() == dy.dim() == x.dim() or weight.dim() not in (3, 4, 5):
        raise ValueError(
            "dy, x and weight must all have 3, 4 or 5 dimensions (1-d, 2-d or 3-d convolution), "
            f"got {list(dy.shape)}, {list(x.shape)} and {list(weight.shape)}"
        )
    spatial = weight.dim() - 2
    for name in ("stride", "padding", "dilation", "output_padding"):
        if len(getattr(conv, name)) != spatial:
            raise ValueError(f"{name} must have {spatial} entries, got {getattr(conv, name)}")
    rows, in_channels = conv.channels(weight)
    can_be_compact = not conv.transposed or conv.groups == 1
    out_channels = _neurons(rows, order) if can_be_compact else rows
    if dy.shape[0] != x.shape[0] or dy.shape[1] != out_channels or x.shape[1] != in_channels:
        raise ValueError(
            f"weight {list(weight.shape)} with groups={conv.groups} maps {in_channels} channels "
            f"to {out_channels}, got x {list(x.shape)} and dy {list(dy.shape)}"
        )
    _check_alike(dy, x)
    check_rows(out_channels, dy, order, count)


def _neurons(rows: int, order: Tensor) -> int:
    """How many neurons there are. A weight with fewer rows is compact."""
    return max(rows, len(order)) if order.dim() == 1 else rows


def _check_granule(granule: int) -> None:
    if granule < 1:
        raise ValueError(f"granule must be at least 1, got {granule}")


def _check_active(k: int, rows: int) -> None:
    if k > rows:
        raise ValueError(f"weight must have a row for each of {k} active neurons, got {rows}")


def _nothing(weight: Tensor, rows: int, bias: bool) -> tuple[Tensor, Tensor]:
    """dW and db without an active neuron."""
    return torch.zeros_like(weight), weight.new_zeros(rows if bias else 0)


def _linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    *,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    _check_linear(dy, x, weight, order, count)
    _check_granule(granule)
    k = int(count)
    if k == 0:
        return _nothing(weight, len(weight), bias)
    _check_active(k, len(weight))
    return planner.linear_wgrad(dy, x, weight, order, k, bias, granule=granule)


def _conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    *geometry: Any,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    conv = Conv.of(*geometry)
    _check_conv(dy, x, weight, order, count, conv)
    _check_granule(granule)
    k = int(count)
    if k == 0:
        return _nothing(weight, conv.channels(weight)[0], bias)
    _check_active(k, conv.channels(weight)[0])
    return planner.conv_wgrad(dy, x, weight, order, k, bias, conv, granule=granule)


def _fake_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    *,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    _check_linear(dy, x, weight, order, count)
    return torch.empty_like(weight), weight.new_empty(len(weight) if bias else 0)


def _fake_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    count: Tensor,
    bias: bool,
    *geometry: Any,
    granule: int = 1,
) -> tuple[Tensor, Tensor]:
    conv = Conv.of(*geometry)
    _check_conv(dy, x, weight, order, count, conv)
    return torch.empty_like(weight), weight.new_empty(conv.channels(weight)[0] if bias else 0)


linear_wgrad = define(
    "linear_wgrad(Tensor dy, Tensor x, Tensor weight, Tensor order, Tensor count, bool bias,"
    " *, int granule=1) -> (Tensor, Tensor)",
    _linear_wgrad,
    _fake_linear_wgrad,
    reference.linear_wgrad,
)
conv_wgrad = define(
    "conv_wgrad(Tensor dy, Tensor x, Tensor weight, Tensor order, Tensor count, bool bias,"
    " int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding,"
    " int groups, *, int granule=1) -> (Tensor, Tensor)",
    _conv_wgrad,
    _fake_conv_wgrad,
    reference.conv_wgrad,
)
