"""accelerate."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from neq.controller import Controller


def prepare_controller(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    **options: Any,
) -> Controller:
    """A Controller for what ``accelerator.prepare`` returned.

    It is registered for checkpointing: ``save_state`` and ``load_state`` keep it, with model and
    optimizer. Give ``accelerator.log`` the ``figures`` of its records.

    Args:
        accelerator: The accelerator.
        model: The prepared model.
        optimizer: The prepared optimizer, or several.
        **options: Other arguments of ``neq.Controller``, such as ``probe`` and ``policy``.

    Returns:
        The Controller.

    Raises:
        ValueError: If the optimizer is DeepSpeed's.

    Examples:
        >>> from accelerate import Accelerator
        >>> from neq.integrations.accelerate import prepare_controller
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> policy = neq.LowestVelocity(0.25)
        >>> probe = torch.randn(4, 8)
        >>> control = prepare_controller(accelerator, model, optimizer, probe=probe, policy=policy)
        >>> record = control.step()  # after each epoch
        >>> accelerator.log(record.figures, step=record.epoch)
    """
    controller = Controller(model, optimizer=optimizer, **options)
    accelerator.register_for_checkpointing(controller)
    return controller
