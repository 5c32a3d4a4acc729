"""A learning rate that follows the neurons, and a sign to stop."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from neq.controller import Controller


class ReduceLROnEquilibrium(ReduceLROnPlateau):
    """Reduces the learning rate when the velocities of neurons have levelled off, after NeVe.

    Like torch's ``ReduceLROnPlateau``, but without a validation pass: what has to fall is the mean
    squared change of the velocities from one epoch to the next, over the neurons that were measured
    in both. The Controller has measured them already.

    NeVe has velocities of its own, measured on noise (``neq.NoiseProbe``). Here they are those of
    the Controller's policy.

    Args:
        optimizer: The optimizer whose learning rates are reduced.
        control: The Controller, with a probe. ``neq.Everything()`` as its policy freezes nothing.
        factor: What learning rates are multiplied by.
        patience: How many epochs without an improvement are borne. The next one reduces.
        stop_below: ``should_stop`` is set while the mean |v| is below this. 1e-3 is NeVe's. In
            epochs of a few steps, or with a ``WeightProbe``, velocities are small from the start.
        **options: Other arguments of ``ReduceLROnPlateau``: ``threshold``, ``threshold_mode``,
            ``cooldown``, ``min_lr``, ``eps``.

    Attributes:
        should_stop: Do neurons hardly move any more?

    Raises:
        ValueError: If the Controller has no probe, ``factor`` is not below 1, or ``stop_below`` is
            negative.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> control = neq.Controller(model, optimizer=optimizer, probe=torch.randn(4, 8))
        >>> scheduler = neq.ReduceLROnEquilibrium(optimizer, control, patience=2)
        >>> for _ in range(5):  # epochs in which nothing is trained
        ...     record = control.step()
        ...     scheduler.step()
        >>> scheduler.should_stop, scheduler.get_last_lr()
        (True, [0.05])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        control: Controller,
        factor: float = 0.5,
        patience: int = 10,
        *,
        stop_below: float = 1e-3,
        **options: Any,
    ) -> None:
        if control.probe is None:
            raise ValueError(
                "ReduceLROnEquilibrium follows velocities: give the Controller a probe, also if "
                "its policy needs none"
            )
        if not stop_below >= 0:
            raise ValueError(f"stop_below must be at least 0, got {stop_below}")
        super().__init__(optimizer, factor=factor, patience=patience, **options)
        self._control = control
        self._measured = control.epoch  # the latest epoch that it has seen
        self.stop_below, self.should_stop = stop_below, False

    def step(self) -> None:  # type: ignore[override]
        """After the Controller has measured an epoch. If it has not, nothing happens.

        Raises:
            ValueError: If its measure gives no velocities.
        """
        record = self._control.record
        if record is None or record.epoch == self._measured:
            return
        if record.mean_speed is None:
            raise ValueError(
                "ReduceLROnEquilibrium follows velocities: the measure of the policy "
                f"{type(self._control.policy).__name__} gives none"
            )
        self._measured = record.epoch
        self.should_stop = record.mean_speed < self.stop_below
        if record.velocity_change is not None:
            super().step(record.velocity_change)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue."""
        return {key: value for key, value in super().state_dict().items() if key != "_control"}
