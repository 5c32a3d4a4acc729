"""The head trains first, and then what has something to learn beside it."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer
from neq.layers.groups import Group
from neq.measure.base import Measure
from neq.measure.gradient_signal import HEAD, GradientSignal
from neq.optim.frozen import hold
from neq.policies.base import Choice, Motion, Policy, Training, check_share

CLEAR = 2.0  # a layer with this signal trains, however strong others are


class HeadFirst(Policy):
    """For fine-tuning: finds which part of a network has to learn, by how its gradients agree.

    1. The head trains alone: what lies neither in a layer to choose for nor in a block, by default
       the classifier. The rest is a frozen prefix. A head that knows nothing yet would only disturb
       it.
    2. When the head has settled, all layers are looked at for one epoch: they have gradients, but
       only the head is stepped.
    3. Layers in which there is a signal train from then on. Blocks below the lowest of them are
       frozen whole. If no layer has a signal, the head trains alone to the end. What neq does not
       convert has no signal: it trains if it is not in a frozen block.

    The signal is that of ``neq.measure.gradient_signal``: by how much the mean gradient of an epoch
    is more than noise. 0 is noise, and at 1 both are equally strong, in any model and for any loss.
    A norm follows the layer before it.

    The Controller needs its optimizer and no probe. Its ``warmup`` does not apply. A head that
    learns slowly settles late: raise the learning rate, or that of the head. A signal adds up over
    an epoch of the data. With ``every``, give the steps of an epoch: ``every=20`` then looks for
    twenty steps. The shorter a look, the more noise it sees as a signal, and the more trains.

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
        self._measure: GradientSignal
        self._following: GradientSignal | None = None  # the measure of the training it chooses for
        self._training: Training
        self._start_anew()

    def _start_anew(self) -> None:
        self.phase = "head"
        self.signals: dict[str, float] = {}
        self._decided = -1  # how many epochs were over at the last decision
        self._since = 0  # and when the phase began
        self._trained: frozenset[str] = frozenset()  # the names of groups
        self._statistics: dict[str, Tensor] = {}  # of norms that are looked at and don't train

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
        if self._following is not None:
            self.detach()
        self._training = training
        self._start_anew()
        stepped = {
            p for one in training.optimizers for group in one.param_groups for p in group["params"]
        }
        head = [p for p in self._head() if p in stepped]
        if not head:
            raise ValueError(
                "HeadFirst trains first what the Controller leaves alone, but no parameter that an "
                "optimizer steps is left alone, or only those of a layer whose weight a lower one "
                "shares: name the head in leave_alone"
            )
        self._following = self._measure
        self._measure.follow(training.layers.values(), training.optimizers, head)

    def detach(self) -> None:
        if self._following is not None:
            self._following.remove()
            self._following = None
            self._end_look()

    def depth(self, layers: Sequence[Motion], epoch: int) -> int:
        self._advance(layers, epoch)
        return 0 if self.phase == "look" else self._lowest()

    def _lowest(self) -> int:
        """How many blocks lie below the lowest layer that trains."""
        for i, block in enumerate(self._training.blocks):
            parameters = {*map(self._training.model.get_parameter, block.parameters)}
            groups = (self._training.layers[name] for name in self._trained)
            if any(group.first.weight in parameters for group in groups):
                return i
        return len(self._training.blocks)

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
            if passed >= self.longest or self._signal(HEAD) < self.settled:
                self._begin("look", epoch)
        elif self.again is not None and passed >= self.again:
            self._begin("look", epoch)

    def _begin(self, phase: str, epoch: int) -> None:
        if self.phase == "look":
            self._end_look()
        self.phase, self._since = phase, epoch
        if phase == "look":
            self._statistics = {name: t.clone() for name, t in self._held_statistics().items()}
        self._watch()

    def _watch(self) -> None:
        """Look at what counts in this phase, and hold what has gradients but shall not move."""
        held = self._held() if self.phase == "look" else set()
        for module in self._training.model.modules():
            hold(module, [n for n, p in module.named_parameters(recurse=False) if p in held])
        watched = {"head": [HEAD], "look": [*self._training.layers, HEAD], "chosen": []}
        self._measure.watch(watched[self.phase])

    @torch.no_grad()
    def _end_look(self) -> None:
        """What was looked at has moved in nothing: the statistics of its norms neither."""
        model = self._training.model
        for module in model.modules():
            hold(module, ())
        for name, kept in self._statistics.items():
            model.get_buffer(name).copy_(kept)
        self._statistics = {}

    def _choose(self, layers: Sequence[Motion]) -> None:
        """The layers that train from what was seen of them."""
        self.signals = {one.name: self._signal(one.name) for one in layers}
        if all(map(math.isnan, self.signals.values())):
            warnings.warn(
                "HeadFirst saw less than two steps in its look, or gradients that are not finite. "
                "So it can't tell what has to learn, and all layers train: give the Controller a "
                "larger every, or look for an epoch of several steps",
                stacklevel=5,
            )
        known = [self.signals[one.name] for one in layers if one.layer.by_rows]
        strongest = max((s for s in known if not math.isnan(s)), default=0.0)
        least = max(self.signal, min(self.share * strongest, CLEAR))
        trained, follows = set(), None
        for one in layers:
            enough = not self.signals[one.name] < least  # NaN trains
            if one.layer.by_rows or follows is None:
                follows = enough if one.layer.by_rows else None
            else:
                enough = follows
            if enough:
                trained.add(one.name)
        self._trained = frozenset(trained)

    def _signal(self, name: str) -> float:
        """The signal of an epoch of the data, of which some steps were looked at."""
        steps = self._measure.looked.get(name) or 1
        scale = 1.0 if self.epoch_steps is None else self.epoch_steps / steps
        return scale * self._measure.found[name]

    def _body(self) -> set[Tensor]:
        """The parameters in blocks and in layers to choose for, and those that share a weight."""
        model = self._training.model
        names = [name for block in self._training.blocks for name in block.parameters]
        body: set[Tensor] = {model.get_parameter(name) for name in names}
        for group in self._training.layers.values():
            body.update(_parameters(group))
        tied = [m for m in model.modules() if isinstance(m, NeuronLayer) and m.weight in body]
        return body.union(p for layer in tied for p in layer.parameters(recurse=False))

    def _head(self) -> list[Tensor]:
        body = self._body()
        return [p for p in self._training.model.parameters() if p.requires_grad and p not in body]

    def _held(self) -> set[Tensor]:
        """What does not train beside a look: frozen blocks, and layers without a signal."""
        training = self._training
        if not self._trained:
            return self._body()
        held: set[Tensor] = set()
        for block in training.blocks[: self._lowest()]:
            held.update(map(training.model.get_parameter, block.parameters))
        for name, group in training.layers.items():
            if name not in self._trained:
                held.update(_parameters(group))
        return held

    def _held_statistics(self) -> dict[str, Tensor]:
        """The running statistics of norms that don't train, by name."""
        held, blocks = self._held(), self._training.blocks[: self._lowest()]
        inside = {name for block in blocks for name in block.modules}
        return {
            f"{path}.{name}" if path else name: buffer
            for path, module in self._training.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and (path in inside or any(p in held for p in module.parameters(recurse=False)))
            for name, buffer in module.named_buffers(recurse=False)
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "decided": self._decided,
            "since": self._since,
            "signals": dict(self.signals),
            "trained": sorted(self._trained),
            "statistics": {name: kept.clone() for name, kept in self._statistics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase, self._decided, self._since = state["phase"], state["decided"], state["since"]
        self.signals, self._trained = dict(state["signals"]), frozenset(state["trained"])
        buffers = dict(self._training.model.named_buffers())
        self._statistics = {
            name: kept.to(buffers[name].device, copy=True)
            for name, kept in state["statistics"].items()
        }
        self._watch()


def _parameters(group: Group) -> list[Tensor]:
    return [p for layer in group for p in layer.parameters(recurse=False)]
