"""The operators: schema, checks and fake of each. What they mean is in ``reference.py``.

What works on active rows takes them as two tensors, so that a compiled graph sees the same shapes
whatever the mask:

    rows   int64 [n], on the device of the others: a permutation of the neurons, the active first
           (ascending), then the frozen ones (ascending)
    count  int64 [], on the CPU: how many of them are active

``define`` + ``impl`` instead of ``custom_op``: a call costs a few microseconds less, and a small
layer saves no more than that. For the same reason the autograd formula stands outside, in ``neq``.
"""

from typing import Any

import torch
from torch import Tensor

from neq_kernels.similarity import planner as similarity
from neq_kernels.step import planner as row_step
from neq_kernels.step.options import SGD, AdamW
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv

_lib = torch.library.Library("neq", "DEF")

_lib.define(
    "linear_wgrad(Tensor dy, Tensor x, Tensor weight, Tensor rows, Tensor count, bool bias)"
    " -> (Tensor, Tensor)"
)
_lib.define(
    "conv_wgrad(Tensor dy, Tensor x, Tensor weight, Tensor rows, Tensor count, bool bias,"
    " int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding,"
    " int groups) -> (Tensor, Tensor)"
)
_lib.define(
    "row_similarity(Tensor current, Tensor previous, int channel_dim, bool per_sample) -> Tensor"
)
_lib.define(
    "sgd_rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] rows,"
    " Tensor[] counts, Tensor lr, float momentum, float dampening, float weight_decay,"
    " bool nesterov, bool maximize, bool first) -> ()"
)
_lib.define(
    "adamw_rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] rows,"
    " Tensor[] counts, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
    " bool amsgrad, bool maximize) -> ()"
)


def _check_rows(neurons: int, dy: Tensor, rows: Tensor, count: Tensor, beside: str = "dy") -> None:
    if rows.dtype != torch.int64 or rows.shape != (neurons,):
        raise ValueError(
            f"rows must be int64 of shape [{neurons}], one entry per neuron, "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    if rows.device != dy.device:
        raise ValueError(f"rows must be on the device of {beside}, {dy.device}, got {rows.device}")
    if count.dtype != torch.int64 or count.dim() != 0 or count.device.type != "cpu":
        raise ValueError(
            f"count must be a 0-dim int64 tensor on the CPU, "
            f"got {count.dtype} {list(count.shape)} on {count.device}"
        )


def _check_alike(dy: Tensor, x: Tensor) -> None:
    if dy.dtype != x.dtype:
        raise ValueError(f"dy and x must have one dtype, got {dy.dtype} and {x.dtype}")
    if dy.device != x.device:
        raise ValueError(f"dy and x must be on one device, got {dy.device} and {x.device}")


def _check_linear(dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, count: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [neurons, inputs], got {list(weight.shape)}")
    neurons, inputs = weight.shape
    if dy.dim() == 0 or dy.shape[-1] != neurons or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must be x's leading dimensions and {neurons} neurons, "
            f"got {list(dy.shape)} for x {list(x.shape)}"
        )
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"x must end in {inputs} inputs, got {list(x.shape)}")
    _check_alike(dy, x)
    _check_rows(neurons, dy, rows, count)


def _check_conv(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, count: Tensor, conv: Conv
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
    out_channels, in_channels = conv.channels(weight)
    if dy.shape[0] != x.shape[0] or dy.shape[1] != out_channels or x.shape[1] != in_channels:
        raise ValueError(
            f"weight {list(weight.shape)} with groups={conv.groups} maps {in_channels} channels "
            f"to {out_channels}, got x {list(x.shape)} and dy {list(dy.shape)}"
        )
    _check_alike(dy, x)
    _check_rows(out_channels, dy, rows, count)


def _check_similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> None:
    for name, y in (("current", current), ("previous", previous)):
        if not y.is_floating_point():
            raise TypeError(f"{name} must be of a real floating-point dtype, got {y.dtype}")
    if current.shape != previous.shape:
        raise ValueError(
            f"current and previous must have one shape, "
            f"got {list(current.shape)} and {list(previous.shape)}"
        )
    if current.device != previous.device:
        raise ValueError(
            f"current and previous must be on one device, got {current.device} and "
            f"{previous.device}"
        )
    dims = current.dim()
    if not -dims <= channel_dim < dims:
        raise ValueError(
            f"channel_dim must be a dimension of {list(current.shape)}, got {channel_dim}"
        )
    if per_sample and channel_dim in (0, -dims):
        raise ValueError(
            "per_sample: dimension 0 holds the samples, so channel_dim must be another one, "
            f"got {channel_dim} for {list(current.shape)}"
        )


def _check_step(
    params: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    lr: Tensor,
    steps: list[Tensor] | None = None,
    **alike: list[Tensor],
) -> None:
    """``alike``: lists of tensors shaped like the parameters, under their names."""
    lists = {"rows": rows, "counts": counts, **({"steps": steps} if steps is not None else {})}
    for name, tensors in (lists | alike).items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{name} must have one entry for each of the {len(params)} params, "
                f"got {len(tensors)}"
            )
    if lr.dim() != 0:
        raise ValueError(f"lr must have no dimensions, got {list(lr.shape)}")
    for i, p in enumerate(params):
        if p.dim() == 0 or not p.is_floating_point():
            raise ValueError(
                f"params[{i}] must be [neurons, ...] and floating point, "
                f"got {list(p.shape)} {p.dtype}"
            )
        for name, tensors in alike.items():
            t = tensors[i]
            if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
                raise ValueError(
                    f"{name}[{i}] must be like params[{i}], {list(p.shape)} {p.dtype} on "
                    f"{p.device}, got {list(t.shape)} {t.dtype} on {t.device}"
                )
        _check_rows(p.shape[0], p, rows[i], counts[i], f"params[{i}]")


