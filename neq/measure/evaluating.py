"""Run a model in eval mode, with hooks, and leave no trace of it."""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from neq_kernels import _torch

Inputs = tuple[Any, ...] | Mapping[str, Any]
Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode, without gradients.

    Outside nothing changes: modules keep their training flags, BatchNorms their statistics,
    autocast its cache, and torch, numpy and Python their random states. Inside, these start from
    the same seed each time.
    """
    with _undisturbed(model), torch.no_grad():
        for m in model.modules():
            m.training = False
        yield


@contextmanager
def rehearsing(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in training mode, with gradients. Outside nothing changes: as above."""
    with _undisturbed(model), torch.enable_grad():
        if not model.training:
            for m in model.modules():
                m.training = True
        kept = [
            (m, name, b, b.detach().clone())
            for m in model.modules()
            for name, b in m.named_buffers(recurse=False)
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for m, name, buffer, values in kept:
                    m._buffers[name] = buffer.copy_(values)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Outside nothing changes: see ``evaluating``."""
    modules = list(model.modules())
    # the flags themselves, since train() and eval() may be overridden and need not undo each other
    training = [m.training for m in modules]
    devices = {p.device for p in model.parameters()} | {torch.device("cpu")}
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers(devices))
        for kind in {device.type for device in devices}:
            # a cast cached here has no gradient, and training would use it
            cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            stack.enter_context(
                torch.autocast(kind, enabled=cast[0], dtype=cast[1], cache_enabled=False)
            )
        # compiled code would skip new hooks; without that module nothing is compiled
        if _torch.compiler_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for m, flag in zip(modules, training, strict=True):
                m.training = flag


def forgetting() -> saved_tensors_hooks:
    """Inside, autograd keeps nothing for a backward pass, which must not come."""
    nothing = torch.empty(0)
    return saved_tensors_hooks(lambda _: nothing, lambda _: nothing)


@contextmanager
def hooked(hooks: Mapping[Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each layer has its hook: ``hook(layer, args, kwargs, output)``."""
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def same_random_numbers(devices: Iterable[torch.device] = (), seed: int = 0) -> Iterator[None]:
    """Inside, random numbers of torch, numpy and Python start from a seed. Outside none is used."""
    accelerators = [(torch.get_device_module(d), d) for d in devices if d.type != "cpu"]
    states = [module.get_rng_state(device) for module, device in accelerators]
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds unused devices too
        for module, device in accelerators:
            with module.device(device):
                module.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        yield
    finally:
        torch.set_rng_state(cpu)
        for (module, device), state in zip(accelerators, states, strict=True):
            module.set_rng_state(state, device)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def as_inputs(model: nn.Module, batch: Any) -> Inputs:
    """A batch as the arguments of the model, by position or by name, on the model's device."""
    batch = to_device(batch, device_of(model))
    if isinstance(batch, Mapping):
        return batch
    return tuple(batch[: _required(model)]) if isinstance(batch, (tuple, list)) else (batch,)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What the model gives for arguments that ``as_inputs`` made."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def named(model: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
    """The arguments of the model by name. Those of ``*args`` have none."""
    if isinstance(inputs, Mapping):
        return inputs
    return inspect.signature(model.forward).bind_partial(*inputs).arguments


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _required(model: nn.Module) -> int:
    """How many positional arguments the model's forward requires; at least 1."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(needed))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``, also inside of mappings and sequences."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
