"""The head trains first, and then what has something to learn beside it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neq.measure.base import Measure
from neq.measure.gradient_signal import HEAD, GradientSignal
from neq.policies.base import Choice, Motion, Policy, Training, check_share

CLEAR = 2.0  # a layer with this signal trains, however strong others are


class HeadFirst(Policy):
    """For fine-tuning: finds which part of a network has to learn, by how its gradients agree.

    1. The head trains alone: what the Controller leaves alone, by default the classifier. The rest
       is a frozen prefix. A head that knows nothing yet would only disturb it.
    2. When the head has settled, all layers are looked at for one epoch: they have gradients, but
       only the head is stepped.
    3. Layers in which there is a signal train from then on. Blocks below the lowest of them are
       frozen whole. If no layer has a signal, the head trains alone to the end.

    The signal is that of ``neq.measure.gradient_signal``: by how much the mean gradient of an epoch
    is more than noise. 0 is noise, and at 1 both are equally strong, in any model and for any loss.
    A norm follows the layer before it.

    The Controller needs its optimizer and no probe. Its ``warmup`` does not apply. A head that
    learns slowly settles late: raise the learning rate, or that of the head. A signal adds up over
    an epoch of the data. With ``every``, give the steps of an epoch: ``every=20`` then looks for
    twenty steps.

    Args:
        signal: The least signal of a layer that trains.
        share: Its least share of the strongest signal of a layer. A signal of 2 is always enough.
        settled: The head has settled when its signal is below this.
        longest: For how many epochs of the Controller the head trains alone at most.
        epoch_steps: How many steps an epoch of the data has; by default, as many as are between two
            decisions.
        again: After how many epochs of the Controller all layers are looked at again; by default
            never.

    Attributes:
        phase: ``"head"``, ``"look"`` or ``"chosen"``.
        signals: The signal of each layer when it was last looked at, by its name.

    Raises:
        ValueError: If an argument is out of its range. The Controller raises it if it has no
            optimizer, if nothing trains but the layers to choose for, or if these are compact.

    Examples:
        >>> policy = neq.HeadFirst()
    """

    measures = False
    freezes_prefix = True
    needs_blocks = False
    by_granule = False
    chooses_first = True

    def __init__(
        self,
        signal: float = 0.5,
        share: float = 0.25,
        *,
        settled: float = 1.0,
        longest: int = 2,
        epoch_steps: int | None = None,
        again: int | None = None,
    ) -> None:
        for name, count in (("longest", longest), ("epoch_steps", epoch_steps), ("again", again)):
            if count is not None and not count >= 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, value in (("signal", signal), ("settled", settled)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.signal, self.share = signal, check_share("share", share)
        self.settled, self.longest = settled, longest
        self.epoch_steps, self.again = epoch_steps, again
        self.phase = "head"
        self.signals: dict[str, float] = {}
        self._measure: GradientSignal
        self._training: Training
        self._decided = -1  # how many epochs were over at the last decision
        self._since = 0  # and when the phase began
        self._trained: frozenset[str] = frozenset()  # the names of groups
        self._buffers: dict[str, Tensor] = {}  # of what is looked at and does not train

    def measure(self) -> Measure:
        self._measure = GradientSignal()
        return self._measure

    def attach(self, training: Training) -> None:
        if not training.optimizers:
            raise ValueError(
                "HeadFirst watches the optimizer's steps: give the Controller its optimizer"
            )
        compact = [name for name, group in training.layers.items() if group.is_compact]
        if compact:
            raise ValueError(
                f"HeadFirst looks at the gradients of all neurons, for which the compact layer "
                f"{compact[0]!r} has no room"
            )
        self._training = training
        head = self._head()
        if not head:
            raise ValueError(
                "HeadFirst trains first what the Controller leaves alone, but no parameter that "
                "trains is left alone, or only one that a lower layer shares: name the head in "
                "leave_alone"
            )
        self._measure.follow(training.layers.values(), training.optimizers, head)

    def detach(self) -> None:
        self._measure.remove()
        self._put_buffers_back()

    def depth(self, layers: Sequence[Motion], epoch: int) -> int:
        self._advance(layers, epoch)
        blocks = len(self._training.blocks)
        if self.phase == "look":
            return 0
        lowest = [one.block for one in layers if one.name in self._trained]
        return min((blocks if block is None else block for block in lowest), default=blocks)

    def choose(self, layers: Sequence[Motion], epoch: int) -> Sequence[Choice]:
        self._advance(layers, epoch)  # of a model that can't be cut nobody asked for the depth
        return [None if self.phase == "look" or one.name in self._trained else () for one in layers]

    def _advance(self, layers: Sequence[Motion], epoch: int) -> None:
        """Go on to the next phase, if it is time."""
        if epoch == self._decided:
            return
        first, self._decided = self._decided < 0, epoch
        passed = epoch - self._since
        if first:
            self._begin("head", epoch)
        elif self.phase == "look":
            self._choose(layers)
            self._begin("chosen", epoch)
        elif self.phase == "head":
            if passed >= self.longest or self._measure.found[HEAD] < self.settled:
                self._begin("look", epoch)
        elif self.again is not None and passed >= self.again:
            self._begin("look", epoch)

    def _begin(self, phase: str, epoch: int) -> None:
        if self.phase == "look":
            self._put_buffers_back()
        self.phase, self._since = phase, epoch
        if phase == "look":
            self._buffers = {name: b.clone() for name, b in self._frozen_buffers().items()}
        self._watch()

    def _watch(self) -> None:
        """Look at what counts in this phase, and hold what has gradients but shall not move."""
        groups = self._training.layers
        if self.phase == "look":
            stepped = set(self._head())
            stepped.update(p for name in self._trained for p in _parameters(groups[name].first))
            held = [p for p in self._training.model.parameters() if p not in stepped]
            self._measure.watch([*groups, HEAD], held)
        else:
            self._measure.watch([HEAD] if self.phase == "head" else [])

    def _choose(self, layers: Sequence[Motion]) -> None:
        """The layers that train from what was seen of them."""
        found = self._measure.found
        scale = 1.0
        if self.epoch_steps is not None:
            scale = self.epoch_steps / max(self._measure.looked, 1)
        self.signals = {one.name: scale * found[one.name] for one in layers}
        strongest = max(
            (self.signals[one.name] for one in layers if one.layer.by_rows), default=0.0
        )
        least = max(self.signal, min(self.share * strongest, CLEAR))
        trained, leads = set(), True
        for one in layers:
            if one.layer.by_rows:
                leads = not self.signals[one.name] < least  # NaN trains
            if leads:
                trained.add(one.name)
        self._trained = frozenset(trained)

    def _head(self) -> list[Tensor]:
        """The parameters that are in no block, and in no layer to choose for."""
        model = self._training.model
        body = {name for block in self._training.blocks for name in block.parameters}
        body_parameters = {model.get_parameter(name) for name in body}
        for group in self._training.layers.values():
            body_parameters.update(_parameters(group.first))
        return [p for p in model.parameters() if p.requires_grad and p not in body_parameters]

    def _frozen_buffers(self) -> dict[str, Tensor]:
        """The buffers of modules whose parameters don't train, by name: statistics of norms."""
        model = self._training.model
        stepped = set(self._head())
        for name in self._trained:
            stepped.update(_parameters(self._training.layers[name].first))
        return {
            f"{path}.{name}" if path else name: buffer
            for path, module in model.named_modules()
            if not any(p in stepped for p in _parameters(module))
            for name, buffer in module.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def _put_buffers_back(self) -> None:
        """A layer that was looked at has moved in nothing: its norm's statistics neither."""
        model = self._training.model
        for name, kept in self._buffers.items():
            model.get_buffer(name).copy_(kept)
        self._buffers = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "decided": self._decided,
            "since": self._since,
            "signals": dict(self.signals),
            "trained": sorted(self._trained),
            "buffers": {name: kept.clone() for name, kept in self._buffers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase, self._decided, self._since = state["phase"], state["decided"], state["since"]
        self.signals, self._trained = dict(state["signals"]), frozenset(state["trained"])
        buffers = dict(self._training.model.named_buffers())
        self._buffers = {
            name: kept.to(buffers[name].device, copy=True)
            for name, kept in state["buffers"].items()
        }
        self._watch()


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))
