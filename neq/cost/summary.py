"""A table of a model's layers: their neurons and parameters, and which of them neq can freeze."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from neq._table import aligned, si
from neq.cost.account import LayerAccount, Memory
from neq.cost.block_times import BlockSummary, block_summaries
from neq.cost.flops import account
from neq.cost.memory import held
from neq.layers.base import NeuronLayer
from neq.layers.conversion import check_module, convertible, obstacle, same_neurons
from neq.layers.leaves import whole
from neq.measure.evaluating import as_inputs

_UNTRAINED = "does not train (requires_grad=False)"
_NOT_YET, _NOT_ASKED = "would be converted", "not asked for"


@dataclass(frozen=True)
class LayerSummary:
    """One module that owns parameters.

    Attributes:
        name: Its name in the model.
        kind: The name of its class.
        neurons: How many neurons it has; 0 if it is not converted or does not train.
        active: How many of them are active.
        parameters: How many parameters it owns. One that it shares is counted where it is first.
        in_reach: How many of them neq can freeze: those that train, if the module is converted, or
            if no module of the model is and this one would be.
        reason: Why it is not converted or does not train; empty otherwise.
        step_flops: The FLOPs of its part in a dense training step; None if not counted.
        wgrad_flops: Those of its weight gradient among them; None if not counted.
    """

    name: str
    kind: str
    neurons: int
    active: int
    parameters: int
    in_reach: int
    reason: str
    step_flops: int | None = None
    wgrad_flops: int | None = None


@dataclass(frozen=True)
class Summary:
    """What ``neq.summary`` found. As a string, a table.

    Attributes:
        layers: One entry for each module that owns parameters, in the model's order.
        dense_memory: The bytes that a training step of the whole model keeps.
        memory: The bytes that it keeps in the model's form, with what trains now.
        blocks: One entry for each block that can be frozen whole, from the input up, if there were
            example inputs.
    """

    layers: tuple[LayerSummary, ...]
    dense_memory: Memory
    memory: Memory
    blocks: tuple[BlockSummary, ...] = ()

    @property
    def neurons(self) -> int:
        """How many neurons all layers have."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def active(self) -> int:
        """How many of them are active."""
        return sum(layer.active for layer in self.layers)

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def in_reach(self) -> int:
        """How many of them neq can freeze."""
        return sum(layer.in_reach for layer in self.layers)

    def __str__(self) -> str:
        counted = any(layer.step_flops is not None for layer in self.layers)
        flops = ("step FLOPs", "wgrad") if counted else ()
        head = "layer", "kind", "neurons", "active", "parameters", "share", *flops
        rows: list[tuple[str, ...]] = [(*head, "")]
        for layer in self.layers:
            counts = ("-", "-")
            if layer.neurons:
                counts = (str(layer.neurons), _percent(layer.active, layer.neurons))
            share = f"{layer.parameters:,}", _percent(layer.parameters, self.parameters)
            work = (_cell(layer.step_flops), _cell(layer.wgrad_flops)) if counted else ()
            name = layer.name or "(the model)"
            rows.append((name, layer.kind, *counts, *share, *work, layer.reason))
        total = str(self.neurons), _percent(self.active, self.neurons), f"{self.parameters:,}"
        work = ("step_flops", "wgrad_flops") if counted else ()
        sums = (_cell(sum(getattr(x, of) or 0 for x in self.layers)) for of in work)
        rows.append(("total", "", *total, _percent(self.parameters, self.parameters), *sums, ""))
        lines = [
            aligned(rows, right=range(2, len(head))),
            f"neq can freeze {_percent(self.in_reach, self.parameters)} of the parameters",
            f"memory of a step: {self.memory}",
            f"if all trained: {self.dense_memory}",
        ]
        return "\n".join([*lines, *self._blocks()])

    def _blocks(self) -> list[str]:
        """The table of the blocks, if there are any."""
        if not self.blocks:
            return []
        rows: list[tuple[str, ...]] = [("block", "parameters", "share", "ms", "step left", "ends")]
        for block in self.blocks:
            share = _percent(block.parameters, self.parameters)
            left = f"{block.left:.1%}"
            size = f"{block.parameters:,}"
            rows.append((block.name, size, share, f"{block.ms:.3g}", left, block.end))
        table = aligned(rows, right=range(1, 5))
        return ["", table, "step left: of a dense step's time, with the block and all above frozen"]


