"""The transformers library's ``Trainer``."""

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neq.history import EpochRecord
from neq.integrations.base import ControllerCallback, Every
from neq.wrapped import optimizer_in

_KEY = "neq"  # of the state, in the first param_group of a saved optimizer


class NEqCallback(ControllerCallback, TrainerCallback):  # type: ignore[misc]
    """Chooses the neurons that train, while a transformers ``Trainer`` trains.

    The trainer logs the ``figures`` of each ``EpochRecord``: they are in its history and in what
    its progress bar prints. The state is part of the trainer's checkpoints, since it lies in that
    of the optimizer (``optimizer.pt``): one without it gives a warning. When training ends, all
    neurons train again, and the optimizer is as it was.

    Args:
        trainer: The trainer, which logs.
        probe: As for ``neq.Controller``: a dict of the model's arguments, a loader, ...
        every: When neurons are chosen: after each ``"epoch"``, or after so many steps.
        monitor: The name of the validation loss among the metrics of an evaluation, such as
            ``"eval_loss"``. ``BottomUp`` thaws when it gets worse.
        **options: Other arguments of ``neq.Controller``, such as ``policy``.

    Attributes:
        controller: The Controller of this training, or of the latest; None before the first.

    Raises:
        TypeError: If the Controller has no such argument.
        ValueError: If ``every`` is another value.

    Examples:
        >>> from transformers import Trainer, ViTConfig, ViTForImageClassification
        >>> from neq.integrations.transformers import NEqCallback
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> sizes |= dict(intermediate_size=8, image_size=4, patch_size=2, num_channels=1)
        >>> trainer = Trainer(ViTForImageClassification(ViTConfig(**sizes)))
        >>> probe = {"pixel_values": torch.randn(2, 1, 4, 4)}
        >>> trainer.add_callback(NEqCallback(trainer, probe, every=500))
    """

    def __init__(
        self,
        trainer: Trainer,
        probe: Any = None,
        *,
        every: Every = "epoch",
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(probe, every, options)
        self._trainer, self._monitor = trainer, monitor
        self._chosen_at = 0  # the step of the latest choice after an epoch
        self._logged: EpochRecord | None = None
        self._saving: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make the Controller."""
        self._finish()  # of a training that an exception ended
        optimizer = optimizer_in(kwargs["optimizer"])
        loaded = optimizer.param_groups[0].pop(_KEY, None)
        resumed = "the checkpoint that training resumes from" if state.global_step else None
        epochs, steps = state.num_train_epochs, state.max_steps
        self._chosen_at, self._logged = state.global_step, None
        self._start(kwargs["model"], optimizer, epochs, steps, resumed, loaded)
        self._saving = optimizer.register_state_dict_post_hook(self._save)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure and choose, if it is time to, before a checkpoint of this step is saved."""
        if self._every != "epoch":
            self._log()
        elif float(state.epoch).is_integer():
            self._end_epoch(state.global_step)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure and choose after an epoch that ends before its last step."""
        if self._every == "epoch":
            self._end_epoch(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell the Controller the validation loss."""
        if self._monitor is not None:
            self._tell(self._monitor, kwargs["metrics"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let go of the model."""
        self._finish()

    def _finish(self) -> None:
        super()._finish()
        if self._saving is not None:
            self._saving.remove()

    def _end_epoch(self, step: int) -> None:
        if step != self._chosen_at:
            self._chosen_at = step
            self._step()
            self._log()

    def _log(self) -> None:
        """Log the latest record, once."""
        record = self._record
        if record is not None and record is not self._logged:
            self._trainer.log(record.figures)
            self._logged = record

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][_KEY] = self._state()
