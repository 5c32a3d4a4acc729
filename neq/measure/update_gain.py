"""A measure of training itself: what the updates of each neuron gained."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq.layers.base import with_bias
from neq.layers.groups import Group
from neq.measure.base import Measure, Where
from neq.stepping import StepHooks

EVERY = 16


class UpdateGain(Measure):
    """Gives the score "gain": Σ |g · Δw| over a neuron's parameters, averaged over steps.

    There g is the gradient of a step, and Δw the update that the optimizer made by it. To first
    order, g · Δw is how much the update changed the loss. No probe is needed. In every ``EVERY``-th
    step, beginning with the first after each decision, the parameters are copied.

    A neuron that was frozen in all of these steps has NaN.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(2, 3, bias=False)))
        >>> weight = nn.init.zeros_(model[0].weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1)
        >>> gain = neq.measure.update_gain.UpdateGain()
        >>> gain.attach([3], [torch.device("cpu")], "device", False)
        >>> gain.follow([neq.layers.groups.Group("0", [model[0]])], [optimizer])
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> gain.score(gain.sums())
        {'gain': tensor([5., 5., 5.], dtype=torch.float64)}
    """

    def attach(
        self,
        neurons: Sequence[int],
        devices: Sequence[torch.device],
        where: Where,
        keeps_precision: bool,
    ) -> None:
        # of each group: the sum, and in how many steps a neuron was active: float64 [2, n]
        self._sums = [
            torch.zeros(2, n, dtype=torch.float64, device=device)
            for n, device in zip(neurons, devices, strict=True)
        ]

    def follow(self, groups: Iterable[Group], optimizers: Iterable[Optimizer]) -> None:
        """Watch the steps of these optimizers.

        Args:
            groups: The groups of layers, in the order of ``attach``.
            optimizers: The optimizers that step them.
        """
        self._steps = [_Steps(list(groups), self._sums, optimizer) for optimizer in optimizers]

    def remove(self) -> None:
        """Watch no longer."""
        for one in self._steps:
            one.hooks.remove()

    def start(self) -> None:
        """There is nothing to prepare: what counts are the steps since the last decision."""

    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        """Outputs don't count."""

    def sums(self) -> Tensor:
        device = self._sums[0].device
        return torch.cat([sums.to(device) for sums in self._sums], 1).flatten()

    def score(self, sums: Tensor) -> dict[str, Tensor]:
        for own in self._sums:
            own.zero_()
        for one in self._steps:
            one.count = 0
        total, count = sums.view(2, -1)
        return {"gain": total / count}

    def state_dict(self, outputs: bool) -> dict[str, Any]:
        return {
            "sums": [sums.clone() for sums in self._sums],
            "counts": [one.count for one in self._steps],
        }

    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        for own, saved in zip(self._sums, state["sums"], strict=True):
            own.copy_(saved)
        for one, count in zip(self._steps, state["counts"], strict=True):
            one.count = count
        return True


class _Steps:
    """Adds up the gains of one optimizer's steps."""

    def __init__(self, groups: list[Group], sums: list[Tensor], optimizer: Optimizer) -> None:
        stepped = {p for group in optimizer.param_groups for p in group["params"]}
        self._layers = [
            (group.first, own)
            for group, own in zip(groups, sums, strict=True)
            if group.first.weight in stepped
        ]
        self.count = 0
        self._before: list[tuple[Tensor, Tensor | None] | None] = []
        self.hooks = StepHooks(optimizer, self._before_step, self._after_step)

    @torch.no_grad()
    def _before_step(self, closure: Any) -> None:
        due = self.count % EVERY == 0
        self.count += 1
        if due:
            self._before = [
                (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.clone())
                if layer.weight.grad is not None
                else None
                for layer, _ in self._layers
            ]

    @torch.no_grad()
    def _after_step(self, closure: Any) -> None:
        for (layer, sums), before in zip(self._layers, self._before, strict=False):
            if before is None:
                continue
            weight, bias = before
            gains = layer.weight_rows(_gain(layer.weight, weight))
            if bias is not None:
                gains = with_bias(gains, _gain(layer.bias, bias))
            total = gains.sum(1, dtype=torch.float64)
            active = layer.active_mask
            sums[0] += torch.where(active, total.nan_to_num(0.0, 0.0, 0.0), 0.0)
            sums[1] += active
        self._before = []


def _gain(p: Tensor, before: Tensor) -> Tensor:
    """|g · Δw| of each element; 0 without a gradient. A step that unscales g has done so by now."""
    if p.grad is None:
        return torch.zeros_like(p, dtype=torch.float32)
    gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
    return (gradient.float() * (p - before).float()).abs()
