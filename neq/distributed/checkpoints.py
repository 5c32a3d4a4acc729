"""Checkpoints by ``torch.distributed.checkpoint``, saved by some processes and loaded by others."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.optim.steps import uncounted
from neq.sharding import is_dtensor
from neq.wrapped import model_in, optimizer_in
from neq_kernels.device.ranks import in_process_group


class Stateful(Protocol):
    """A Controller, for one."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingState:
    """Model, optimizer and Controller, for ``torch.distributed.checkpoint`` to save and to load.

    All processes save and load together. The model may be divided between them (``fully_shard``)
    or replicated (DDP), and as many or fewer or more processes may load it. The same processes
    continue with the same bits, each with its own buffers, such as the running statistics of a
    batch norm. Others take those of rank 0, and continue with the same bits from a checkpoint that
    was saved right after an epoch; from one in between, with the outputs that the model has when it
    is loaded.

    Args:
        model: The model, wrapped or not.
        optimizer: Its optimizer, or several.
        control: Its Controller.

    Examples:
        >>> import tempfile
        >>> import torch.distributed.checkpoint as dcp
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> control = neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5))
        >>> state = {"training": neq.distributed.TrainingState(model, optimizer, control)}
        >>> record = control.step()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dcp.save(state, checkpoint_id=f"{folder}/1")
        ...     record = control.step()
        ...     dcp.load(state, checkpoint_id=neq.distributed.latest_checkpoint(folder))
        >>> control.epoch
        1
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], control: Stateful
    ) -> None:
        several = optimizer if isinstance(optimizer, Iterable) else [optimizer]
        self.model, self.control = model, control
        self.optimizers = [optimizer_in(one) for one in several]

    def state_dict(self) -> dict[str, Any]:
        """What ``torch.distributed.checkpoint`` saves."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        with uncounted():  # for lack of any state, torch makes a step that moves nothing
            model, optimizer = get_state_dict(self.model, self.optimizers)
        # of what is not divided, torch saves any rank's
        buffers = self._buffers()
        digests = _of_all({name: _digest(buffer) for name, buffer in buffers.items()})
        own = {name: b.cpu() for name, b in buffers.items() if len({d[name] for d in digests}) > 1}
        packed = io.BytesIO()
        torch.save(_of_all({"control": self.control.state_dict(), "buffers": own}), packed)
        return {"model": model, "optimizer": optimizer, "ranks": packed.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``torch.distributed.checkpoint`` has loaded.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        from torch.distributed.checkpoint.state_dict import set_state_dict

        model, optimizer = state_dict["model"], state_dict["optimizer"]
        with uncounted():
            set_state_dict(
                self.model, self.optimizers, model_state_dict=model, optim_state_dict=optimizer
            )
        states = torch.load(io.BytesIO(state_dict["ranks"]), weights_only=True)
        rank, world = (dist.get_rank(), dist.get_world_size()) if in_process_group() else (0, 1)
        own, buffers = states[rank if len(states) == world else 0], self._buffers()
        for name, values in own["buffers"].items():
            buffers[name].copy_(values)
        self.control.load_state_dict(own["control"])

    def _buffers(self) -> dict[str, Tensor]:
        """What is saved of the model and is no parameter."""
        named = model_in(self.model).state_dict(keep_vars=True)
        return {
            name: t
            for name, t in named.items()
            if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and not is_dtensor(t)
        }


def _of_all(here: Any) -> list[Any]:
    """What each rank has."""
    if not in_process_group():
        return [here]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return everywhere


def _digest(t: Tensor) -> bytes:
    values = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).digest()


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that was finished last, of those in a folder; None if there is none.

    A process that is killed leaves a checkpoint behind that lacks its ``.metadata``, which torch
    writes in the end. That is none.

    Args:
        folder: Has a folder for each checkpoint.

    Examples:
        >>> neq.distributed.latest_checkpoint("no/such/folder") is None
        True
    """
    finished = [(file.stat().st_mtime_ns, file.parent) for file in Path(folder).glob("*/.metadata")]
    return max(finished)[1] if finished else None
