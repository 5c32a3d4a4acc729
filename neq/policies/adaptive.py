"""An eps that descends its own gradient, after SCoTTi."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq.policies.base import Choice, Motion, Training
from neq.policies.granules import of_neurons
from neq.policies.threshold import Equilibrium

Every = Literal["epoch", "step"]
"""When eps is updated, and the neurons are chosen by it."""


class AdaptiveEps(Equilibrium):
    """``Equilibrium`` with an eps that gradient descent adapts to the loss, after SCoTTi.

    An update w ← w - u is made where |v| exceeds eps. With the step function taken as identity in
    the backward pass, dL/deps at a step is Σ g · u over the neurons that train. There g is the
    gradient in this step, and u the update made by the last one. While successive updates agree,
    eps falls and more neurons train. When they undo each other, eps rises.

    With ``every="epoch"`` the sum is collected in every step; after each epoch eps is updated, and
    the neurons are chosen. With ``"step"``, as published, eps is updated in each step of an
    optimizer, and the neurons are chosen by it for the next: a weight gradient that is to be
    skipped must be known before the backward pass. Velocities are those of the last epoch. The host
    then waits for the device in each step. A record shows the choice at the end of its epoch.

    This takes memory for a copy of the layers' parameters.

    Args:
        eps: The threshold at first.
        mu: The momentum of the velocity.
        rate: The learning rate of eps.
        every: ``"epoch"`` or ``"step"``.
        **options: Other arguments of ``Equilibrium``.

    Raises:
        ValueError: If ``rate`` is not positive, or ``every`` is another value. The Controller
            raises it if it has no optimizer.

    Examples:
        >>> policy = neq.AdaptiveEps(eps=0.05, rate=1e-4, every="step")
    """

    def __init__(
        self,
        eps: float = 0.05,
        mu: float = 0.5,
        *,
        rate: float = 1e-4,
        every: Every = "epoch",
        **options: Any,
    ):
        super().__init__(eps, mu, **options)
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        if every not in get_args(Every):
            raise ValueError(f"every must be 'epoch' or 'step', got {every!r}")
        self.rate, self.every = rate, every
        self._descent: list[_Descent] = []
        self._training: Training
        # with every="step": |v| of the neurons of each group, after the first choice
        self._speeds: list[Tensor] = []

    def attach(self, training: Training) -> None:
        if not training.optimizers:
            raise ValueError(
                "AdaptiveEps learns from the optimizer's steps: give the Controller its optimizer"
            )
        self._training, self._speeds = training, []
        learned = {
            p
            for group in training.layers.values()
            for p in (group.first.weight, group.first.bias)
            if p is not None
        }
        for optimizer in training.optimizers:
            owned = [p for group in optimizer.param_groups for p in group["params"] if p in learned]
            if owned:
                self._descent.append(_Descent(optimizer, owned))
                if self.every == "step":
                    self._descent[-1].after_each_step(self._descend_and_choose)

    def detach(self) -> None:
        for descent in self._descent:
            descent.remove()
        self._descent = []

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        self._descend()
        if self.every == "step":
            self._speeds = [of_neurons(layer.velocity.abs(), layer) for layer in layers]
        return super().choose(layers, epoch)

    def state_dict(self) -> dict[str, Any]:
        descent = [d.state_dict() for d in self._descent]
        return {"eps": self.eps, "descent": descent, "speeds": [v.clone() for v in self._speeds]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.eps = state["eps"]
        self._speeds = [v.clone() for v in state["speeds"]]
        for descent, saved in zip(self._descent, state["descent"], strict=True):
            descent.load_state_dict(saved)

    def _descend(self) -> None:
        slope = sum(descent.take() for descent in self._descent)
        self.eps = max(0.0, self.eps - self.rate * slope)

    def _descend_and_choose(self) -> None:
        before = self.eps
        self._descend()
        if self.eps == before:
            return
        for group, speed in zip(self._training.layers.values(), self._speeds, strict=False):
            mask = group.mask
            chosen = self._active(speed, mask)
            if not torch.equal(chosen, mask):
                group.set_active(chosen)


class _Descent:
    """Σ g · u over the steps of one optimizer, with u the update made by the step before."""

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.before: list[Tensor] | None = None  # the parameters before the last step
        self.slope = torch.zeros((), device=parameters[0].device)
        self._optimizer = optimizer
        self._handles = [optimizer.register_step_pre_hook(self._on_step)]

    def after_each_step(self, call: Callable[[], None]) -> None:
        """Call this after each step of the optimizer, once its Guard has done its work."""
        hook = self._optimizer.register_step_post_hook(lambda *args: call())
        self._handles.append(hook)

    def remove(self) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.before is None:
            self.before = [p.detach().clone() for p in self.parameters]
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales inside its step
        total = torch.zeros_like(self.slope)
        for p, before in zip(self.parameters, self.before, strict=True):
            if p.grad is not None:
                update = before.float() - p.float()
                total += (p.grad.float() * update).sum().to(total.device)
            before.copy_(p)
        if scale is not None:
            total = total / scale
        self.slope += total.nan_to_num(0.0, 0.0, 0.0)  # a step with infinite gradients is skipped

    def take(self) -> float:
        """The sum so far, which starts from zero again."""
        slope = float(self.slope)
        self.slope.zero_()
        return slope

    def state_dict(self) -> dict[str, Any]:
        before = None if self.before is None else [p.clone() for p in self.before]
        return {"before": before, "slope": self.slope.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slope = state["slope"].to(self.slope.device, copy=True)
        self.before = state["before"] and [
            saved.to(p.device, copy=True)
            for p, saved in zip(self.parameters, state["before"], strict=True)
        ]
