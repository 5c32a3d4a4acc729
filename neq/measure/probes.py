"""What neurons are measured on: a batch or a loader, noise, or their own weights.

A good probe is small. The authors of the method recommend one sample per class, held out of the
training set, and report comparable results with a single image.
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer, _NEqConv, _NEqNorm

Inputs = tuple[Any, ...] | Mapping[str, Any]
# given the number of a group of layers, values [samples, ...] and the dimension of its neurons
See = Callable[[int, Tensor, int], None]


class Probe:
    """Runs the model on the same samples each time, and shows what each layer puts out.

    data: one batch, as the model takes it: a tensor; a dict, given as keyword arguments; a tuple or
        list, of which the model gets as many items as its forward requires (so that a loader's
        ``(images, labels)`` works). Or any other iterable of such batches, like a DataLoader, which
        has to give the same samples in the same order each time: no shuffling, no augmentation.
    forward: ``forward(model, batch)``, where that isn't how the model is called. The batch comes on
        the model's device.

    The model runs in eval mode, without gradients, and is left as it was found: each module's
    training flag, BatchNorm's statistics, autocast's cache, and the random state of torch, numpy
    and Python. Inside, all three start from the same seed each time.
    """

    keeps_precision: ClassVar[bool] = False  # may outputs be kept in 16 bits until the next epoch?

    def __init__(
        self, data: Any, forward: Callable[[nn.Module, Any], object] | None = None
    ) -> None:
        self.data, self.forward = data, forward
        if isinstance(data, Iterator):
            raise TypeError(
                f"a probe is run once per epoch, but {type(data).__name__} can be read only once: "
                "give the loader itself, or one batch"
            )
        if not isinstance(data, Iterable):
            raise TypeError(
                "a probe must be a tensor, a tuple, a dict, or an iterable of those, "
                f"got {type(data).__name__}"
            )

    def batches(self, model: nn.Module) -> Iterable[Any]:
        """The batches, the same each time."""
        if isinstance(self.data, (Tensor, Mapping)):
            return [self.data]
        if isinstance(self.data, (tuple, list)) and any(isinstance(x, Tensor) for x in self.data):
            return [self.data]
        return self.data  # type: ignore[no-any-return]

    def run(
        self, model: nn.Module, groups: Sequence[Sequence[NeuronLayer]], see: See
    ) -> list[Tensor]:
        """Show each output of each group's layers, in the order in which they are computed.

        What comes back tells these samples from others: float64 vectors, on any device.
        """
        hooks = {
            layer: partial(_show, see, number)
            for number, layers in enumerate(groups)
            for layer in layers
        }
        marks = []
        with evaluating(model), hooked(hooks):
            for batch in self.batches(model):
                marks.append(_mark(batch))
                self.feed(model, batch)
        if not marks:
            raise ValueError("the probe gave no batch: a loader must have at least one")
        return marks

    def feed(self, model: nn.Module, batch: Any) -> None:
        """Call the model on a batch."""
        if self.forward is None:
            call(model, as_inputs(model, batch))
        else:
            self.forward(model, _to(batch, _device(model)))

    def example(self, model: nn.Module) -> Inputs | None:
        """The model's arguments for the first batch; None where ``forward`` makes them up."""
        if self.forward is not None:
            return None
        with evaluating(model):  # a loader draws a seed for its workers, a shuffling one more
            return as_inputs(model, next(iter(self.batches(model))))


