"""What a training step costs, layer by layer: dense, and with the neurons that train now.

One multiply-add is two FLOPs. Forward, dgrad and wgrad of a matrix layer each cost its
multiply-adds. In a norm each costs two multiply-adds per element, as the published code counts
them. In an Embedding only wgrad costs FLOPs, one addition per element of the output; a sparse
gradient counts as a dense one. Biases and modules without a weight are not counted. Bytes are the
least that have to move: every operand is read once, and every result is written once.

In a layer with frozen neurons, wgrad and the optimizer's step cost the active share. For the step
this is true of ``neq.optim.SGD`` and ``AdamW``, but not of torch's under a ``Guard``. A norm costs
its whole wgrad unless all of its neurons are frozen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from neq._table import aligned, si


@dataclass(frozen=True)
class Work:
    """An amount of work.

    Attributes:
        flops: Operations on floating-point numbers.
        bytes: Bytes moved, at least.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Costs:
    """What one training step on the example inputs costs.

    Attributes:
        forward: The forward pass.
        dgrad: The gradients of the layers' inputs.
        wgrad: The gradients of the layers' parameters.
        optimizer: The optimizer's step.
        published_backprop_flops: The "backprop FLOPs" of the NEq paper: 2 · forward multiply-adds
            of one sample · share of active neurons, over convolutions and batch norms. They include
            no dgrad.
    """

    forward: Work = Work()
    dgrad: Work = Work()
    wgrad: Work = Work()
    optimizer: Work = Work()
    published_backprop_flops: float = 0

    @property
    def total(self) -> Work:
        """All four together."""
        return self.forward + self.dgrad + self.wgrad + self.optimizer

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LayerAccount:
    """What one layer costs in a training step.

    Attributes:
        kind: The name of its class.
        calls: How often one forward of the model calls it.
        converted: Is it a layer of neq?
        neurons: How many neurons it has; 0 if it is not converted, or does not train
            (``requires_grad=False``).
        active: How many of them are active.
        dense: The costs with all neurons active.
        now: The costs with the neurons that are active now.
    """

    kind: str
    calls: int
    converted: bool
    neurons: int
    active: int
    dense: Costs
    now: Costs


@dataclass(frozen=True)
class Memory:
    """The bytes that a training step keeps.

    Attributes:
        weights: The parameters; of a compact model, all weights and the leaves.
        gradients: Of what trains.
        optimizer: The optimizer's state.
        activations: What a forward saves for the backward; None without example inputs.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int | None = None

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)

    def __str__(self) -> str:
        parts = {k: v for k, v in vars(self).items() if v is not None} | {"together": self.total}
        return ", ".join(f"{name} {si(size)}B" for name, size in parts.items())


@dataclass(frozen=True)
class StepTime:
    """Seconds per step: predicted from the skipped weight gradients, and measured.

    Attributes:
        dense: With all neurons active, measured.
        predicted: With the neurons that train now, predicted.
        measured: With the neurons that train now, measured.
    """

    dense: float
    predicted: float
    measured: float

    @property
    def realised(self) -> float:
        """The share of the predicted saving that was measured; NaN if none was predicted."""
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
    """What ``neq.account`` counted. As a string, a table.

    Attributes:
        layers: The costs of each layer, by its name in the model.
        uncounted: The names of other modules that own parameters. Their costs are not counted.
        dense_memory: The bytes that a step of the whole model keeps, were all its rows parameters.
        memory: The bytes that it keeps now. In the masked form they are the same.
    """

    layers: Mapping[str, LayerAccount]
    uncounted: tuple[str, ...]
    dense_memory: Memory = Memory()
    memory: Memory = Memory()

    @property
    def dense(self) -> Costs:
        """The costs of a step with all neurons active."""
        return sum((layer.dense for layer in self.layers.values()), Costs())

    @property
    def now(self) -> Costs:
        """The costs of a step with the neurons that are active now."""
        return sum((layer.now for layer in self.layers.values()), Costs())

    @property
    def skipped(self) -> float:
        """The share of the converted layers' wgrad FLOPs that is skipped now."""
        converted = [layer for layer in self.layers.values() if layer.converted]
        dense = sum(layer.dense.wgrad.flops for layer in converted)
        return 1 - sum(layer.now.wgrad.flops for layer in converted) / dense if dense else 0.0

    def step_time(self, *, dense: float, no_wgrad: float, measured: float) -> StepTime:
        """Compare the measured time of a step with the predicted one.

        Args:
            dense: Seconds with all neurons active.
            no_wgrad: Seconds without the weight gradients of the converted layers, but with every
                dgrad.
            measured: Seconds with the neurons that train now.
        """
        return StepTime(dense, dense - self.skipped * (dense - no_wgrad), measured)

    def __str__(self) -> str:
        head = "layer", "kind", "calls", "active", "forward", "dgrad", "wgrad", "optimizer", "moved"
        rows: list[tuple[str, ...]] = [head]
        for name, layer in self.layers.items():
            active = f"{layer.active / layer.neurons:.1%}" if layer.neurons else "-"
            labels = name or "(the model)", layer.kind, str(layer.calls), active
            rows.append((*labels, *_cells(layer.now)))
        rows.append(("now", "", "", "", *_cells(self.now)))
        rows.append(("dense", "", "", "", *_cells(self.dense)))
        lines = [aligned(rows, right=range(2, len(head)))]
        before, after = self.dense.published_backprop_flops, self.now.published_backprop_flops
        if before:
            lines.append(
                f"backprop FLOPs as published (wgrad of convolutions and batch norms, per sample): "
                f"{si(after)} of {si(before)} ({after / before - 1:+.1%})"
            )
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        lines.append(f"memory now: {self.memory}; dense: {self.dense_memory}")
        return "\n".join(lines)


def _cells(costs: Costs) -> tuple[str, ...]:
    parts = costs.forward, costs.dgrad, costs.wgrad, costs.optimizer
    return (*(si(part.flops) for part in parts), si(costs.total.bytes) + "B")
