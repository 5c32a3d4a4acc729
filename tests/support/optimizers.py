"""Every optimizer of torch, and what it does to a layer."""

import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import neq
from neq.optim import Guard

EVERY = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
}

# it cannot train a layer: see test_sparse_adam_takes_no_dense_gradient
OPTIMIZERS = [kind for kind in EVERY.values() if kind is not torch.optim.SparseAdam]
ARGUMENTS = {kind: inspect.signature(kind).parameters for kind in OPTIMIZERS}


class Derived(torch.optim.SGD):
    """A user's class. torch calls the hooks of a step around both steps."""

    def step(self, closure=None):
        return super().step(closure)


def bits(t):
    return t.detach().view(torch.int32 if t.dtype == torch.float32 else torch.int64).clone()


def rows_of_state(optimizer, layer):
    """What the optimizer's state holds for each of the layer's neurons."""
    state = optimizer.state.get(layer.weight, {})
    n = layer.n_neurons
    return {k: t for k, t in state.items() if isinstance(t, torch.Tensor) and t.shape[:1] == (n,)}


def prepared(kind, on_thaw):
    """A linear layer, stepped twice, then twice with rows 1 and 4 frozen."""
    layer = neq.NEqLinear(3, 5, bias=False)
    options = {"momentum": 0.9} if "momentum" in ARGUMENTS[kind] else {}
    if kind is torch.optim.Adagrad:
        options["initial_accumulator_value"] = 0.25
    if "weight_decay" in ARGUMENTS[kind]:
        options["weight_decay"] = 0.1
    optimizer = kind([layer.weight], lr=0.05, **options)
    Guard(optimizer, [layer], on_thaw)
    push(layer, optimizer, 2)
    left = {key: t.clone() for key, t in rows_of_state(optimizer, layer).items()}
    layer.set_active([0, 2, 3])
    push(layer, optimizer, 2)
    return layer, optimizer, left


def push(layer, optimizer, steps):
    for _ in range(steps):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()


class Operations(TorchDispatchMode):
    """Counts the elements that operations write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        written = args[3] if func is torch.ops.aten.index_copy_.default else out
        if isinstance(written, torch.Tensor) and func is not torch.ops.aten.slice.Tensor:
            self.elements += written.numel()
        return out