def _check_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    *options: Any,
) -> None:
    o = SGD(*options)
    if o.momentum == 0 and momentum_buffers:
        raise ValueError("momentum_buffers must be empty without momentum")
    buffers = {"momentum_buffers": momentum_buffers} if o.momentum else {}
    _check_step(params, rows, counts, o.lr, grads=grads, **buffers)


def _check_adamw(
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
    o = AdamW(*options)
    if max_exp_avg_sqs and not o.amsgrad:
        raise ValueError("max_exp_avg_sqs must be empty without amsgrad")
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if o.amsgrad:
        moments["max_exp_avg_sqs"] = max_exp_avg_sqs
    _check_step(params, rows, counts, o.lr, steps, grads=grads, **moments)


def _nothing(weight: Tensor, biases: int) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(weight), weight.new_zeros(biases)


def _linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, count: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    _check_linear(dy, x, weight, rows, count)
    k = int(count)
    if k == 0:
        return _nothing(weight, len(rows) if bias else 0)
    return planner.linear_wgrad(dy, x, weight, rows, k, bias)


def _conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    count: Tensor,
    bias: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    conv = Conv.of(*geometry)
    _check_conv(dy, x, weight, rows, count, conv)
    k = int(count)
    if k == 0:
        return _nothing(weight, len(rows) if bias else 0)
    return planner.conv_wgrad(dy, x, weight, rows, k, bias, conv)


def _row_similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> Tensor:
    _check_similarity(current, previous, channel_dim, per_sample)
    return similarity.row_similarity(current, previous, channel_dim % current.dim(), per_sample)


def _sgd_rows_(*args: Any) -> None:
    _check_sgd(*args)
    row_step.sgd_rows_(*args[:5], options=SGD(*args[5:]))


def _adamw_rows_(*args: Any) -> None:
    _check_adamw(*args)
    row_step.adamw_rows_(*args[:8], options=AdamW(*args[8:]))


def _fake_linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, rows: Tensor, count: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    _check_linear(dy, x, weight, rows, count)
    return torch.empty_like(weight), weight.new_empty(len(rows) if bias else 0)


def _fake_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    count: Tensor,
    bias: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor]:
    _check_conv(dy, x, weight, rows, count, Conv.of(*geometry))
    return torch.empty_like(weight), weight.new_empty(len(rows) if bias else 0)


def _fake_row_similarity(
    current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool
) -> Tensor:
    _check_similarity(current, previous, channel_dim, per_sample)
    samples = current.shape[:1] if per_sample else ()
    return current.new_empty((3, *samples, current.shape[channel_dim]), dtype=torch.float64)


for _name, _impl, _fake in (
    ("linear_wgrad", _linear_wgrad, _fake_linear_wgrad),
    ("conv_wgrad", _conv_wgrad, _fake_conv_wgrad),
    ("row_similarity", _row_similarity, _fake_row_similarity),
    ("sgd_rows_", _sgd_rows_, _check_sgd),
    ("adamw_rows_", _adamw_rows_, _check_adamw),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neq::{_name}", _fake, lib=_lib)

# What ``neq`` calls: the overloads themselves, which skips the look-up of the packet.
linear_wgrad = torch.ops.neq.linear_wgrad.default
conv_wgrad = torch.ops.neq.conv_wgrad.default
row_similarity = torch.ops.neq.row_similarity.default
sgd_rows_ = torch.ops.neq.sgd_rows_.default
adamw_rows_ = torch.ops.neq.adamw_rows_.default
