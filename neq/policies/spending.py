"""The best use of a time budget for a whole step: which layers train, down to which one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from neq.cost.step_times import StepTimes

# sums of the same times in another order differ in their last bits; so what they leave buys a bit
_ROUNDING, _SAME = 1 + 1e-12, 1 + 1e-9


@dataclass(frozen=True)
class Spending:
    """What trains.

    Attributes:
        depth: How many blocks are frozen whole.
        shares: Of each group that trains, the share of its neurons; at most one is below 1.
        gain: What is gained, if a share of a group gains that share.
    """

    depth: int
    shares: Mapping[str, float]
    gain: float


def best(
    times: StepTimes,
    gains: Mapping[str, float],
    budget: float,
    *,
    carried: Collection[str] = (),
) -> Spending | None:
    """What gains most within a budget; None if it does not even last for what always trains.

    The lowest layer that trains sets the price of backward, and the blocks below it are frozen.
    Above it, each layer has a price of its own, and those that gain most for it train. So for every
    layer that may be the lowest, this is a fractional knapsack, and the best of them is taken. Of
    several that gain the same, it is the one that ends backward first; but what no policy can
    choose trains as far as the budget lasts.

    Args:
        times: What a step takes.
        gains: What is gained if all neurons of a group train.
        budget: For a whole step, in milliseconds.
        carried: Groups that train wherever backward passes.
    """
    solver = _Solver(times, gains, budget, frozenset(carried))
    count = 1 + max((one.block for one in times.segments if one.block is not None), default=-1)
    lowest = sorted({i for name, i in times.first.items() if name in gains})
    found: tuple[Spending, int] | None = None
    for reach in [*lowest, len(times.segments)]:
        block = times.segments[reach].block if reach < len(times.segments) else None
        spending = solver.above(count if block is None else block, reach)
        if spending and (found is None or spending.gain * _SAME >= found[0].gain):
            found = spending, reach
    if found is None:
        return None
    deepest, reach = found
    always = {one.block for one in times.segments if one.fixed}
    for depth in (block for block in range(deepest.depth) if block in always):
        # does the budget last for what always trains in this block too?
        spending = solver.above(depth, reach)
        if spending and spending.gain * _SAME >= deepest.gain:
            return spending
    return deepest


@dataclass(frozen=True)
class _Solver:
    times: StepTimes
    gains: Mapping[str, float]
    budget: float
    carried: frozenset[str]

    def above(self, depth: int, reach: int) -> Spending | None:
        """The best use if so many blocks are frozen and backward goes down to this segment."""
        times, budget = self.times, self.budget * _ROUNDING
        reached = times.reached(depth, {}, reach)
        # groups that are called nowhere cost nothing
        free = [name for name in self.gains if name not in times.first]
        able = [
            name
            for name, i in times.first.items()
            if name in self.gains and i >= reached and not self._is_inside(i, depth)
        ]
        shares = dict.fromkeys([*free, *(name for name in able if name in self.carried)], 1.0)
        left = budget - times.ms(depth, shares, reach)
        if left < 0:
            return None
        buyable = [name for name in able if name not in self.carried]
        for name in sorted(buyable, key=self._density, reverse=True):
            price = times.price[name]
            shares[name] = 1.0 if price <= left else left / price
            left -= price
            if left <= 0:
                break
        return Spending(depth, shares, sum(self.gains[name] * s for name, s in shares.items()))

    def _is_inside(self, segment: int, depth: int) -> bool:
        block = self.times.segments[segment].block
        return block is not None and block < depth

    def _density(self, name: str) -> float:
        price = self.times.price[name]
        return self.gains[name] / price if price > 0 else float("inf")
