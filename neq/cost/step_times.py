"""What a training step takes, part by part, and so what it takes if only a part of it trains.

A layer that trains costs its own wgrad and its update, and the dgrad of every layer above it, down
to it. What lies in a frozen prefix costs its forward in eval mode only.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Segment:
    """What runs from the end of one layer to the end of the next. Times are in milliseconds.

    Attributes:
        name: The name of the layer that ends it.
        group: The name of the group that this layer is of, or of its first layer in the model if it
            is left alone; None if it is not converted.
        block: The number of the block that it lies in; None above the last one.
        fixed: Does a parameter of the layer train whatever a policy chooses?
        frozen: Its forward in a frozen prefix.
        forward: Its forward above the prefix, with the layer frozen.
        dgrad: Its backward with the layer frozen. That of a layer that is not converted has its
            wgrad in it.
        wgrad: What it adds to forward and backward that the layer trains.
        update: The optimizer's step on the layer's parameters.
    """

    name: str
    group: str | None = None
    block: int | None = None
    fixed: bool = False
    frozen: float = 0.0
    forward: float = 0.0
    dgrad: float = 0.0
    wgrad: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """What a step takes on some example inputs. Times are in milliseconds.

    Without the data, and without a loss that the model does not compute itself.

    Attributes:
        segments: The parts of the model, in the order of execution. A layer that is called twice
            has two.
        head: What comes after the last one, in forward and backward.

    Examples:
        >>> times = neq.cost.step_times.StepTimes(
        ...     (
        ...         neq.cost.step_times.Segment("0", "0", 0, forward=2, wgrad=3, update=1),
        ...         neq.cost.step_times.Segment("1", "1", forward=2, dgrad=3, wgrad=3, update=1),
        ...     )
        ... )
        >>> times.dense, times.ms(0, {"0": 1}), times.ms(0, {"1": 0.5})
        (15.0, 11.0, 6.0)
    """

    segments: tuple[Segment, ...]
    head: float = 0.0

    @cached_property
    def first(self) -> dict[str, int]:
        """The number of the first segment of each group."""
        numbered = [*enumerate(self.segments)]
        return {one.group: i for i, one in reversed(numbered) if one.group is not None}

    @cached_property
    def price(self) -> dict[str, float]:
        """What it adds that all neurons of a group train, if backward reaches it anyway."""
        price = dict.fromkeys(self.first, 0.0)
        for one in self.segments:
            if one.group is not None:
                price[one.group] += one.wgrad + one.update
        return price

    @cached_property
    def dense(self) -> float:
        """A step in which everything trains."""
        return self.ms(0, dict.fromkeys(self.first, 1.0))

    def ms(self, depth: int, shares: Mapping[str, float], reach: int | None = None) -> float:
        """A step in which only a part trains.

        Args:
            depth: How many blocks are frozen whole.
            shares: Of groups above them, the share of the neurons that trains; 0 if not given.
            reach: The number of the segment down to which backward goes, if it trains nothing
                there.
        """
        lowest = self.reached(depth, shares, reach)
        total = self.head
        for i, one in enumerate(self.segments):
            share = self._share(one, depth, shares)
            # an unconverted layer's wgrad is in its dgrad
            passed = i > lowest or (i == lowest and one.group is None and share > 0)
            total += one.frozen if self._inside(one, depth) else one.forward
            total += one.dgrad * passed + one.update * share
            total += one.wgrad * share
        return total

    def dense_ms(self, block: int | None) -> float:
        """The part of one block in a step in which everything trains.

        Args:
            block: Its number; None for the layers above the last one.
        """
        total = 0.0 if block is not None else self.head
        for i, one in enumerate(self.segments):
            if one.block == block:
                # the lowest layer has no dgrad; an unconverted layer's wgrad is in it
                dgrad = one.dgrad * (i > 0 or one.group is None)
                total += one.forward + dgrad + one.wgrad + one.update
        return total

    def reached(self, depth: int, shares: Mapping[str, float], reach: int | None = None) -> int:
        """The number of the lowest segment that backward reaches: see ``ms``."""
        end = len(self.segments) if reach is None else reach
        for i, one in enumerate(self.segments[:end]):
            if self._share(one, depth, shares) > 0:
                return i
        return end

    def _share(self, one: Segment, depth: int, shares: Mapping[str, float]) -> float:
        """The share of the segment's parameters that trains."""
        # a weight that a later layer shares with the prefix is frozen there too
        first = one if one.group is None else self.segments[self.first[one.group]]
        if self._inside(first, depth):
            return 0.0
        return 1.0 if one.fixed else shares.get(one.group or "", 0.0)

    def _inside(self, one: Segment, depth: int) -> bool:
        return one.block is not None and one.block < depth

    def state_dict(self) -> dict[str, Any]:
        """The times as plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "StepTimes":
        """The times that ``state_dict`` returned.

        Args:
            state: What it returned.
        """
        return cls(tuple(Segment(**one) for one in state["segments"]), state["head"])
