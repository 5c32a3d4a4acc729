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

HEAD = ""  # what the parameters are called that belong to no group


class GradientSignal(Measure):
    """Gives the score "signal": s of a neuron's layer. No probe is needed.

    Gradients are looked at before the optimizers' steps. While the parameters move, s is lower than
    where they stand: a layer whose steps go to and fro has a negative one. It costs a second copy
    of the gradients that are looked at. A layer that is not has NaN.

    Attributes:
        watched: The names of what is looked at: see ``watch``.
        found: s of each group by its name, and of the head, at the last decision.
        looked: In how many steps.

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
        self.looked = 0
        self._parameters: dict[str, list[Tensor]] = {}  # of each group; of the head, the last
        self._held: list[Tensor] = []
        self._counts: list[int] = []  # the steps of each optimizer since the last decision
        self._handles: list[Any] = []

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
        self._handles = [
            optimizer.register_step_pre_hook(partial(self._look, number))
            for number, optimizer in enumerate(optimizers)
        ]
        self._start_anew()

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def watch(self, names: Collection[str], held: Iterable[Tensor] = ()) -> None:
        """Look at these groups from the next step on, and begin anew.

        Args:
            names: Of the groups, and ``HEAD``.
            held: Parameters that the optimizers shall not step, though they have gradients.
        """
        self.watched, self._held = frozenset(names), list(held)
        self._start_anew()

    def _start_anew(self) -> None:
        self._totals: dict[Tensor, Tensor] = {}  # Σ g of each parameter
        self._squares: dict[str, Tensor] = {}  # Σ |g|² of each group: float64
        self._counts = [0] * len(self._handles)

    @torch.no_grad()
    def _look(self, number: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for name in self.watched:
            for p in self._parameters[name]:
                if p in own and p.grad is not None:
                    self._add(name, p, p.grad.to_dense() if p.grad.is_sparse else p.grad)
        for p in self._held:
            if p in own:
                p.grad = None
        self._counts[number] += 1

    def _add(self, name: str, p: Tensor, gradient: Tensor) -> None:
        g = local(gradient)
        square = g.float().square().sum(dtype=torch.float64)
        if p in self._totals:
            self._totals[p] += g
        else:
            self._totals[p] = g.float().clone()
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
        k = self.looked = max(self._counts)
        variance = (sum_of_squares - square_of_sum / k) / (k - 1) if k > 1 else sum_of_squares * 0
        signal = square_of_sum / (k * variance) - 1
        signal = signal.masked_fill(sum_of_squares == 0, 0.0)  # no gradient: nothing to learn
        seen = torch.tensor([k > 1 and name in self.watched for name in self._parameters])
        signal = signal.masked_fill(~seen, torch.nan)
        self.found = dict(zip(self._parameters, signal.tolist(), strict=True))
        self._start_anew()
        layers = zip(signal, self._neurons, strict=False)  # the head is no neuron
        return {"signal": torch.cat([s.expand(n) for s, n in layers])}

    def state_dict(self, outputs: bool) -> dict[str, Any]:
        places = [(name, i) for name, ps in self._parameters.items() for i in range(len(ps))]
        totals = [self._totals.get(self._parameters[name][i]) for name, i in places]
        return {
            "totals": [None if total is None else total.clone() for total in totals],
            "squares": {name: square.clone() for name, square in self._squares.items()},
            "counts": list(self._counts),
        }

    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        parameters = [p for ps in self._parameters.values() for p in ps]
        totals = zip(parameters, state["totals"], strict=True)
        self._totals = {p: t.to(p.device, copy=True) for p, t in totals if t is not None}
        self._squares = {name: square.clone() for name, square in state["squares"].items()}
        self._counts = list(state["counts"])
        return True
