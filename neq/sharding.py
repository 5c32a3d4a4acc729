"""Parameters that are divided between processes: DTensors, as ``fully_shard`` makes them."""

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn


def is_dtensor(p: Tensor) -> bool:
    """Is it a DTensor? Does not import DTensor, which takes long."""
    return type(p).__name__ == "DTensor"


def is_divided(model: nn.Module) -> bool:
    """Is a parameter of it divided between processes?"""
    return any(map(is_dtensor, model.parameters()))


def whole(t: Tensor) -> Tensor:
    """Of a DTensor the values of all processes, which call this together; else ``t`` itself."""
    return cast(Any, t).full_tensor() if is_dtensor(t) else t


def gather(y: Tensor, weight: Tensor, dim: int, size: int) -> Tensor:
    """A layer's output, whole, under tensor parallelism. The processes call this together.

    Args:
        y: The output, or this process's part of it.
        weight: The layer's weight. Where it is no DTensor, the output is whole.
        dim: The dimension of ``y`` that is divided if the weight's neurons are.
        size: How large that dimension is in one piece.
    """
    if is_dtensor(weight) and not is_dtensor(y) and y.shape[dim] != size:
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size([*y.shape[:dim], size, *y.shape[dim + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        mesh = cast(Any, weight).device_mesh
        y = DTensor.from_local(y.contiguous(), mesh, [Shard(dim)], shape=shape, stride=stride)
    return whole(y)


def local(t: Tensor) -> Tensor:
    """Of a DTensor the values of this process, in the same memory; else ``t`` itself.

    To be called without gradients.
    """
    return cast(Any, t).to_local() if is_dtensor(t) else t


def beside(p: Any, values: Tensor) -> Tensor:
    """``values``, which every process has whole, for operations with ``p``."""
    if not is_dtensor(p):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * p.device_mesh.ndim
    return DTensor.from_local(values, p.device_mesh, everywhere, run_check=False)


def part(values: Tensor, p: Any, dim: int | None = None) -> Tensor:
    """This process's part of ``values``, which every process has whole.

    Args:
        values: In the shape of ``p``; or, with ``dim``, one for each index of that dimension.
        p: The DTensor as which they are divided.
        dim: A dimension of ``p``.

    Raises:
        ValueError: If ``p`` is neither replicated nor divided into contiguous pieces.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    for placement in p.placements:
        if not isinstance(placement, Replicate) and type(placement) is not Shard:
            raise ValueError(
                f"divided between processes as {placement}; it must be replicated, or "
                "divided by one kind of parallelism"
            )
        if dim is not None and isinstance(placement, Shard):
            placement = Shard(0) if placement.dim % p.dim() == dim else Replicate()
        placements.append(placement)
    copies: Any = beside(p, values)
    return local(copies.redistribute(placements=placements))


def is_fully_sharded(module: nn.Module) -> bool:
    """Was ``fully_shard`` called with it?"""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard(model: nn.Module) -> None:
    """Divide parameters again that a forward has left whole."""
    for module in model.modules():
        if is_fully_sharded(module):
            cast(Any, module).reshard()