class NoiseProbe(Probe):
    """Gaussian noise of a given shape, samples first: no data needed.

    ``NoiseProbe((100, 3, 32, 32))`` is the auxiliary set of NeVe, a follow-up of the method.
    """

    def __init__(
        self,
        shape: Sequence[int],
        seed: int = 0,
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        if not shape or any(size < 1 for size in shape):
            raise ValueError(f"shape must be positive sizes, samples first; got {tuple(shape)}")
        generator = torch.Generator().manual_seed(seed)
        super().__init__(torch.randn(*shape, generator=generator), forward)

    def batches(self, model: nn.Module) -> Iterable[Any]:
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        return [self.data.to(next(floats, torch.float32))]


class WeightProbe(Probe):
    """No samples at all: a neuron is measured by its own parameters instead of its outputs.

    Costs no forward. A neuron with a single parameter (a norm without bias) has no direction that
    could change, so it is not measured and always trains.
    """

    keeps_precision = True

    def __init__(self) -> None:
        super().__init__(())

    def run(
        self, model: nn.Module, groups: Sequence[Sequence[NeuronLayer]], see: See
    ) -> list[Tensor]:
        for number, (layer, *_) in enumerate(groups):
            parameters = parameter_rows(layer)
            if parameters.shape[1] > 1:
                see(number, parameters.unsqueeze(0), 1)
        return []

    def example(self, model: nn.Module) -> None:
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode, and nothing that happens is felt outside."""
    modules = list(model.modules())
    # the flags themselves: train() and eval() may be overridden, and need not undo each other
    training = [m.training for m in modules]
    devices = {p.device for p in model.parameters()} | {torch.device("cpu")}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_random_numbers(devices))
        for kind in {device.type for device in devices}:
            # a cast of a weight cached here, without gradient, would be used in training
            cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            stack.enter_context(
                torch.autocast(kind, enabled=cast[0], dtype=cast[1], cache_enabled=False)
            )
        if (
            "torch._dynamo" in sys.modules
        ):  # else nothing is compiled; compiled code skips new hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for m in modules:
                m.training = False
            yield
        finally:
            for m, flag in zip(modules, training, strict=True):
                m.training = flag


@contextmanager
def hooked(hooks: Mapping[NeuronLayer, Callable[..., None]]) -> Iterator[None]:
    """Inside, each layer has its hook: ``hook(layer, args, kwargs, output)``."""
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _same_random_numbers(devices: Iterable[torch.device]) -> Iterator[None]:
    accelerators = [(torch.get_device_module(d), d) for d in devices if d.type != "cpu"]
    states = [module.get_rng_state(device) for module, device in accelerators]
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed devices not used here
        for module, device in accelerators:
            with module.device(device):
                module.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        yield
    finally:
        torch.set_rng_state(cpu)
        for (module, device), state in zip(accelerators, states, strict=True):
            module.set_rng_state(state, device)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def as_inputs(model: nn.Module, batch: Any) -> Inputs:
    """A batch as the arguments of the model, by position or by name, on its device."""
    batch = _to(batch, _device(model))
    if isinstance(batch, Mapping):
        return batch
    return tuple(batch[: _required(model)]) if isinstance(batch, (tuple, list)) else (batch,)


def call(model: nn.Module, inputs: Inputs) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*inputs)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _required(model: nn.Module) -> int:
    """How many positional arguments the model's forward can't do without; at least one."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return max(1, len(needed))


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _mark(batch: Any) -> Tensor:
    """float64 [...]: the sum of each sample, in order, of each tensor in the batch."""
    if isinstance(batch, Tensor):
        real = torch.view_as_real(batch) if batch.is_complex() else batch
        samples = real.detach().reshape(len(batch) if batch.dim() else 1, -1)
        return samples.sum(1, dtype=torch.float64)
    if isinstance(batch, Mapping):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, (str, bytes)):
        parts = [_mark(part) for part in batch]
        return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0)
    return torch.zeros(0)


def _show(
    see: See, number: int, layer: NeuronLayer, args: Any, kwargs: Any, output: Tensor
) -> None:
    see(number, *by_neuron(layer, output))


def by_neuron(layer: NeuronLayer, output: Tensor) -> tuple[Tensor, int]:
    """The layer's output with samples in dimension 0, and the dimension that counts its neurons."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        # its neurons may be spread over several dimensions, the last ones
        output, channel_dim = output.flatten(output.dim() - len(layer.normalized_shape)), -1
    elif isinstance(layer, _NEqConv):
        channel_dim = 1 - layer.weight.dim()  # from the end: a single sample has no dimension 0
    elif isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        no_batch = layer._get_no_batch_dim()  # type: ignore[no-untyped-call]
        channel_dim = 0 if output.dim() == no_batch else 1
    elif isinstance(layer, _NEqNorm):
        channel_dim = 1
    else:
        channel_dim = -1
    channel_dim %= output.dim()
    return (output, channel_dim) if channel_dim else (output.unsqueeze(0), 1)


def parameter_rows(layer: NeuronLayer) -> Tensor:
    """[n, parameters]: the weight and bias of each neuron."""
    weight: Tensor = layer.weight.detach()
    if isinstance(layer, _NEqConv) and layer.transposed:
        inputs = weight.shape[0] // layer.groups
        weight = weight.unflatten(0, (layer.groups, inputs)).transpose(1, 2).flatten(0, 1)
    elif layer.neuron_dim:
        weight = weight.movedim(layer.neuron_dim, 0)
    weight = weight.reshape(layer.n_neurons, prod(weight.shape) // layer.n_neurons)
    if layer.bias is None:
        return weight
    return torch.cat([weight, layer.bias.detach().reshape(-1, 1).to(weight.dtype)], 1)
