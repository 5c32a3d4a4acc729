"""PSP-entropy: how far a neuron's on/off state is tied to classes, and ENTROPI, which ranks by it.

    P_c = share of the samples of class c for which the neuron gives more than 0
    H_c = -P_c log2 P_c - (1 - P_c) log2 (1 - P_c)      P_c is kept within [1e-4, 0.9999]
    H   = Σ_c H_c                                       at most C bits

Low H: the state is known from the class. In order 2 classes are taken two by two: c is any pair of
classes, and P_c counts the samples of either. The published code has order 1 only.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from neq._table import aligned
from neq.distributed.ranks import Ranks
from neq.layers.base import samples_first
from neq.layers.conversion import convertible
from neq.measure.evaluating import as_inputs, call, evaluating, hooked
from neq.wrapped import model_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Per = Literal["channel", "element"]
"""What is a neuron: a channel at all of its positions, or each element of a layer's output."""
_LEAST = 1e-4  # no share P is taken to be smaller, nor larger than 1 minus this
_LABELS = "labels", "label", "target", "targets", "y"  # what a dict of a batch may call them


@dataclass(frozen=True)
class PSPEntropy(Mapping[str, Tensor]):
    """The PSP-entropy of each neuron, by the name of its layer. As a string, a table.

    Attributes:
        counts: By layer, int64 [classes, neurons]: how often each neuron was on.
        samples: By layer, int64 [classes]: how often it was looked at.
        order: 1, or 2 for pairs of classes.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
        >>> _ = nn.init.ones_(model[0].weight)
        >>> x, classes = torch.tensor([[1.0], [-1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1, 1])
        >>> entropy = neq.psp_entropy(model, [(x, classes)], layers=["0"])
        >>> entropy.by_class("0")  # on for half of class 0, and for all of class 1
        tensor([[1.0000],
                [0.0015]], dtype=torch.float64)
        >>> print(entropy)
        layer  neurons  bits  of at most  lowest  highest
        0            1  1.00           2    1.00     1.00
    """

    counts: dict[str, Tensor]
    samples: dict[str, Tensor]
    order: int

    def by_class(self, layer: str) -> Tensor:
        """H_c of each neuron, by class or by pair of classes: float64 [classes, neurons].

        Args:
            layer: The name of a layer.
        """
        on, seen = self.counts[layer].double(), self.samples[layer].double()
        if self.order == 2:
            pairs = torch.tensor([*combinations(range(len(seen)), 2)])
            on, seen = on[pairs].sum(1), seen[pairs].sum(1)
        p = (on / seen.unsqueeze(1)).clamp(_LEAST, 1 - _LEAST)
        return -p * p.log2() - (1 - p) * (1 - p).log2()

    @property
    def bits(self) -> float:
        """The mean entropy of all neurons."""
        return float(torch.cat([*self.values()]).mean())

    def __getitem__(self, layer: str) -> Tensor:
        return self.by_class(layer).sum(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "neurons", "bits", "of at most", "lowest", "highest")
        ]
        for name, h in self.items():
            most = len(self.by_class(name))
            figures = (f"{value:.2f}" for value in (h.min(), h.max()))
            rows.append((name, str(len(h)), f"{h.mean():.2f}", str(most), *figures))
        return aligned(rows, right=range(1, 6))

    def draw(self) -> "Figure":
        """The distribution of the entropy over the neurons of each layer, input on top."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("to draw the entropy needs matplotlib: pip install matplotlib") from (
                error
            )
        figure: Figure = Figure(figsize=(8, 1.5 + 0.3 * len(self)), layout="constrained")
        axes = figure.subplots()
        axes.boxplot(
            [h.numpy() for h in self.values()], orientation="horizontal", tick_labels=[*self]
        )
        axes.invert_yaxis()
        axes.set_xlabel(f"PSP-entropy of a neuron in bits, order {self.order}")
        return figure


def psp_entropy(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    per: Per = "channel",
    order: Literal[1, 2] = 1,
    layers: Iterable[str] | None = None,
    classes: int | None = None,
    process_group: Any = None,
) -> PSPEntropy:
    """The PSP-entropy of a model's neurons, in one pass in eval mode (Tartaglione et al., 2020).

    A few integers are kept for each neuron and class. A neuron is on where its layer gives more
    than 0: what that does behind it depends on the activation, and it was meant for ReLUs.

    Args:
        model: Any model.
        loader: Batches ``(inputs, labels)``, or dicts with ``"labels"``: an integer from 0 on for
            each sample. Under ``torch.distributed`` each rank may hold its own part.
        per: ``"channel"`` takes all positions of a channel together. ``"element"`` is as published:
            each element of the output of a sample is a neuron.
        order: 1, or 2 for pairs of classes.
        layers: Names of any modules; by default all layers with neurons except Embeddings, which
            give what they store. A module that neq does not know has its channels in dimension 1 if
            its output is an image, else in the last.
        classes: How many classes there are; by default the largest label says it.
        process_group: The ranks that hold parts of the loader; by default all.

    Returns:
        A mapping from names of layers to bits: float64 [neurons].

    Raises:
        TypeError: If a batch has no labels, or a layer gives no tensor.
        ValueError: If a class has no sample, labels are out of range or not one per sample, a layer
            is unknown or not called, or an argument is another value.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> loader = [(torch.randn(32, 8), torch.arange(32) % 2)]
        >>> bits = neq.psp_entropy(model, loader)["0"]
        >>> bits.shape
        torch.Size([16])
    """
    if per not in get_args(Per) or order not in (1, 2):
        raise ValueError(
            f"per must be 'channel' or 'element' and order 1 or 2; got {per!r} and {order!r}"
        )
    model, ranks = model_in(model), Ranks(process_group)
    tallies = {name: _Tally(name, per) for name in _named(model, layers)}
    called = _count(model, loader, tallies)
    if layers is not None and (silent := sorted(tallies.keys() - called.keys())):
        raise ValueError(f"never called on this loader: {silent}")
    if not called:
        raise ValueError("no layer was called: the loader must have at least one batch")
    _reduce(called, classes, ranks)
    return PSPEntropy(
        {name: tally.counts for name, tally in called.items()},
        {name: tally.samples for name, tally in called.items()},
        order,
    )


def entropi(
    models: Mapping[str, nn.Module], loader: Iterable[Any], **options: Any
) -> dict[str, PSPEntropy]:
    """ENTROPI: rank models by the entropy of their neurons, to choose one for transfer.

    Of models that were pruned in other ways the one with the highest entropy is to be fine-tuned:
    its neurons are the least tied to the classes that it knows.

    Args:
        models: The candidates by name.
        loader: Batches of inputs and labels, which can be read once for each model.
        **options: Other arguments of ``neq.psp_entropy``.

    Returns:
        By name, the highest mean entropy first.

    Raises:
        TypeError: If the loader is an iterator, which can be read once only.

    Examples:
        >>> models = {"wide": nn.Linear(8, 16), "narrow": nn.Linear(8, 4)}
        >>> loader = [(torch.randn(32, 8), torch.arange(32) % 2)]
        >>> ranked = neq.entropi(models, loader)
        >>> best = models[next(iter(ranked))]
    """
    if isinstance(loader, Iterator):
        raise TypeError("each model reads the loader: give the loader itself, not an iterator")
    found = {name: psp_entropy(model, loader, **options) for name, model in models.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].bits))


class _Tally:
    """How often each neuron of one layer was on, by class."""

    labels: Tensor  # int64 [samples], of the batch under way

    def __init__(self, name: str, per: Per) -> None:
        self.name, self.per = name, per
        self.counts = torch.zeros(0, 0, dtype=torch.int64)  # [classes, neurons]
        self.samples = torch.zeros(0, dtype=torch.int64)  # [classes]

    def take(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(y, Tensor):
            raise TypeError(f"layer {self.name!r} gives no tensor, but {type(y).__name__}")
        y, dim = _by_neuron(layer, y)
        if len(y) != len(self.labels):
            raise ValueError(
                f"layer {self.name!r} gives {len(y)} samples for {len(self.labels)} labels: there "
                "must be one label for each sample"
            )
        on = (y > 0).movedim(dim, 1)  # [samples, channels, ...]
        if self.per == "channel":
            on = on.reshape(len(y), on.shape[1], -1)
            by_sample, positions = on.sum(2), on.shape[2]
        else:
            by_sample, positions = on.flatten(1).long(), 1
        labels = self.labels.to(y.device)
        classes = max(int(labels.max()) + 1, len(self.samples))
        self._make_room(classes, by_sample.shape[1], y.device)
        self.counts.index_add_(0, labels, by_sample)
        self.samples.index_add_(0, labels, torch.full_like(labels, positions))

    def _make_room(self, classes: int, neurons: int, device: torch.device) -> None:
        if self.counts.shape[1] not in (0, neurons):
            raise ValueError(
                f"layer {self.name!r} gives {neurons} neurons, and gave {self.counts.shape[1]} "
                "before: with per='element' all samples must have one size"
            )
        more = classes - len(self.samples)
        if more:
            old = self.counts.new_zeros(0, neurons) if not len(self.samples) else self.counts
            old = old.to(device)
            self.counts = torch.cat([old, old.new_zeros(more, neurons)])
            self.samples = torch.cat([self.samples.to(device), old.new_zeros(more)])

    def reduce(self, classes: int, ranks: Ranks) -> None:
        """Take the counts of all ranks, for so many classes, on the CPU."""
        if len(self.samples) > classes:
            raise ValueError(
                f"there are {classes} classes, but a sample has label {len(self.samples) - 1}"
            )
        self._make_room(classes, self.counts.shape[1], self.counts.device)
        self.counts = ranks.sum_(self.counts).cpu()
        self.samples = ranks.sum_(self.samples).cpu()


def _count(
    model: nn.Module, loader: Iterable[Any], tallies: Mapping[str, _Tally]
) -> dict[str, _Tally]:
    """Run the model on all batches. Returns the tallies of the layers that were called."""
    hooks = {model.get_submodule(name): tally.take for name, tally in tallies.items()}
    with evaluating(model), hooked(hooks):
        for batch in loader:
            inputs, labels = _divided(batch)
            for tally in tallies.values():
                tally.labels = labels
            call(model, as_inputs(model, inputs))
    return {name: tally for name, tally in tallies.items() if len(tally.samples)}


def _reduce(tallies: Mapping[str, _Tally], classes: int | None, ranks: Ranks) -> None:
    """Add up over all ranks. Every class must have been seen."""
    seen = max(len(tally.samples) for tally in tallies.values())
    device = next(iter(tallies.values())).counts.device  # where ranks can exchange tensors
    total = classes or int(ranks.max_(torch.tensor(seen, device=device)))
    for name, tally in tallies.items():
        tally.reduce(total, ranks)
        if missing := (tally.samples == 0).nonzero().flatten().tolist():
            raise ValueError(
                f"layer {name!r} saw no sample of class {missing[0]}, of {total} classes: its "
                "share is unknown"
            )


def _named(model: nn.Module, layers: Iterable[str] | None) -> list[str]:
    modules = dict(model.named_modules())
    if layers is None:
        known = {plain: ours for plain, ours in convertible().items() if not ours.looks_up}
        kinds = (*known, *known.values())
        found = [name for name, module in modules.items() if isinstance(module, kinds)]
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no layer with neurons that neq knows: name modules "
                "in layers"
            )
        return found
    if isinstance(layers, str):
        raise TypeError(f"layers must be several names, like [{layers!r}], not a string")
    names = [*layers]
    for name in names:
        if name not in modules:
            raise ValueError(
                f"layers: no module is called {name!r}; there are "
                f"{', '.join(repr(known) for known in modules if known)}"
            )
    return names


def _by_neuron(layer: nn.Module, y: Tensor) -> tuple[Tensor, int]:
    """``y`` with samples first, and its dimension that counts the neurons."""
    for plain, ours in convertible().items():
        if isinstance(layer, plain):
            return ours.by_neuron(cast(Any, layer), y)
    return samples_first(y, 1 if y.dim() in (4, 5) else -1)


def _divided(batch: Any) -> tuple[Any, Tensor]:
    """A batch without its labels, and the labels: int64 [samples]."""
    inputs: Any = None
    labels: Any = None
    if isinstance(batch, Mapping):
        key = next((key for key in _LABELS if key in batch), None)
        if key is not None:
            labels = batch[key]
            inputs = {name: value for name, value in batch.items() if name != key}
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        *rest, labels = batch
        inputs = rest
    if not isinstance(labels, Tensor):
        raise TypeError(
            "a batch must be (inputs, labels), or a dict with 'labels': the entropy is taken by "
            f"class. Got {type(batch).__name__} without labels"
        )
    if labels.dim() != 1 or labels.is_floating_point() or labels.numel() == 0:
        raise ValueError(
            "labels must be integers, one for each sample; got shape "
            f"{list(labels.shape)} of {labels.dtype}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be 0 or more, got {int(labels.min())}")
    return inputs, labels.long()
