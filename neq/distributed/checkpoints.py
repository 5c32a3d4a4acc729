"""Checkpoints by ``torch.distributed.checkpoint``, saved by some processes and loaded by others."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from neq.optim.steps import uncounted
from neq.wrapped import optimizer_in
from neq_kernels.device.ranks import in_process_group


class Stateful(Protocol):
    """A Controller, for one."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingState:
    """Model, optimizer and Controller, for ``torch.distributed.checkpoint`` to save and to load.

    All processes save and load together. The model may be divided between them (``fully_shard``)
    or replicated (DDP), and as many or fewer or more processes may load it. The same processes
    continue with the same bits. Others do so from a checkpoint that was saved right after an
    epoch; from one in between, with the outputs that the model has when it is loaded.

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
        states: list[Any] = [self.control.state_dict()]
        if in_process_group():
            states *= dist.get_world_size()
            dist.all_gather_object(states, states[dist.get_rank()])
        packed = io.BytesIO()
        torch.save(states, packed)
        return {"model": model, "optimizer": optimizer, "control": packed.getvalue()}

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
        states = torch.load(io.BytesIO(state_dict["control"]), weights_only=True)
        rank, world = (dist.get_rank(), dist.get_world_size()) if in_process_group() else (0, 1)
        self.control.load_state_dict(states[rank if len(states) == world else 0])


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
