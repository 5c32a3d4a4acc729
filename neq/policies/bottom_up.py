"""Blocks are frozen from the input up: a frozen prefix ends the backward pass."""

from collections.abc import Sequence
from typing import Any

from neq.measure.base import Measure
from neq.optim.annealing import Annealing
from neq.policies.base import Choice, Motion, Policy, Training, check_share
from neq.policies.baselines import Everything
from neq.policies.thaw import ThawRule, median_speed, share_below


class FromBelow(Policy):
    """What policies that freeze a prefix have in common.

    Args:
        above: Chooses neurons in the layers above the prefix; by default all of them train.
    """

    freezes_prefix = True

    def __init__(self, above: Policy | None) -> None:
        self.above = Everything() if above is None else above
        self.by_granule = self.above.by_granule
        self._training: Training
        self._annealing = Annealing(())

    def attach(self, training: Training) -> None:
        self._training = training
        self._annealing = Annealing(training.optimizers)
        self.above.attach(training)

    def detach(self) -> None:
        self._annealing.remove()
        self.above.detach()

    def measure(self) -> Measure:
        return self.above.measure() if self.above.measures else super().measure()

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        return self.above.choose(layers, epoch)

    def _anneal(self, block: int, start: float, end: float) -> None:
        """Let the learning rate of a block fall to zero between two times, in epochs."""
        model = self._training.model
        for name in self._training.blocks[block].parameters:
            self._annealing.spans[model.get_parameter(name)] = start, end

    def state_dict(self) -> dict[str, Any]:
        return {"annealing": self._annealing.state_dict(), "above": self.above.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._annealing.load_state_dict(state["annealing"])
        self.above.load_state_dict(state["above"])


class BottomUp(FromBelow):
    """The frozen prefix grows by a block when enough of the block's neurons are at equilibrium.

    A neuron is at equilibrium while |v| < eps · v_max. There v_max is the highest median speed that
    any block has had in this training. So eps depends neither on the length of an epoch nor on the
    model. A block is settled when ``share`` of its measured neurons are at equilibrium. One in
    which nothing is measured is settled if the one above is. The lowest block that trains is
    frozen when it was settled in ``patience`` measurements, one after the other.

    Everything trains again when a learning rate rises, when the data change, or when the validation
    loss gets worse: see ``neq.policies.thaw.ThawRule``.

    Args:
        eps: The threshold, as a share of the highest median speed.
        share: Which share of a block's neurons has to be below.
        patience: In how many measurements.
        mu: The momentum of the velocity.
        anneal: For how many epochs the learning rate of a block falls to zero before it is frozen,
            along half a cosine. 0 freezes it at once.
        surge: The factor by which speeds above the prefix rise when the data change.
        above: Chooses neurons in the layers above the prefix; by default all of them train.

    Raises:
        ValueError: If an argument is out of its range.

    Examples:
        >>> policy = neq.BottomUp()
        >>> policy = neq.BottomUp.scheduled([0.4, 0.7], epochs=11)
    """

    def __init__(
        self,
        eps: float = 0.1,
        share: float = 0.75,
        patience: int = 2,
        mu: float = 0.5,
        *,
        anneal: int = 0,
        surge: float = 4.0,
        above: Policy | None = None,
    ) -> None:
        super().__init__(above)
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        for name, count, least in (("patience", patience, 1), ("anneal", anneal, 0)):
            if not count >= least:
                raise ValueError(f"{name} must be at least {least}, got {count}")
        self.eps, self.share, self.mu = eps, check_share("share", share), mu
        self.patience, self.anneal = patience, anneal
        self._thaw = ThawRule(surge)
        self._fastest = 0.0  # the highest median speed of a block so far
        self._settled: list[int] = []  # in how many measurements each block was settled by now
        self._ends: list[int] = []  # at which epochs the lowest blocks are frozen, once annealed

    def depth(self, layers: Sequence[Motion], epoch: int) -> int:
        self._annealing.begin(epoch)
        count = len(self._training.blocks)
        frozen = sum(end <= epoch for end in self._ends)
        if self._thaw.applies(self._training, layers, frozen):
            self._settled, self._ends = [], []
            self._annealing.spans.clear()
            return 0
        before = self._settled or [0] * count
        self._settled = [
            done + 1 if settled else 0
            for done, settled in zip(before, self._are_settled(layers, frozen), strict=True)
        ]
        while len(self._ends) < count and self._settled[len(self._ends)] >= self.patience:
            self._grow(epoch + self.anneal)
        return sum(end <= epoch for end in self._ends)

    def _grow(self, end: int) -> None:
        """Freeze one more block at that epoch."""
        if self.anneal:
            self._anneal(len(self._ends), end - self.anneal, end)
        self._ends.append(end)

    def state_dict(self) -> dict[str, Any]:
        own = {"fastest": self._fastest, "settled": list(self._settled), "ends": list(self._ends)}
        return {**super().state_dict(), **own, "thaw": self._thaw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._fastest, self._settled = state["fastest"], list(state["settled"])
        self._thaw.load_state_dict(state["thaw"])
        self._annealing.spans.clear()
        self._ends = []
        for end in state["ends"]:
            self._grow(end)

    def _are_settled(self, layers: Sequence[Motion], frozen: int) -> list[bool]:
        """Of each block: are enough of its neurons at equilibrium, or is it frozen?"""
        blocks = [
            [one for one in layers if one.block == i] for i in range(len(self._training.blocks))
        ]
        medians = [median_speed(block) for block in blocks[frozen:]]
        self._fastest = max([self._fastest, *(m for m in medians if m > 0)])
        answers, settled = [], False
        for block in reversed(blocks):
            share = share_below(block, self.eps * self._fastest)
            settled = settled if share is None else bool(share >= self.share)
            answers.append(settled)
        return [i < frozen or one for i, one in enumerate(reversed(answers))]

    @staticmethod
    def scheduled(
        shares: Sequence[float] | str = "cubic",
        *,
        epochs: int,
        first: float = 0.8,
        anneal: float | None = None,
        above: Policy | None = None,
    ) -> "Scheduled":
        """Freeze blocks at given times, without measuring.

        Args:
            shares: The shares of the training at which the blocks are frozen, from the input up.
                Blocks beyond them train to the end. ``"cubic"`` is the schedule of FreezeOut: block
                i of L is frozen at (first + (1 - first) · i / L)³.
            epochs: How many epochs the training has: how often the Controller decides.
            first: The ``first`` of the cubic schedule.
            anneal: In which last share of its own training the learning rate of a block falls to
                zero; by default 1 for ``"cubic"``, as in FreezeOut, else 0.
            above: Chooses neurons in the layers above the prefix; by default all of them train.

        Returns:
            A policy.

        Raises:
            ValueError: If shares fall or are not in [0, 1], or ``epochs`` is not positive.
        """
        return Scheduled(shares, epochs, first, anneal, above)


class Scheduled(FromBelow):
    """Blocks are frozen at given times: see ``BottomUp.scheduled``.

    Examples:
        >>> policy = neq.BottomUp.scheduled("cubic", epochs=90, first=0.5)
    """

    def __init__(
        self,
        shares: Sequence[float] | str,
        epochs: int,
        first: float,
        anneal: float | None,
        above: Policy | None,
    ) -> None:
        super().__init__(above)
        if isinstance(shares, str) and shares != "cubic":
            raise ValueError(f"shares must be numbers or 'cubic', got {shares!r}")
        if not isinstance(shares, str) and list(shares) != sorted(shares):
            raise ValueError(f"shares must not fall, since blocks freeze in order; got {shares}")
        if not epochs >= 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.epochs, self.first = epochs, check_share("first", first)
        self.measures = self.above.measures
        anneal = float(shares == "cubic") if anneal is None else anneal
        self.annealed = check_share("anneal", anneal)
        cubic = isinstance(shares, str)
        self.shares = [] if cubic else [check_share("shares", float(share)) for share in shares]
        self._is_cubic = cubic

    def attach(self, training: Training) -> None:
        super().attach(training)
        count = len(training.blocks)
        if self._is_cubic:
            first = self.first
            self.shares = [(first + (1 - first) * i / count) ** 3 for i in range(count)]
        if len(self.shares) > count:
            raise ValueError(
                f"BottomUp.scheduled: {len(self.shares)} shares, but the model has {count} blocks "
                f"that can be frozen: {', '.join(block.name for block in training.blocks)}"
            )
        for block, share in enumerate(self.shares):
            if self.annealed:
                end = self._end(share)
                self._anneal(block, end * (1 - self.annealed), end)

    def depth(self, layers: Sequence[Motion], epoch: int) -> int:
        self._annealing.begin(epoch)
        return sum(self._end(share) <= epoch for share in self.shares)

    def _end(self, share: float) -> float:
        """At which epoch a block is frozen."""
        return round(share * self.epochs, 6)  # .07 of 100 are more than 7
