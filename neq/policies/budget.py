"""A fixed budget, spent on the neurons that move most for their cost."""

from collections.abc import Sequence
from typing import Any, get_args

import torch

from neq.cost.units import Unit
from neq.measure.equilibrium import Recurrence
from neq.policies.base import Choice, Motion, Policy, Training, check_share


class Budget(Policy):
    """Neurons train in the order of |v| per unit of cost, as far as a budget lasts.

    After Quélennec et al. (2024), where the unit is parameters. The neurons that train never cost
    more than the budget. What is left is less than the cost of the next neuron.

    A neuron costs its share of its layer. In a norm this is an approximation: its kernel computes
    the weight gradient of all neurons or of none.

    Args:
        share: The budget as a share of the cost of all neurons, in [0, 1].
        amount: The budget in units, instead of ``share``.
        unit: ``"parameters"``, or ``"flops"`` or ``"ms"`` of the weight gradients in one step on
            the Controller's ``example_inputs``. Milliseconds are measured when the Controller is
            made, and saved with its state.
        mu: The momentum of the velocity.
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code.

    Raises:
        ValueError: Unless one of ``share`` and ``amount`` is given, and in its range.

    Examples:
        >>> policy = neq.Budget(share=0.1)
        >>> policy = neq.Budget(amount=1e9, unit="flops")
    """

    def __init__(
        self,
        *,
        share: float | None = None,
        amount: float | None = None,
        unit: Unit = "parameters",
        mu: float = 0.5,
        recurrence: Recurrence = "paper",
    ) -> None:
        if (share is None) == (amount is None):
            raise ValueError(f"give either share or amount, got share={share}, amount={amount}")
        if amount is not None and not amount >= 0:
            raise ValueError(f"amount must be at least 0, got {amount}")
        if unit not in get_args(Unit):
            raise ValueError(f"unit must be 'parameters', 'flops' or 'ms', got {unit!r}")
        self.share = 1.0 if share is None else check_share("share", share)
        self.amount, self.unit, self.mu, self.recurrence = amount, unit, mu, recurrence
        self.costs: dict[str, float] = {}  # of one neuron of each group, in units

    def attach(self, training: Training) -> None:
        totals = training.costs(self.unit)
        self.costs = {
            name: totals[name] / group.n_neurons for name, group in training.layers.items()
        }

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        sizes = [len(layer) for layer in layers]
        cost = torch.cat([self.costs[layer.name] * layer.sizes().double() for layer in layers])
        speed = torch.cat([layer.velocity for layer in layers]).abs()
        # neurons that were not measured come first
        order = (speed / cost).nan_to_num(torch.inf).argsort(descending=True, stable=True)
        budget = self.amount if self.amount is not None else self.share * float(cost.sum())
        spent = cost[order].cumsum(0)
        active = torch.zeros(len(cost), dtype=torch.bool)
        # sums of the same costs in another order differ in their last bits
        active[order[spent <= budget * (1 + 1e-12)]] = True
        rows: list[Choice] = list(active.split(sizes))
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {"costs": dict(self.costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.costs = dict(state["costs"])
