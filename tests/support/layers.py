"""Layers, models and ways of comparing them that the tests of ``neq`` share."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import neq
from neq import NeuronLayer
from tests.support.tensors import integers


@dataclass(frozen=True)
class LayerCase:
    """A layer to make and an input to give it."""

    kind: type[nn.Module]
    args: tuple[Any, ...]
    options: dict[str, Any]
    shape: tuple[int, ...]
    forward: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:  # what pytest shows
        options = "".join(f" {k}={v}" for k, v in {**self.options, **self.forward}.items())
        return f"{self.kind.__name__} {'x'.join(map(str, self.shape))}{options}"

    def make(self) -> nn.Module:
        return self.kind(*self.args, **self.options)

    def twins(self, exact: bool = False) -> tuple[nn.Module, NeuronLayer]:
        """The plain layer and its converted copy; small integers for weights if ``exact``."""
        plain = self.make()
        with torch.no_grad():
            for p in plain.parameters():
                p.copy_(integers(p.shape) if exact else torch.randn(p.shape))
        return plain, neq.convert(copy.deepcopy(plain))

    def input(self, exact: bool = False) -> Tensor:
        if self.kind is nn.Embedding:
            return torch.randint(self.args[0], self.shape)
        return integers(self.shape) if exact else torch.randn(self.shape)


def _linear(shape: tuple[int, ...], **options: Any) -> LayerCase:
    return LayerCase(nn.Linear, (shape[-1], 7), options, shape)


def _conv(kind: type[nn.Module], shape: tuple[int, ...], **options: Any) -> LayerCase:
    forward = {"output_size": options.pop("output_size")} if "output_size" in options else {}
    dims = int(kind.__name__[-2])
    channels = shape[0] if len(shape) == dims + 1 else shape[1]
    options = {"kernel_size": 3, "out_channels": 6, **options}
    return LayerCase(kind, (channels,), options, shape, forward)


def _norm(kind: type[nn.Module], shape: tuple[int, ...], *args: Any, **options: Any) -> LayerCase:
    return LayerCase(kind, args, options, shape)


LINEAR = [
    *(
        _linear(shape)
        for shape in [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5), (1, 5), (0, 5), (2, 0, 5)]
    ),
    _linear((3, 5), bias=False),
    _linear((2, 3, 5), bias=False),
    LayerCase(Conv1D, (7, 5), {}, (3, 5)),
    LayerCase(Conv1D, (7, 5), {}, (2, 3, 5)),
]

CONV = [
    _conv(nn.Conv1d, (2, 4, 9)),
    _conv(nn.Conv1d, (2, 4, 9), bias=False, stride=2, padding=2, dilation=2),
    _conv(nn.Conv1d, (4, 9), padding="same", kernel_size=4),
    _conv(nn.Conv1d, (2, 4, 9), padding=1, padding_mode="replicate"),
    _conv(nn.Conv2d, (2, 4, 7, 6)),
    _conv(nn.Conv2d, (4, 7, 6)),
    _conv(nn.Conv2d, (0, 4, 7, 6)),
    _conv(nn.Conv2d, (1, 1, 7, 6), out_channels=1),
    _conv(nn.Conv2d, (2, 4, 7, 6), bias=False),
    _conv(nn.Conv2d, (2, 4, 7, 6), kernel_size=1),
    _conv(nn.Conv2d, (2, 4, 7, 6), kernel_size=(1, 4), stride=(2, 1), padding=(0, 3)),
    _conv(nn.Conv2d, (2, 4, 7, 6), stride=2, padding=1, dilation=(1, 2)),
    _conv(nn.Conv2d, (2, 4, 7, 6), padding="valid"),
    *(
        _conv(nn.Conv2d, (2, 4, 7, 6), padding="same", kernel_size=kernel, dilation=dilation)
        for kernel, dilation in [(3, 1), (3, 2), (2, 1), (4, 1), (2, 3), ((2, 3), (3, 2))]
    ),
    _conv(nn.Conv2d, (4, 7, 6), padding="same", kernel_size=(4, 3)),
    *(
        _conv(nn.Conv2d, (2, 4, 7, 6), padding=padding, padding_mode=mode)
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in ((1, 2), "same")
    ),
    _conv(nn.Conv2d, (4, 7, 6), padding="same", kernel_size=(2, 4), padding_mode="reflect"),
    _conv(nn.Conv2d, (2, 4, 7, 6), groups=2),
    _conv(nn.Conv2d, (2, 4, 7, 6), groups=2, padding="same", kernel_size=2),
    _conv(nn.Conv2d, (2, 6, 7, 6), groups=6, padding=1),
    _conv(nn.Conv2d, (2, 3, 7, 6), groups=3, out_channels=6, bias=False),
    _conv(nn.Conv3d, (2, 3, 4, 5, 4), padding=1),
    _conv(nn.Conv3d, (3, 4, 5, 4), kernel_size=2, padding="same"),
    _conv(nn.Conv3d, (2, 4, 4, 5, 4), kernel_size=2, stride=2, groups=2, padding=1),
    _conv(nn.Conv3d, (2, 3, 4, 5, 4), padding=1, padding_mode="circular"),
]

TRANSPOSED = [
    _conv(nn.ConvTranspose1d, (2, 4, 5)),
    _conv(nn.ConvTranspose1d, (4, 5), stride=2, padding=1, output_padding=1),
    _conv(nn.ConvTranspose1d, (2, 4, 5), groups=2, dilation=2),
    _conv(nn.ConvTranspose2d, (2, 4, 4, 5)),
    _conv(nn.ConvTranspose2d, (4, 4, 5)),
    _conv(nn.ConvTranspose2d, (2, 4, 4, 5), bias=False, kernel_size=2, stride=2),
    _conv(nn.ConvTranspose2d, (2, 4, 4, 5), stride=(2, 3), padding=(1, 0), dilation=(1, 2)),
    _conv(nn.ConvTranspose2d, (2, 4, 4, 5), stride=2, padding=1, output_padding=(1, 0)),
    _conv(nn.ConvTranspose2d, (2, 4, 4, 5), stride=2, padding=1, output_size=[8, 9]),
    _conv(nn.ConvTranspose2d, (4, 4, 5), stride=2, output_size=(10, 11)),
    _conv(nn.ConvTranspose2d, (2, 4, 4, 5), groups=2, stride=2, padding=1),
    _conv(nn.ConvTranspose2d, (2, 6, 4, 5), groups=3, output_size=[6, 7]),
    _conv(nn.ConvTranspose2d, (2, 6, 4, 5), groups=6, bias=False),
    _conv(nn.ConvTranspose3d, (2, 4, 3, 4, 3), kernel_size=2, stride=2),
    _conv(nn.ConvTranspose3d, (4, 3, 4, 3), groups=2, kernel_size=2),
]

NORM = [
    _norm(nn.BatchNorm1d, (5, 6), 6),
    _norm(nn.BatchNorm1d, (5, 6, 3), 6),
    _norm(nn.BatchNorm2d, (4, 6, 3, 2), 6),
    _norm(nn.BatchNorm2d, (0, 6, 3, 2), 6),
    _norm(nn.BatchNorm2d, (4, 6, 3, 2), 6, momentum=None),
    _norm(nn.BatchNorm2d, (4, 6, 3, 2), 6, track_running_stats=False),
    _norm(nn.BatchNorm3d, (3, 6, 2, 3, 2), 6),
    _norm(nn.SyncBatchNorm, (4, 6, 3, 2), 6),  # alone in its process: an ordinary batch norm
    _norm(nn.GroupNorm, (4, 6, 3), 2, 6),
    _norm(nn.GroupNorm, (4, 6), 3, 6),
    _norm(nn.LayerNorm, (4, 6), 6),
    _norm(nn.LayerNorm, (6,), 6),
    _norm(nn.LayerNorm, (0, 6), 6),
    _norm(nn.LayerNorm, (4, 6), 6, bias=False),
    _norm(nn.LayerNorm, (2, 3, 4, 5), (4, 5)),
    _norm(nn.InstanceNorm1d, (3, 6, 5), 6, affine=True),
    _norm(nn.InstanceNorm1d, (6, 5), 6, affine=True, track_running_stats=True),
    _norm(nn.InstanceNorm2d, (3, 6, 4, 5), 6, affine=True),
    _norm(nn.InstanceNorm2d, (3, 6, 4, 5), 6, affine=True, track_running_stats=True),
    _norm(nn.InstanceNorm2d, (6, 4, 5), 6, affine=True),
    _norm(nn.InstanceNorm3d, (2, 6, 3, 2, 3), 6, affine=True, track_running_stats=True),
    _norm(nn.RMSNorm, (4, 6), 6),
    _norm(nn.RMSNorm, (2, 3, 4, 5), (4, 5)),
]

EMBEDDING = [
    LayerCase(nn.Embedding, (7, 5), options, shape)
    for options, shape in [
        ({}, (4, 6)),
        ({}, ()),
        ({}, (0,)),
        ({}, (2, 0)),
        ({"padding_idx": 2}, (4, 6)),
        ({"padding_idx": -1}, (30,)),
        ({"scale_grad_by_freq": True}, (30,)),
        ({"scale_grad_by_freq": True, "padding_idx": 0}, (5, 6)),
        ({"sparse": True}, (4, 6)),
        ({"sparse": True, "padding_idx": 1}, (30,)),
    ]
]

MATRIX = [*LINEAR, *CONV, *TRANSPOSED]
ALL = [*MATRIX, *EMBEDDING, *NORM]


def first_of_each(cases: list[LayerCase]) -> list[LayerCase]:
    """One case for each type of layer."""
    return list({case.kind: case for case in reversed(cases)}.values())[::-1]


class Tiny(nn.Module):
    """A bit of everything, with an activation that works in place after each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.token_norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).relu_()).relu_()
        x = self.up(x).relu_().mean((2, 3))
        return self.head(self.hidden(self.token_norm(x)).relu_())


