"""What a training step costs, layer by layer: dense, and with the neurons that train now.

One multiply-add is two FLOPs. Forward, dgrad and wgrad of a matrix layer cost its multiply-adds
each; of a norm two multiply-adds per element each, as the published code has it. Adding biases is
not counted, nor are modules without a weight. Bytes are the least that have to move: every operand
read once, every result written once.

Of a layer with frozen neurons, wgrad and the optimizer's step cost their active share. That is what
``neq.optim.SGD`` and ``AdamW`` pay, and not torch's under a ``Guard``. A norm pays for its whole
wgrad as long as one of its neurons trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from neq._table import aligned


@dataclass(frozen=True)
class Work:
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Costs:
    """Of one training step, on the example inputs."""

    forward: Work = Work()
    dgrad: Work = Work()
    wgrad: Work = Work()
    optimizer: Work = Work()
    published_backprop_flops: float = 0
    """What the NEq paper calls backprop FLOPs: 2 x the forward multiply-adds of one sample x the
    share of active neurons, over convolutions and batch norms. It holds no dgrad."""

    @property
    def total(self) -> Work:
        return self.forward + self.dgrad + self.wgrad + self.optimizer

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LayerAccount:
    kind: str
    calls: int  # in one forward
    converted: bool
    neurons: int  # 0 where it is not converted
    active: int
    dense: Costs
    now: Costs


@dataclass(frozen=True)
class StepTime:
    """Seconds per step: what the skipped weight gradients promise, and what came of it."""

    dense: float
    predicted: float
    measured: float

    @property
    def realised(self) -> float:
        """The share of the predicted saving that is wall-clock; NaN where none was predicted."""
        promised = self.dense - self.predicted
        return (self.dense - self.measured) / promised if promised else float("nan")

    def __str__(self) -> str:
        milliseconds = (1e3 * t for t in (self.dense, self.predicted, self.measured))
        text = "step: dense {:.3f} ms, predicted {:.3f} ms, measured {:.3f} ms".format(
            *milliseconds
        )
        return f"{text}; realised {self.realised:.2f}"


@dataclass(frozen=True)
class Account:
    """``print`` it; or read ``layers``, ``dense`` and ``now``."""

    layers: Mapping[str, LayerAccount]
    uncounted: tuple[str, ...]  # modules with parameters of their own that are not in ``layers``

    @property
    def dense(self) -> Costs:
        return sum((layer.dense for layer in self.layers.values()), Costs())

    @property
    def now(self) -> Costs:
        return sum((layer.now for layer in self.layers.values()), Costs())

    @property
    def skipped(self) -> float:
        """The share of the converted layers' wgrad FLOPs that is not computed now."""
        converted = [layer for layer in self.layers.values() if layer.converted]
        dense = sum(layer.dense.wgrad.flops for layer in converted)
        return 1 - sum(layer.now.wgrad.flops for layer in converted) / dense if dense else 0.0

    def step_time(self, *, dense: float, no_wgrad: float, measured: float) -> StepTime:
        """Predicted beside measured, from three times of the same step.

        dense: with every neuron active. no_wgrad: without the weight gradients of the converted
        layers, and with every dgrad. measured: with the neurons that train now.
        """
        return StepTime(dense, dense - self.skipped * (dense - no_wgrad), measured)

    def __str__(self) -> str:
        head = "layer", "kind", "calls", "active", "forward", "dgrad", "wgrad", "optimizer", "moved"
        rows: list[tuple[str, ...]] = [head]
        for name, layer in self.layers.items():
            active = f"{layer.active / layer.neurons:.1%}" if layer.converted else "-"
            labels = name or "(the model)", layer.kind, str(layer.calls), active
            rows.append((*labels, *_cells(layer.now)))
        rows.append(("now", "", "", "", *_cells(self.now)))
        rows.append(("dense", "", "", "", *_cells(self.dense)))
        lines = [aligned(rows, right=range(2, len(head)))]
        before, after = self.dense.published_backprop_flops, self.now.published_backprop_flops
        if before:
            lines.append(
                f"backprop FLOPs as published (wgrad of convolutions and batch norms, per sample): "
                f"{_si(after)} of {_si(before)} ({after / before - 1:+.1%})"
            )
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def _cells(costs: Costs) -> tuple[str, ...]:
    parts = costs.forward, costs.dgrad, costs.wgrad, costs.optimizer
    return (*(_si(part.flops) for part in parts), _si(costs.total.bytes) + "B")


def _si(x: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.2f} {unit}"
    return f"{x:.0f} "
