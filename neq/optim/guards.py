"""What keeps frozen neurons as they are in each of several optimizers."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from neq.layers.base import NeuronLayer
from neq.optim.by_rows import RowOptimizer
from neq.optim.guard import Guard, OnThaw


class Guards:
    """Guards the optimizers that do not leave frozen neurons alone by themselves.

    Args:
        optimizers: All that step the model, without wrappers.
        model: The model.
        layers: Those whose neurons are frozen.
        on_thaw: As for ``neq.optim.Guard``.
        told: Those of ``neq.optim`` that were told earlier, not by their user, what to follow.

    Attributes:
        told: Those that are told now.
        by_rows: Are there optimizers, and do all of them step active neurons only?
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        model: nn.Module,
        layers: Iterable[NeuronLayer],
        on_thaw: OnThaw,
        told: Iterable[Optimizer],
    ) -> None:
        self.told = list(told)
        mine = list(layers)
        self._guards = [
            Guard(one, model, on_thaw=on_thaw)
            for one in optimizers
            if not self._leaves_alone(one, model, mine, on_thaw)
        ]
        self.by_rows = bool(optimizers) and not self._guards

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """After an error inside, the optimizers are let go of."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Let go of the optimizers."""
        for guard in self._guards:
            guard.remove()

    def _leaves_alone(
        self, one: Optimizer, model: nn.Module, layers: Collection[NeuronLayer], on_thaw: OnThaw
    ) -> bool:
        if not isinstance(one, RowOptimizer):
            return False
        if not one.follows or one in self.told:
            one.follow(model, on_thaw)
            self.told.append(one)
        return one.covers(layers)
