"""What the callbacks have in common: a Controller for the length of one training."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from neq.controller import Controller
from neq.history import EpochRecord

Every = Literal["epoch"] | int
"""When neurons are chosen: after each epoch, or after so many steps of the optimizer."""

# what the trainer knows, so that no user gives it
_TRAINERS = {"model", "optimizer", "probe", "every", "process_group"}
_OPTIONS = inspect.signature(Controller).parameters.keys() - _TRAINERS


class ControllerCallback:
    """Makes a Controller when training starts, and lets go of the model when it ends.

    Args:
        probe: As for ``neq.Controller``.
        every: When neurons are chosen.
        options: Other arguments of the Controller.

    Raises:
        TypeError: If the Controller has no such argument.
        ValueError: If ``every`` is another value.
    """

    def __init__(self, probe: Any, every: Every, options: Mapping[str, Any]) -> None:
        super().__init__()
        steps = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if every != "epoch" and not steps:
            raise ValueError(f"every must be 'epoch' or a number of steps, got {every!r}")
        if unknown := sorted(options.keys() - _OPTIONS):
            raise TypeError(f"NEqCallback takes {sorted(_OPTIONS)}, not {unknown}")
        self.controller: Controller | None = None
        self._probe, self._every, self._options = probe, every, dict(options)
        self._final: dict[str, Any] | None = None  # the state at the end of the latest training

    @property
    def _record(self) -> EpochRecord | None:
        """The latest record of this training."""
        return None if self.controller is None else self.controller.record

    def _start(
        self,
        model: nn.Module,
        optimizers: Any,
        epochs: float,
        steps: float,
        checkpoint: str | None,
        state: dict[str, Any] | None,
    ) -> None:
        """Begin a training.

        Args:
            model: The model.
            optimizers: One or several.
            epochs: How many epochs the training has in all; not finite if it is not known.
            steps: How many steps it has.
            checkpoint: What the training resumes from, for a warning; None for a new one.
            state: The state in that checkpoint; None if there is none.
        """
        self._final = None
        every = None if self._every == "epoch" else self._every
        known = epochs if every is None else steps / every
        options = {"epochs": int(known) if 1 <= known < 2**31 else None, **self._options}
        # a policy may remember what it has seen, and the next training starts as this one
        options["policy"] = copy.deepcopy(options.get("policy"))
        self.controller = Controller(
            model, optimizer=optimizers, probe=self._probe, every=every, **options
        )
        if state is not None:
            self.controller.load_state_dict(state)
        elif checkpoint is not None:
            warnings.warn(
                f"{checkpoint} holds no state of neq: the choice of neurons starts over, with all "
                "of them active",
                stacklevel=2,
            )

    def _tell(self, monitor: str, metrics: Mapping[str, Any]) -> None:
        """Tell the Controller the validation loss, one of some metrics."""
        if self.controller is None or self._final is not None:
            return  # outside of training
        if monitor not in metrics:
            raise ValueError(f"monitor: {monitor!r} is not among the metrics {sorted(metrics)}")
        self.controller.loss = float(metrics[monitor])

    def _step(self) -> None:
        """Measure and choose after an epoch."""
        if self.controller is None:
            raise RuntimeError(
                "NEqCallback: an epoch ended before training started, when the Controller is made: "
                "give the callback to the trainer, which calls it at the start too"
            )
        self.controller.step(self.controller.loss)

    def _state(self) -> dict[str, Any]:
        """What ``_start`` needs to continue; nothing before the first training."""
        if self._final is not None:
            return self._final
        return {} if self.controller is None else self.controller.state_dict()

    def _finish(self) -> None:
        """End the training: all neurons train again, and no optimizer is guarded."""
        if self.controller is not None and self._final is None:
            self._final = self.controller.state_dict()
            self.controller.remove()