# long: its docstring is half of it
def summary(
    model: nn.Module, example_inputs: Any = None, *, optimizer: Optimizer | None = None
) -> Summary:
    """List the modules of a model that own parameters: their neurons, and what neq can do.

    Before a model is converted, it says what ``neq.convert`` would convert. With example inputs it
    also lists the blocks that can be frozen whole, with their times.

    Args:
        model: Any module, converted or not.
        example_inputs: A batch like those of training. With it the FLOPs of each layer are counted,
            by ``neq.account``, and the bytes of saved activations; and the time of each block is
            measured, in some twenty steps.
        optimizer: Whose state is counted: see ``neq.account``.

    Returns:
        One entry for each such module, and for each block. ``print`` shows them as tables.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If the optimizer is of a class that ``neq.account`` does not know.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.PReLU())
        >>> print(neq.summary(model))
        layer  kind    neurons  active  parameters   share
        0      Linear        -       -          36   97.3%  would be converted
        1      PReLU         -       -           1    2.7%  not a kind of layer that neq knows
        total                0       -          37  100.0%
        neq can freeze 97.3% of the parameters
        memory of a step: weights 148 B, gradients 148 B, optimizer 148 B, together 444 B
        if all trained: weights 148 B, gradients 148 B, optimizer 148 B, together 444 B
        >>> neq.convert(model)[0].set_active([0, 3])
        >>> first, _ = neq.summary(model, torch.randn(10, 8)).layers
        >>> first.neurons, first.active, first.step_flops, first.wgrad_flops
        (4, 2, 1496, 640)
    """
    check_module("summary", model)
    accounts: dict[str, LayerAccount] = {}
    timed: tuple[BlockSummary, ...] = ()
    memory = held(model, optimizer)
    if example_inputs is not None:
        inputs = as_inputs(model, example_inputs)
        counted = account(model, inputs, optimizer=optimizer)
        accounts, memory = dict(counted.layers), (counted.dense_memory, counted.memory)
        timed = block_summaries(model, inputs)
    known = tuple(convertible())
    converted = [(name, m) for name, m in model.named_modules() if isinstance(m, NeuronLayer)]
    owners = {id(layer.weight): (name, layer) for name, layer in converted}
    default = _NOT_ASKED if converted else _NOT_YET
    seen: set[Tensor] = set()
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, known) and not _owns_parameters(module):
            continue
        counts, reason = (0, 0), ""
        if not isinstance(module, NeuronLayer):
            reason = obstacle(module) or _twin(module, owners) or default
        if reason in ("", _NOT_YET) and not any(p.requires_grad for p in module.parameters()):
            reason = _UNTRAINED
        if not reason:
            counts = (module.n_neurons, module.active.k)
        own = [p for p in module._parameters.values() if p is not None and not is_lazy(p)]
        own = [p for p in own if p not in seen]
        seen.update(own)
        trained = sum(whole(p).numel() for p in own if p.requires_grad)
        flops: tuple[int, ...] = ()
        if name in accounts:
            flops = accounts[name].dense.total.flops, accounts[name].dense.wgrad.flops
        sizes = sum(whole(p).numel() for p in own), trained if reason in ("", _NOT_YET) else 0
        layers.append(LayerSummary(name, type(module).__name__, *counts, *sizes, reason, *flops))
    return Summary(tuple(layers), *memory, timed)


def _twin(module: nn.Module, owners: dict[int, tuple[str, NeuronLayer]]) -> str | None:
    """Why a module that shares the weight of a converted one is not converted with it."""
    name, layer = owners.get(id(module._parameters.get("weight")), ("", None))
    if layer is None or same_neurons(layer, module):
        return None
    other = " of other groups" if layer.plain is type(module) else ""
    return f"it shares the weight of {name}, a {layer.plain.__name__}{other}"


def _owns_parameters(module: nn.Module) -> bool:
    # a quantized module keeps its parameters packed, out of sight of _parameters
    own = any(p is not None for p in module._parameters.values())
    return own or obstacle(module) == "quantized"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _cell(flops: int | None) -> str:
    return "-" if flops is None else si(flops)
