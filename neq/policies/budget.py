"""A fixed budget, spent on the neurons that move most for their cost."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from neq.cost.step_times import StepTimes
from neq.cost.units import Unit
from neq.measure.base import Measure
from neq.measure.equilibrium import Recurrence
from neq.measure.update_gain import UpdateGain
from neq.policies.base import Choice, Motion, Policy, Training, check_share
from neq.policies.spending import Spending, best

Importance = Literal["velocity", "gradient"]


class Budget(Policy):
    """Neurons train in the order of their importance per unit of cost, as far as a budget lasts.

    After Quélennec et al. (2024), where the unit is parameters and importance |v|. The neurons that
    train never cost more than the budget. What is left is less than the cost of the next neuron. A
    neuron costs its share of its layer. In a norm this is an approximation: its kernel computes the
    weight gradient of all neurons or of none.

    With ``unit="step_ms"`` the budget is for a whole step, as in ElasticTrainer. A layer that
    trains then costs its weight gradient, its update, and backward through all layers above it,
    down to it. Blocks below the lowest layer that trains are frozen whole: their norms, embeddings
    and loose parameters too. Above it layers train or are frozen, by importance for their cost;
    only the last one trains a part of its neurons: the most important, on a GPU by 16 neighbours.
    Norms train wherever backward passes. What neq can't freeze trains, unless in a frozen block,
    and has its share of the budget. In a model that can't be cut, layers are frozen one by one.

    A budget that does not last for forward and for what always trains is warned of, and nothing
    else trains then.

    Args:
        share: The budget as a share of what it costs that all neurons train, in [0, 1].
        amount: The budget in units, instead of ``share``.
        unit: ``"parameters"``, or ``"flops"`` or ``"ms"`` of the weight gradients in one step on
            the Controller's ``example_inputs``, or ``"step_ms"`` of the whole step, without the
            data and a loss outside of the model. Milliseconds are measured once, and saved with the
            Controller's state.
        importance: ``"velocity"`` is |v|. ``"gradient"`` is |gradient · update|, which needs no
            probe: see ``neq.measure.update_gain``. A neuron whose importance can't be seen has the
            one that was last seen: by gradients while it is frozen, and with ``"step_ms"`` by
            velocities too, since the outputs of a frozen prefix don't move.
        mu: The momentum of the velocity.
        recurrence: The formula of the ``"paper"`` or of the ``"released"`` code.

    Raises:
        ValueError: Unless one of ``share`` and ``amount`` is given, and in its range. The
            Controller raises it if the importance is by gradients and it has no optimizer.

    Examples:
        >>> policy = neq.Budget(share=0.1)
        >>> policy = neq.Budget(amount=1e9, unit="flops")
        >>> policy = neq.Budget(share=0.6, unit="step_ms", importance="gradient")
    """

    needs_blocks = False

    def __init__(
        self,
        *,
        share: float | None = None,
        amount: float | None = None,
        unit: Unit | Literal["step_ms"] = "parameters",
        importance: Importance = "velocity",
        mu: float = 0.5,
        recurrence: Recurrence = "paper",
    ) -> None:
        if (share is None) == (amount is None):
            raise ValueError(f"give either share or amount, got share={share}, amount={amount}")
        if amount is not None and not amount >= 0:
            raise ValueError(f"amount must be at least 0, got {amount}")
        if unit not in (*get_args(Unit), "step_ms"):
            raise ValueError(f"unit must be 'parameters', 'flops', 'ms' or 'step_ms', got {unit!r}")
        if importance not in get_args(Importance):
            raise ValueError(f"importance must be 'velocity' or 'gradient', got {importance!r}")
        self.share = 1.0 if share is None else check_share("share", share)
        self.amount, self.unit, self.mu, self.recurrence = amount, unit, mu, recurrence
        self.importance = importance
        self.measures = importance == "velocity"
        self.freezes_prefix = unit == "step_ms"
        self.costs: dict[str, float] = {}  # of one neuron of each group, in units
        self.times: StepTimes | None = None  # for "step_ms", once a decision or a state needs it
        self._seen: dict[str, Tensor] = {}  # the importance last seen of each neuron of each group
        self._gain: UpdateGain | None = None
        self._training: Training

    def measure(self) -> Measure:
        if self.importance == "velocity":
            return super().measure()
        self._gain = UpdateGain()
        return self._gain

    def attach(self, training: Training) -> None:
        self._training = training
        if self._gain is not None:
            if not training.optimizers:
                raise ValueError(
                    'Budget(importance="gradient") watches the optimizer\'s steps: give the '
                    "Controller its optimizer"
                )
            self._gain.follow(training.layers.values(), training.optimizers)
        if self.unit != "step_ms":
            totals = training.costs(self.unit)
            self.costs = {
                name: totals[name] / group.n_neurons for name, group in training.layers.items()
            }

    def detach(self) -> None:
        if self._gain is not None:
            self._gain.remove()

    def depth(self, layers: Sequence[Motion], epoch: int) -> int:
        return self._spend(layers).depth if self.unit == "step_ms" else 0

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        if self.unit != "step_ms":
            return self._fastest(layers)
        shares = self._spend(layers, warn=True).shares
        seen = self._importance(layers)
        return [part(seen[one.name], one.sizes(), shares.get(one.name, 0.0)) for one in layers]

    def _fastest(self, layers: Sequence[Motion]) -> list[Choice]:
        """The neurons that are most important for their own cost, of whichever layer."""
        sizes = [len(layer) for layer in layers]
        cost = torch.cat([self.costs[layer.name] * layer.sizes().double() for layer in layers])
        importance = torch.cat(
            [self._importance(layers)[layer.name] for layer in layers]
            if self._gain is not None
            else [layer.velocity.abs() for layer in layers]
        )
        # neurons that were not measured come first
        order = (importance / cost).nan_to_num(torch.inf).argsort(descending=True, stable=True)
        budget = self.amount if self.amount is not None else self.share * float(cost.sum())
        spent = cost[order].cumsum(0)
        active = torch.zeros(len(cost), dtype=torch.bool)
        # sums of the same costs in another order differ in their last bits
        active[order[spent <= budget * (1 + 1e-12)]] = True
        return list(active.split(sizes))

    def _importance(self, layers: Sequence[Motion]) -> dict[str, Tensor]:
        """Of each neuron the importance that was last seen: by group, float64 [n]. NaN if none."""
        for one in layers:
            now = one.velocity.abs() if self._gain is None else one.scores.get("gain")
            before = self._seen.get(one.name, torch.full_like(one.velocity, torch.nan))
            if now is None:
                now = before
            self._seen[one.name] = torch.where(one.active & ~now.isnan(), now, before)
        return self._seen

    def _spend(self, layers: Sequence[Motion], warn: bool = False) -> Spending:
        """The best use of a budget for a whole step."""
        seen = self._importance(layers)
        average = _mean(torch.cat([seen[one.name] for one in layers]), 1.0)
        # a neuron that was never measured is as important as the average one of its layer
        gains = {
            one.name: float(
                (seen[one.name].nan_to_num(_mean(seen[one.name], average)) * one.sizes()).sum()
            )
            for one in layers
        }
        times = self._measured()
        norms = [one.name for one in layers if not one.layer.by_rows]
        budget = self.share * times.dense if self.amount is None else self.amount
        spending = best(times, gains, budget, carried=norms)
        if spending is not None:
            return spending
        depth = len(self._training.blocks)
        if warn:
            warnings.warn(
                f"Budget: {budget:.3g} ms do not last for a step in which nothing trains but what "
                f"no policy can freeze: it takes {times.ms(depth, {}):.3g} of {times.dense:.3g} "
                "ms; so that is all that trains",
                stacklevel=3,
            )
        return Spending(depth, {}, 0.0)

    def _measured(self) -> StepTimes:
        if self.times is None:
            self.times = self._training.step_times()
        return self.times

    def state_dict(self) -> dict[str, Any]:
        return {
            "costs": dict(self.costs),
            "times": self._measured().state_dict() if self.unit == "step_ms" else None,
            "seen": {name: values.clone() for name, values in self._seen.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.costs = dict(state["costs"])
        self.times = state["times"] and StepTimes.from_state(state["times"])
        self._seen = {name: values.cpu().clone() for name, values in state["seen"].items()}


def _mean(values: Tensor, default: float) -> float:
    """The mean of those that are not NaN."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else default


def part(importance: Tensor, sizes: Tensor, share: float) -> Tensor:
    """The most important granules of a layer, as bool [n]: at most this share of its neurons.

    Args:
        importance: Of each granule: float64 [n].
        sizes: How many neurons each granule has: int64 [n].
        share: In [0, 1].
    """
    order = importance.nan_to_num(torch.inf).argsort(descending=True, stable=True)
    fits = sizes[order].cumsum(0) <= share * float(sizes.sum()) * (1 + 1e-12)
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[order[fits]] = True
    return chosen
