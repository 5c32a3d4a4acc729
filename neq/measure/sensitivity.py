"""SeReNe's sensitivity of a neuron: how much the network's outputs depend on what it gives.

    full          S = 1/C Σ_c |dy_c/dp|      C backward passes
    lower-bound   S = 1/C |Σ_c dy_c/dp|      one; never more than "full"
    local         S = [p > 0]                none: the derivative of a ReLU at the mean p

p is what the neuron gives, before its activation; y_1 to y_C are the outputs for the same sample.
The absolute values are averaged over samples and positions. "local" averages p first.

The backward passes start at the outputs, not at the loss, and compute no weight gradients.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from neq.distributed.ranks import Ranks
from neq.layers.groups import groups_of
from neq.measure.base import Measure, Where
from neq.measure.probes import Probe
from neq.wrapped import model_in

Kind = Literal["lower-bound", "full", "local"]
"""Which sensitivity: see ``neq.measure.sensitivity``."""
_RELUS = "ReluBackward", "HardtanhBackward"  # autograd's names for ReLU and ReLU6


class _Call(NamedTuple):
    """One call of a layer in the graph."""

    group: int
    edge: GradientEdge  # of the layer's output, which no operation in place changes
    shape: torch.Size
    channel_dim: int


class Sensitivity(Measure):
    """Gives the score "sensitivity": how much the outputs depend on each neuron (SeReNe).

    A neuron that is not connected to the outputs is not measured, nor an entry of an Embedding.
    Nor is, with ``"local"``, one whose output goes into no ReLU, neither directly nor through a
    batch norm.

    Args:
        kind: ``"full"``, ``"lower-bound"`` or ``"local"``: see ``neq.measure.sensitivity``.

    Raises:
        ValueError: If ``kind`` is another value.

    Examples:
        >>> class DropInsensitive(neq.Policy):
        ...     def measure(self):
        ...         return neq.Sensitivity("full")
        ...
        ...     def choose(self, layers, epoch):
        ...         return [~(layer.scores["sensitivity"] < 1e-3) for layer in layers]
    """

    def __init__(self, kind: Kind = "lower-bound") -> None:
        if kind not in get_args(Kind):
            allowed = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(f"kind must be one of {allowed}; got {kind!r}")
        self.kind = kind
        # of "local": the group at whose output the ReLU of each group is; None if there is none
        self._at: list[int | None] | None = None

    @property
    def by_gradient(self) -> bool:
        """Does the next pass look at gradients? With "local" only the first, for the ReLUs."""
        return self.kind != "local" or self._at is None

    def attach(
        self,
        neurons: Sequence[int],
        devices: Sequence[torch.device],
        where: Where,
        keeps_precision: bool,
    ) -> None:
        self._neurons, self._devices = list(neurons), list(devices)
        self.start()

    def start(self) -> None:
        # sums over samples and positions: of p for "local", else of S
        self._totals = [
            torch.zeros(n, dtype=torch.float64, device=device)
            for n, device in zip(self._neurons, self._devices, strict=True)
        ]
        self._counts = [0] * len(self._neurons)  # of what was summed up, for each neuron
        self.forget()

    def forget(self) -> None:
        """Let go of the graph of a forward whose output will not be shown."""
        self._calls: list[_Call] = []

    def observe(self, group: int, y: Tensor, channel_dim: int) -> None:
        if y.numel() == 0:
            return  # of an expert without tokens, say
        if self.kind == "local":
            self._add(
                group, y.detach().movedim(channel_dim, 0).flatten(1).sum(1, dtype=_precise(y))
            )
            self._counts[group] += y.numel() // self._neurons[group]
        if self.by_gradient and y.requires_grad:
            self._calls.append(_Call(group, get_gradient_edge(y), y.shape, channel_dim))

    def observe_output(self, output: Any) -> None:
        y = output_in(output)
        calls = self._calls
        if not calls and self.by_gradient:
            raise ValueError(
                "no layer with a gradient was seen in this forward: compiled code shows none of "
                "its layers, so call the model itself; and show its output after each forward"
            )
        if self.kind != "local":
            self._differentiate(y, calls)
        elif self._at is None:
            self._at = _where_relus_are(y, calls, len(self._neurons))
        self.forget()  # also what a checkpointed forward has shown again

    def _differentiate(self, y: Tensor, calls: Sequence[_Call]) -> None:
        outputs = y.numel() // len(y)
        edges = [call.edge for call in calls]
        connected: set[int] = set()
        for seed in _ones(y) if self.kind == "lower-bound" else _one_output_each(y):
            # the engine only visits what lies between: no weight gradients
            grads = torch.autograd.grad(y, edges, seed, retain_graph=True, allow_unused=True)
            for number, (call, grad) in enumerate(zip(calls, grads, strict=True)):
                if grad is not None:
                    others = [d for d in range(grad.dim()) if d != call.channel_dim]
                    s = torch.linalg.vector_norm(grad, 1, others, dtype=_precise(grad))
                    self._add(call.group, s / outputs)
                    connected.add(number)
        for number in connected:
            group = calls[number].group
            self._counts[group] += calls[number].shape.numel() // self._neurons[group]

    def _add(self, group: int, values: Tensor) -> None:
        self._totals[group] += values.to(self._devices[group])

    def sums(self) -> Tensor:
        counts = torch.tensor(self._counts, dtype=torch.float64)
        return torch.cat([t.to(self._devices[0]) for t in (*self._totals, counts)])

    def score(self, sums: Tensor) -> dict[str, Tensor]:
        *totals, counts = sums.split([*self._neurons, len(self._neurons)])
        means = [total / count for total, count in zip(totals, counts, strict=True)]
        if self.kind == "local":
            at = [None] * len(means) if self._at is None else self._at
            means = [
                torch.full_like(mean, torch.nan)
                if where is None
                else (means[where] > 0).to(mean).masked_fill(means[where].isnan(), torch.nan)
                for mean, where in zip(means, at, strict=True)
            ]
        return {"sensitivity": torch.cat(means)}

    def state_dict(self, outputs: bool) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], outputs: bool) -> bool:
        return True  # a pass is compared with none before


def sensitivity(
    model: nn.Module, probe: Any, *, kind: Kind = "lower-bound", process_group: Any = None
) -> dict[str, Tensor]:
    """SeReNe's sensitivity of each neuron on some samples, in eval mode.

    Args:
        model: The model. It is converted in place if none of its layers is converted yet.
        probe: Samples, a loader, or a ``neq.Probe``, as for ``neq.Controller``. Under
            ``torch.distributed`` each rank may hold its own part.
        kind: ``"full"``, ``"lower-bound"`` or ``"local"``: see ``neq.measure.sensitivity``.
        process_group: The ranks that hold parts of the probe; by default all.

    Returns:
        By the name of each layer, float64 [neurons] on the CPU. A neuron that was not measured has
        NaN.

    Raises:
        ValueError: If ``kind`` is another value, or is ``"local"`` and there is no ReLU.
        TypeError: If the model gives something else than a tensor, or an object with ``logits``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        ...     _ = model[0].bias.zero_()
        ...     _ = model[2].weight.copy_(torch.tensor([[1.0, 1.0], [-3.0, 1.0]]))
        >>> x = torch.ones(4, 1)  # the second neuron's ReLU is off
        >>> neq.sensitivity(model, x, kind="full")["0"]
        tensor([2., 0.], dtype=torch.float64)
        >>> neq.sensitivity(model, x)["0"]
        tensor([1., 0.], dtype=torch.float64)
    """
    measure, model = Sensitivity(kind), model_in(model)
    groups = groups_of(model)
    sizes = [group.n_neurons for group in groups.values()]
    measure.attach(sizes, [group.device for group in groups.values()], "device", True)
    probe = probe if isinstance(probe, Probe) else Probe(probe)
    probe.run(model, list(groups.values()), measure.observe, measure.observe_output)
    scores = measure.score(Ranks(process_group).sum_(measure.sums()).cpu())["sensitivity"]
    return dict(zip(groups, scores.split(sizes), strict=True))


def output_in(output: Any) -> Tensor:
    """The outputs [samples, ...] in what a model returned."""
    y = getattr(output, "logits", output)
    if not isinstance(y, Tensor):
        raise TypeError(
            "the outputs must be a tensor [samples, ...], or an object with logits, got "
            f"{type(y).__name__}: pick the tensor from it, for a probe by "
            "neq.Probe(data, forward=lambda model, batch: model(batch)[0])"
        )
    if y.dim() == 0 or len(y) == 0 or not y.requires_grad:
        raise ValueError(
            f"the outputs must be [samples, ...] with a gradient, got shape {list(y.shape)}"
            f"{'' if y.requires_grad else ' without one'}: give what the model computed, before "
            "the loss"
        )
    return y


def _ones(y: Tensor) -> Iterable[Tensor]:
    yield torch.ones_like(y)


def _one_output_each(y: Tensor) -> Iterable[Tensor]:
    """A gradient of y for each output c: 1 at c of every sample."""
    for c in range(y.numel() // len(y)):
        seed = torch.zeros(len(y), y.numel() // len(y), dtype=y.dtype, device=y.device)
        seed[:, c] = 1
        yield seed.view(y.shape)


def _precise(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _where_relus_are(y: Tensor, calls: Sequence[_Call], groups: int) -> list[int | None]:
    """For each group the one whose output goes into a ReLU: itself, or the batch norm behind it."""
    readers: dict[tuple[Node, int], list[Node]] = {}
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for source, number in node.next_functions:
            if source is not None:
                readers.setdefault((source, number), []).append(node)
                nodes.append(source)

    def read_by(call: _Call) -> list[Node]:
        return readers.get((call.edge.node, call.edge.output_nr), [])

    at: list[int | None] = [None] * groups
    for call in calls:
        if any(reader.name().startswith(_RELUS) for reader in read_by(call)):
            at[call.group] = call.group
    norms = {c.edge.node: c.group for c in calls if "BatchNorm" in c.edge.node.name()}
    for call in calls:
        for reader in read_by(call):
            if at[call.group] is None and reader in norms and at[norms[reader]] is not None:
                at[call.group] = norms[reader]
    if not any(where is not None for where in at):
        raise ValueError(
            "kind='local' reads the derivative of a ReLU, but no layer's output goes into a ReLU, "
            "neither directly nor through a batch norm: take kind='lower-bound' or 'full'"
        )
    return at
