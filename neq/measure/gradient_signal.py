"""A measure of training itself: do the gradients of a layer agree from batch to batch?

    s = |Σ g|² / (k · σ²) - 1    over the k gradients g of some steps, with their variance σ²

The mean gradient of pure noise has s = 0 on average. At s = 1 signal and noise are equally strong
in it: half of what a step along it gains on these samples is a gain on others too (Liu et al. 2020,
for single parameters). So a threshold means the same in every model: well below 1 a layer learns
its samples rather than its task.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neq.layers.groups import Group
from neq.measure.base import Measure, Where
from neq.sharding import local
from neq.stepping import StepHooks, skipped

ROUNDING = 1e-6  # of float32 sums, as a share of what is summed up
HEAD = ""  # what the parameters are called that belong to no group


class GradientSignal(Measure):
    """Gives the score "signal": s of a neuron's layer. No probe is needed.

    The gradients are those with which the optimizers step; a step that a GradScaler skips does not
    count. While parameters move, s is lower than where they stand: a layer whose steps go to and
    fro has a negative one. It costs a second copy of the gradients that are looked at, in float32
    at least. A layer of which less than two gradients were seen has NaN.

    Attributes:
        watched: The names of what is looked at: see ``watch``.
        found: s of each group by its name, and of the head, at the last decision.
        looked: In how many steps of each.

    Examples:
        >>> model = neq.convert(nn.Sequential(nn.Linear(1, 2, bias=False)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        >>> signal = neq.measure.gradient_signal.GradientSignal()
        >>> signal.attach([2], [torch.device("cpu")], "device", False)
        >>> signal.follow([neq.layers.groups.Group("0", [model[0]])], [optimizer])
        >>> signal.watch(["0"])
        >>> for x in (1.0, 2.0, 3.0):  # |Σ g|² = 72 and σ² = 2
        ...     optimizer.zero_grad()
        ...     model(torch.tensor([[x]])).sum().backward()
        ...     optimizer.step()
        >>> signal.score(signal.sums())
        {'signal': tensor([11., 11.], dtype=torch.float64)}
    """

    def __init__(self) -> None:
        self.watched: frozenset[str] = frozenset()
        self.found: dict[str, float] = {}
        self.looked: dict[str, int] = {}
        self._parameters: dict[str, list[Tensor]] = {}  # of each group; of the head, the last
        self._hooks: list[StepHooks] = []
        self._seen: set[Tensor] = set()  # in the step that is under way

    def attach(
        self,
        neurons: Sequence[int],
        devices: Sequence[torch.device],
        where: Where,
        keeps_precision: bool,
    ) -> None:
        self._neurons, self._device = list(neurons), devices[0]
        self._start_anew()

    def follow(
        self,
        groups: Iterable[Group],
        optimizers: Iterable[Optimizer],
        head: Iterable[Tensor] = (),
    ) -> None:
        """Watch the steps of these optimizers.

        Args:
            groups: The groups of layers, in the order of ``attach``.
            optimizers: The optimizers that step them.
            head: Other parameters, of which s is found as of one layer.
        """
        self._parameters = {g.name: [*g.first.parameters(recurse=False)] for g in groups}
        self._parameters[HEAD] = list(head)
        self._hooks = [
            StepHooks(one, partial(self._look, one, False), partial(self._look, one, True))
            for one in optimizers
        ]

    def remove(self) -> None:
        """Watch no longer."""
        for hooks in self._hooks:
            hooks.remove()

    def watch(self, names: Collection[str]) -> None:
        """Look at these groups from the next step on, and begin anew.

        Args:
            names: Of the groups, and ``HEAD``.
        """
        self.watched = frozenset(names)
        self._start_anew()

    def _start_anew(self) -> None:
        self._totals: dict[Tensor, Tensor] = {}  # Σ g of each parameter
        self._squares: dict[str, Tensor] = {}  # Σ |g|² of each group: float64
        self._steps: dict[Tensor, Tensor | int] = {}  # in which a parameter was seen

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, after: bool, closure: Any) -> None:
        # Before the step the gradients of all that the step moves are there, but for a closure's.
        # After it, an optimizer may have changed them; those of what a Guard has hidden are back.
        if not after:
            self._seen = set()
        if not self.watched or (closure is not None and not after):
            return
        own = {p for group in optimizer.param_groups for p in group["params"]}
        skip, scale = skipped(optimizer), getattr(optimizer, "grad_scale", None)
        for name in self.watched:
            mine = [p for p in self._parameters[name] if p in own]
            for p in mine:
                if p.grad is not None and p not in self._seen:
                    self._seen.add(p)
                    g = local(p.grad.to_dense() if p.grad.is_sparse else p.grad)
                    g = g.to(torch.promote_types(g.dtype, torch.float32))
                    g = g if scale is None else g / scale
                    self._add(name, p, g if skip is None else g.masked_fill(skip, 0.0))
            if mine and after:
                done = 1 if skip is None else (~skip).sum()
                self._steps[mine[0]] = self._steps.get(mine[0], 0) + done

    def _add(self, name: str, p: Tensor, g: Tensor) -> None:
        square = g.square().sum(dtype=torch.float64)
        if p in self._totals:
            self._totals[p] += g
        else:
            self._totals[p] = g.clone()
        before = self._squares.get(name)
        self._squares[name] = square if before is None else before + square.to(before.device)

    def start(self) -> None:
        """There is nothing to prepare: what counts are the steps since the last decision."""

    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        """Outputs don't count."""

    def sums(self) -> Tensor:
        # |Σ g|² and Σ |g|²: [2, groups and head]. Processes that divide a model have parts of them;
        # those that copy it have the same, and only the ratio counts
        found = torch.zeros(2, len(self._parameters), dtype=torch.float64, device=self._device)
        for i, (name, parameters) in enumerate(self._parameters.items()):
            for total in (self._totals[p] for p in parameters if p in self._totals):
                found[0, i] += total.square().sum(dtype=torch.float64).to(self._device)
            found[1, i] += self._squares.get(name, 0.0)
        return found.flatten()

    def score(self, sums: Tensor) -> dict[str, Tensor]:
        square_of_sum, sum_of_squares = sums.view(2, -1)
        self.looked = {
            name: max((int(self._steps.get(p, 0)) for p in parameters), default=0)
            for name, parameters in self._parameters.items()
        }
        k = torch.tensor([*self.looked.values()], dtype=torch.float64)
        k = k.masked_fill(k < 2, torch.nan)
        variance = (sum_of_squares - square_of_sum / k) / (k - 1)
        # of gradients that are all the same, what is left is rounding
        variance = torch.maximum(variance, ROUNDING * sum_of_squares / k)
        signal = square_of_sum / (k * variance) - 1
        # without a gradient there is nothing to learn
        signal = signal.masked_fill((sum_of_squares == 0) & ~k.isnan(), 0.0)
        self.found = dict(zip(self._parameters, signal.tolist(), strict=True))
        self._start_anew()
        layers = zip(signal, self._neurons, strict=False)  # the head is no neuron
        return {"signal": torch.cat([s.expand(n) for s, n in layers])}

    def state_dict(self, outputs: bool) -> dict[str, Any]:
        totals = [self._totals.get(p) for p in self._all()]
        return {
            "totals": [None if total is None else total.clone() for total in totals],
            "squares": {name: square.clone() for name, square in self._squares.items()},
            "steps": [int(self._steps.get(p, 0)) for p in self._all()],
        }

    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        totals = zip(self._all(), state["totals"], strict=True)
        self._totals = {p: t.to(p.device, copy=True) for p, t in totals if t is not None}
        self._squares = {name: square.clone() for name, square in state["squares"].items()}
        self._steps = dict(zip(self._all(), state["steps"], strict=True))
        return True

    def _all(self) -> list[Tensor]:
        """The parameters of all groups and of the head."""
        return [p for parameters in self._parameters.values() for p in parameters]
