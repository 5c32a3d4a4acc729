"""Spend a fixed budget on the neurons that move most for their price."""

from collections.abc import Sequence
from typing import Any, get_args

import torch

from neq.cost.units import Unit
from neq.measure.equilibrium import Recurrence
from neq.policies.base import Choice, Motion, Policy, Training, check_share


class Budget(Policy):
    """Rank all neurons by |v| per unit of cost, and train from the top while the budget lasts.

    After Quélennec et al. (2024), where the unit is parameters. What is spent never exceeds the
    budget, and falls short of it by less than the next neuron's cost. A neuron's cost is its share
    of its layer's, also in a norm, whose weight gradient is computed for all neurons or none.

    Args:
        share: The budget as a share of what training everything would cost; or
        amount: the budget in units.
        unit: ``"parameters"``, ``"flops"`` of the weight gradients of one step, or the ``"ms"``
            that they take, measured when the Controller is made (and then part of the saved state).
            Both are for a step on the Controller's ``example_inputs``.
        mu: The momentum of the velocity.
        recurrence: The paper's or the released code's.
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
        self.costs: dict[str, float] = {}  # of one neuron of each layer, in units

    def attach(self, training: Training) -> None:
        totals = training.costs(self.unit)
        self.costs = {
            name: totals[name] / group.n_neurons for name, group in training.layers.items()
        }

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        sizes = [len(layer) for layer in layers]
        costs = torch.tensor([self.costs[layer.name] for layer in layers], dtype=torch.float64)
        cost = costs.repeat_interleave(torch.tensor(sizes))
        speed = torch.cat([layer.velocity for layer in layers]).abs()
        # what was not measured comes first
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
