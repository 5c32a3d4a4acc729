"""DDP that sends the gradients of active neurons only."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from neq.layers.base import NeuronLayer
from neq.optim.frozen import Frozen, frozen_in

Reduced = torch.futures.Future[Tensor]
Hook = Callable[[Any, Any], Reduced]


def send_active_rows(
    ddp: DistributedDataParallel, wrapper: Callable[[Hook], Hook] | None = None
) -> None:
    """Let DDP exchange the gradients of active neurons only.

    Those of frozen neurons are zero on every rank, and stay so without being sent. The others are
    averaged as DDP does it by itself. A bucket of parameters without frozen neurons is sent as it
    is. All ranks call this, after ``neq.convert``, and before the first backward pass.

    Set the same masks on all ranks, as a ``Controller`` does: otherwise the backward pass raises a
    ``ValueError``. While gradients are accumulated (``no_sync``), leave the masks as they are.

    Args:
        ddp: The model.
        wrapper: One of torch's that compresses what a hook sends, such as
            ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_wrapper``.

    Raises:
        TypeError: If ``ddp`` is no DistributedDataParallel.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = neq.convert(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
        >>> ddp = nn.parallel.DistributedDataParallel(model)
        >>> neq.distributed.send_active_rows(ddp)
        >>> model[0].set_active([1])  # of each row of this layer's 4, DDP sends one
        >>> ddp(torch.randn(16, 8)).sum().backward()
        >>> dist.destroy_process_group()
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"send_active_rows takes a DistributedDataParallel, got {type(ddp).__name__}"
        )
    ddp.register_comm_hook(ActiveRows(ddp), _hook if wrapper is None else wrapper(_hook))


class ActiveRows:
    """What the hook knows of a model.

    Args:
        ddp: The model.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.group = ddp.process_group
        self._modules = list(ddp.module.modules())
        layers = (module for module in self._modules if isinstance(module, NeuronLayer))
        self._layers = list({id(layer.active): layer for layer in layers}.values())
        # masks are compared between processors, so that none of these waits for its GPU
        self._compares = self.group
        if dist.get_backend(self.group) != "gloo":
            ranks = dist.get_process_group_ranks(self.group)
            self._compares = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._frozen: dict[Tensor, Frozen] = {}

    def begin(self) -> None:
        """Before the first bucket of a backward pass.

        Raises:
            ValueError: If the ranks have different masks.
        """
        mine = torch.tensor([layer.active.digest for layer in self._layers], dtype=torch.int64)
        extremes = torch.stack([mine, -mine])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._compares)
        for layer, high, low in zip(self._layers, *extremes.tolist(), strict=True):
            if high != -low:
                raise ValueError(
                    f"layer {layer.layer_name!r}: the ranks disagree on which of its neurons "
                    "train, and send_active_rows needs the same set_active on all of them"
                )
        self._frozen = frozen_in(self._modules)

    def rows_of(self, bucket: Any) -> list[tuple[Tensor, int, Tensor | None]]:
        """What to send of a bucket: for each gradient, rows along a dimension; None for all."""
        found: list[tuple[Tensor, int, Tensor | None]] = []
        for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            frozen = self._frozen.get(p)
            if frozen is None or frozen.dim is None:
                found.append((grad, 0, None))
            else:
                found.append((_as_in_bucket(grad, p), frozen.dim, frozen.order[: frozen.k]))
        return found


# torch insists on this annotation, and does not declare the name to type checkers
def _hook(state: ActiveRows, bucket: dist.GradBucket) -> Reduced:  # type: ignore[name-defined]
    if bucket.index() == 0:
        state.begin()
    parts = [] if bucket.buffer().is_sparse else state.rows_of(bucket)
    if all(rows is None for _, _, rows in parts):
        return allreduce_hook(state.group, bucket)
    sent = [g if rows is None else g.index_select(dim, rows) for g, dim, rows in parts]
    packed = torch.cat([values.reshape(-1) for values in sent])
    packed.div_(state.group.size())

    def put_back(reduced: Any) -> Any:
        pieces = reduced.value()[0].split([values.numel() for values in sent])
        for (grad, dim, rows), values, piece in zip(parts, sent, pieces, strict=True):
            if rows is None:
                grad.copy_(piece.view(grad.shape))
            else:
                grad.index_copy_(dim, rows, piece.view(values.shape))
        return bucket.buffer()

    reduction = dist.all_reduce(packed, group=state.group, async_op=True)
    future: Reduced = reduction.get_future().then(put_back)
    return future


def _as_in_bucket(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient with the strides that it has in DDP's bucket: those of a dense parameter."""
    strides = torch.empty_like(p, device="meta").stride()
    return grad.as_strided(p.shape, strides) if strides == p.stride() else grad
