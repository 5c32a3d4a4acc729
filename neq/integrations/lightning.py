"""Lightning."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from neq.integrations.base import ControllerCallback, Every


class NEqCallback(ControllerCallback, Callback):  # type: ignore[misc]
    """Chooses the neurons that train, while a Lightning ``Trainer`` fits.

    It logs the ``figures`` of each ``EpochRecord``. The progress bar shows ``neq/frozen_share`` and
    ``neq/step_saved``. Its state is part of Lightning's checkpoints: one without it gives a
    warning. When fitting ends, all neurons train again, and the optimizers are as they were.

    Args:
        probe: As for ``neq.Controller``: a tensor, a dict, a loader, ... The module's ``forward``
            gets it.
        every: When neurons are chosen: after each ``"epoch"``, or after so many steps of the first
            optimizer.
        monitor: The name of the validation loss among what the module logs. ``BottomUp`` thaws when
            it gets worse.
        **options: Other arguments of ``neq.Controller``, such as ``policy``.

    Attributes:
        controller: The Controller of this training, or of the latest; None before the first.

    Raises:
        TypeError: If the Controller has no such argument.
        ValueError: If ``every`` is another value.

    Examples:
        >>> import lightning
        >>> from neq.integrations.lightning import NEqCallback
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        ...
        ...     def forward(self, x):
        ...         return self.layers(x)
        ...
        ...     def training_step(self, x):
        ...         return self(x).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> x = torch.randn(32, 8)
        >>> neurons = NEqCallback(x[:4], policy=neq.LowestVelocity(0.25))
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
        >>> quiet |= dict(enable_progress_bar=False, accelerator="cpu")
        >>> trainer = lightning.Trainer(max_epochs=2, callbacks=[neurons], **quiet)
        >>> trainer.fit(Classifier(), torch.utils.data.DataLoader(x, batch_size=8))
        >>> neurons.controller.record.frozen_share
        0.75
    """

    def __init__(
        self,
        probe: Any = None,
        *,
        every: Every = "epoch",
        monitor: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(probe, every, options)
        self._monitor = monitor
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What Lightning keeps in a checkpoint."""
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint when fitting starts."""
        self._loaded = state_dict or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the Controller."""
        loaded, self._loaded = self._loaded, None
        epochs, steps = trainer.max_epochs or -1, trainer.estimated_stepping_batches
        self._start(pl_module, trainer.optimizers, epochs, steps, trainer.ckpt_path, loaded)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Log, if neurons are chosen by steps. The logger takes it as often as other figures."""
        if self._every != "epoch":
            self._log(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and choose, if neurons are chosen by epochs, and log."""
        if self._every == "epoch":
            self._step()
            self._log(pl_module, sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the Controller the validation loss."""
        if self._monitor is not None and not trainer.sanity_checking:
            self._tell(self._monitor, trainer.callback_metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the module."""
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the module."""
        self._finish()

    def _log(self, module: LightningModule, **options: Any) -> None:
        if self._record is not None:
            for name, value in self._record.figures.items():
                in_bar = name in ("neq/frozen_share", "neq/step_saved")
                module.log(name, value, prog_bar=in_bar, **options)