def tiny_input(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 5, 5)


def layers_of(model: nn.Module) -> list[NeuronLayer]:
    return [m for m in model.modules() if isinstance(m, NeuronLayer)]


def random_mask(neurons: int) -> Tensor:
    """Some neurons, neither all nor none if there is a choice."""
    count = int(torch.randint(1, max(neurons, 2), ()))
    return torch.randperm(neurons) < count


def mask_randomly(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.set_active(random_mask(layer.n_neurons))


def owners(layer: nn.Module) -> Tensor:
    """For each element of the weight, the neuron that it belongs to."""
    weight = layer.weight
    owner = torch.empty(weight.shape, dtype=torch.int64)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        inputs, per_group = weight.shape[0] // layer.groups, weight.shape[1]
        for i in range(weight.shape[0]):
            for j in range(per_group):
                owner[i, j] = i // inputs * per_group + j
    elif isinstance(layer, Conv1D):
        owner[:] = torch.arange(weight.shape[1])
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        owner = torch.arange(weight.numel()).view(weight.shape)
    else:
        owner.copy_(torch.arange(weight.shape[0]).view(-1, *[1] * (weight.dim() - 1)))
    return owner


def active_elements(layer: NeuronLayer) -> dict[str, Tensor]:
    """For weight and bias, which of their elements train."""
    active = {"weight": layer.active_mask[owners(layer)]}
    if layer.bias is not None:
        active["bias"] = layer.active_mask.view(layer.bias.shape)
    return active


def trained_elements(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """For the parameters of all its layers, which of their elements train."""
    return {
        getattr(layer, name): active
        for layer in layers_of(model)
        for name, active in active_elements(layer).items()
    }


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def run(
    layer: nn.Module, x: Tensor, dy: Tensor | None = None, **forward: Any
) -> tuple[Tensor, ...]:
    """The output and the gradient of the input: an empty one of indices."""
    x = x.clone().requires_grad_(x.is_floating_point() or x.is_complex())
    y = layer(x, **forward)
    y.backward(integers(y.shape) if dy is None else dy)
    return y, x.grad if x.requires_grad else x.new_empty(0)


def assert_gradients_of_active_rows(
    converted: nn.Module, plain: nn.Module, *, grads: dict[str, Tensor | None] | None = None
) -> None:
    """Those of ``plain`` where a neuron is active, zero where it is frozen."""
    for name, layer in converted.named_modules():
        if not isinstance(layer, NeuronLayer):
            continue
        twin = plain.get_submodule(name)
        for key, active in active_elements(layer).items():
            path = f"{name}.{key}" if name else key
            mine = getattr(layer, key).grad if grads is None else grads[path]
            expected = getattr(twin, key).grad
            if not active.any():
                assert mine is None or not mine.any(), f"{path} is frozen, its gradient is not zero"
                continue
            torch.testing.assert_close(
                mine, expected * active, msg=lambda m, path=path: f"{path}: {m}"
            )
            assert not mine[~active].any(), f"{path}: a frozen row has a gradient"


class Operators(TorchDispatchMode):
    """The names of the operators that run inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def of_neq(self) -> list[str]:
        return [name for name in self.names if name.startswith("neq::")]


class Saved:
    """The tensors that autograd saves inside."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, t: Tensor) -> Tensor:
        self.tensors.append(t)
        return t

    def has(self, t: Tensor) -> bool:
        return any(s.data_ptr() == t.data_ptr() and s.numel() for s in self.tensors)

    @property
    def bytes(self) -> int:
        storages = (t.untyped_storage() for t in self.tensors)
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def reasons_of(model: nn.Module) -> dict[str, str]:
    """Why each layer is left alone."""
    return {layer.name: layer.reason for layer in neq.summary(model).layers}


def step(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """A forward and a backward pass, on the same input each time."""
    torch.manual_seed(1)
    model.zero_grad()
    y = model(tiny_input() if x is None else x)
    y.square().sum().backward()
    return y


def rows_of(model: nn.Module) -> list[list[int]]:
    return [layer.active_rows.tolist() for layer in layers_of(model)]
