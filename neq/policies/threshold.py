"""Neurons at equilibrium are frozen: a threshold on the speed, fixed or learned."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neq.measure.equilibrium import Recurrence
from neq.policies.base import Choice, Motion, Policy, Training, check_share


class Equilibrium(Policy):
    """A neuron is frozen while |v| < eps: while it is at equilibrium.

    Speeds depend on the model, the learning rate and the length of an epoch, so no eps fits all.
    With ``share`` the policy finds it after each epoch: the least eps that freezes this share of
    all neurons. Where neurons are equally fast, it freezes more. ``hysteresis`` and ``pinning``
    then keep others frozen besides.

    Args:
        eps: The threshold; 1e-3 if neither it nor ``share`` is given. Published values are 1e-3 for
            classification, 0.02 for segmentation.
        mu: The momentum of the velocity; 0.5 as published.
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code. With
            ``"released"`` a neuron is also frozen at |v| = eps.
        per_sample: Average φ over samples, as the released code does.
        hysteresis: A frozen neuron trains again only at |v| ≥ (1 + hysteresis) · eps.
        pinning: A neuron that was frozen once stays frozen.
        share: The share of all neurons that is frozen, in [0, 1], instead of ``eps``. Neurons that
            were not measured train.

    Attributes:
        eps: The threshold, given or found; 0 before the first choice if it is found.

    Raises:
        ValueError: If ``eps`` or ``hysteresis`` is negative, ``share`` is not in [0, 1], or both
            ``eps`` and ``share`` are given.

    Examples:
        >>> policy = neq.Equilibrium(eps=1e-3)
        >>> policy = neq.Equilibrium(share=0.5)  # the slower half of all neurons
    """

    def __init__(
        self,
        eps: float | None = None,
        mu: float = 0.5,
        *,
        recurrence: Recurrence = "paper",
        per_sample: bool = False,
        hysteresis: float = 0.0,
        pinning: bool = False,
        share: float | None = None,
    ) -> None:
        if eps is not None and share is not None:
            raise ValueError(f"give either eps or share, got eps={eps}, share={share}")
        self.share = None if share is None else check_share("share", share)
        if eps is None:
            eps = 1e-3 if share is None else 0.0
        for name, value in (("eps", eps), ("hysteresis", hysteresis)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.eps, self.mu, self.recurrence, self.per_sample = eps, mu, recurrence, per_sample
        self.hysteresis, self.pinning = hysteresis, pinning
        self.by_granule = recurrence != "released"

    @classmethod
    def released(cls, eps: float = 1e-3, mu: float = 0.5) -> "Equilibrium":
        """The policy of the code published with the paper, which differs from the paper.

        Its φ and its velocity are others: see ``neq.measure.equilibrium``.

        Args:
            eps: The threshold.
            mu: The momentum of the velocity.
        """
        return cls(eps, mu, recurrence="released", per_sample=True)

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        if self.share is not None:
            speed = torch.cat([layer.velocity for layer in layers]).abs()
            self.eps = _eps_that_freezes(round(self.share * len(speed)), speed)
        return [self._active(layer) for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        return {} if self.share is None else {"eps": self.eps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.eps = state.get("eps", self.eps)

    def _active(self, layer: Motion) -> Tensor:
        speed = layer.velocity.abs()
        limit = torch.full_like(speed, self.eps)
        limit[~layer.active] *= 1 + self.hysteresis
        # NaN compares as false: a neuron that was not measured trains
        frozen = speed <= limit if self.recurrence == "released" else speed < limit
        return ~frozen & layer.active if self.pinning else ~frozen


def _eps_that_freezes(count: int, speed: Tensor) -> float:
    """The least eps with ``count`` of the speeds [n] below it, or all that were measured."""
    measured = speed[~speed.isnan()].sort().values
    count = min(count, len(measured))
    return math.nextafter(float(measured[count - 1]), math.inf) if count else 0.0


class AdaptiveEps(Equilibrium):
    """``Equilibrium`` with an eps that gradient descent adapts to the loss, after SCoTTi.

    An update w ← w - u is made where |v| exceeds eps. With the step function taken as identity in
    the backward pass, dL/deps at a step is Σ g · u over the neurons that train. There g is the
    gradient in this step, and u the update made by the last one. While successive updates agree,
    eps falls and more neurons train. When they undo each other, eps rises.

    The sum is collected in every step. After each epoch eps is updated, and the neurons are chosen.
    This takes memory for a copy of the layers' parameters.

    Args:
        eps: The threshold at first.
        mu: The momentum of the velocity.
        rate: The learning rate of eps.
        **options: Other arguments of ``Equilibrium``.

    Raises:
        ValueError: If ``rate`` is not positive. The Controller raises it if it has no optimizer.

    Examples:
        >>> policy = neq.AdaptiveEps(eps=0.05, rate=1e-4)
    """

    def __init__(self, eps: float = 0.05, mu: float = 0.5, *, rate: float = 1e-4, **options: Any):
        super().__init__(eps, mu, **options)
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        self.rate = rate
        self._descent: list[_Descent] = []

    def attach(self, training: Training) -> None:
        if not training.optimizers:
            raise ValueError(
                "AdaptiveEps learns from the optimizer's steps: give the Controller its optimizer"
            )
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

    def detach(self) -> None:
        for descent in self._descent:
            descent.handle.remove()
        self._descent = []

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        slope = sum(descent.take() for descent in self._descent)
        self.eps = max(0.0, self.eps - self.rate * slope)
        return super().choose(layers, epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"eps": self.eps, "descent": [d.state_dict() for d in self._descent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.eps = state["eps"]
        for descent, saved in zip(self._descent, state["descent"], strict=True):
            descent.load_state_dict(saved)


class _Descent:
    """Σ g · u over the steps of one optimizer, with u the update made by the step before."""

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.before: list[Tensor] | None = None  # the parameters before the last step
        self.slope = torch.zeros((), device=parameters[0].device)
        self.handle: RemovableHandle = optimizer.register_step_pre_hook(self._on_step)

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
