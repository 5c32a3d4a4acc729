"""Defines operators: ``define`` takes the schema of one, its implementation and its fake.

It uses ``torch.library``'s ``define`` and ``impl`` and not ``custom_op``, whose calls cost a few
microseconds more: as much as a small layer saves. For the same reason the autograd formula is not
part of the operator, but in ``neq``.

Operators on active rows take them as two tensors, whose shapes no mask changes. So a compiled graph
fits every mask:

    order  int64 [n], on the device of the others: a permutation of the neurons, first the active
           ones (ascending), then the frozen ones (ascending)
    count  int64 [], on the CPU: how many neurons are active
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("neq", "DEF")


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], meaning: Callable[..., Any]
) -> Any:
    """The overload ``neq::<name>.default``, whose call needs no look-up of an overload.

    Args:
        schema: The operator's name and arguments, as ``torch.library`` takes them.
        run: The implementation for all devices.
        fake: Returns tensors like the results, without values.
        meaning: The reference, whose docstring the operator gets.
    """
    name = schema.partition("(")[0]
    # A kernel's grid follows from the value of ``count``. A CUDA graph that torch.compile captures
    # by itself (mode="reduce-overhead") would keep the grid of the first mask for all others.
    tags = (torch.Tag.cudagraph_unsafe,) if " count" in schema else ()
    _library.define(schema, tags=tags)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neq::{name}", fake, lib=_library)
    operator = getattr(torch.ops.neq, name).default
    operator.__doc__ = meaning.__doc__
    return operator


def check_rows(neurons: int, like: Tensor, order: Tensor, count: Tensor, name: str = "dy") -> None:
    """Raise a ValueError unless ``order`` and ``count`` fit the neurons and ``like``'s device.

    Their values are not checked: that would wait for a GPU.

    Args:
        neurons: How many neurons there are.
        like: A tensor on the device where ``order`` has to be.
        order: To be checked.
        count: To be checked.
        name: How errors name ``like``.
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
