"""How an operator comes into being: ``define`` says its schema, what it does, and its fake.

``define`` + ``impl`` instead of ``custom_op``: a call costs a few microseconds less, and a small
layer saves no more than that. For the same reason the autograd formula stands outside, in ``neq``.

What works on active rows takes them as two tensors, so that a compiled graph sees the same shapes
whatever the mask:

    order  int64 [n], on the device of the others: a permutation of the neurons, the active first
           (ascending), then the frozen ones (ascending)
    count  int64 [], on the CPU: how many of them are active
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("neq", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The overload ``neq::<name>.default``, whose call skips the look-up of the packet."""
    name = schema.partition("(")[0]
    # A kernel's grid follows from the value of ``count``. A CUDA graph that torch.compile captures
    # by itself (mode="reduce-overhead") would keep the grid of the first mask for all others.
    tags = (torch.Tag.cudagraph_unsafe,) if " count" in schema else ()
    _library.define(schema, tags=tags)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neq::{name}", fake, lib=_library)
    return getattr(torch.ops.neq, name).default


def check_rows(neurons: int, like: Tensor, order: Tensor, count: Tensor, name: str = "dy") -> None:
    """Raise unless ``order`` and ``count`` can be those of so many neurons, beside ``like``.

    Their values are not looked at: that would wait for a GPU.
    """
    if order.dtype != torch.int64 or order.shape != (neurons,):
        raise ValueError(
            f"order must be int64 of shape [{neurons}], one entry per neuron, "
            f"got {order.dtype} {list(order.shape)}"
        )
    if order.device != like.device:
        raise ValueError(
            f"order must be on the device of {name}, {like.device}, got {order.device}"
        )
    if count.dtype != torch.int64 or count.dim() != 0 or count.device.type != "cpu":
        raise ValueError(
            f"count must be a 0-dim int64 tensor on the CPU, "
            f"got {count.dtype} {list(count.shape)} on {count.device}"
        )
