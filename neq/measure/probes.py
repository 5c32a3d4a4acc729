"""What neurons are measured on: a batch or a loader, noise, or their own weights.

A good probe is small. The authors of the method recommend one sample per class, held out of the
training set. They report comparable results with a single image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer
from neq.measure.evaluating import (
    Inputs,
    as_inputs,
    call,
    device_of,
    evaluating,
    hooked,
    named,
    to_device,
)

Observe = Callable[[int, Tensor, int], None]
"""Takes the number of a group, an output [samples, ...], and its dimension that counts the neurons.
"""


class Probe:
    """Runs the model on the same samples each time, and shows the output of each layer.

    The model runs in eval mode, without gradients. Nothing changes outside: training flags,
    BatchNorm's statistics, autocast's cache, and the random states of torch, numpy and Python.
    While the probe runs, these three start from the same seed each time.

    Where the model gets an ``attention_mask`` [samples, positions], positions that it calls padding
    (0 or False) do not count: in outputs [samples, positions, neurons] they are zero.

    Args:
        data: One batch, or an iterable of batches such as a DataLoader. A batch is a tensor, a dict
            of keyword arguments, or a tuple or list. Of a tuple or list the model gets as many
            items as its forward requires, so ``(images, labels)`` works. An iterable has to give
            the same samples in the same order each time. A loader that shuffles or augments by the
            random states that the probe seeds does so; one with a generator of its own does not.
        forward: ``forward(model, batch)`` calls the model in another way. The batch comes on the
            model's device.

    Attributes:
        keeps_precision: Are outputs kept in their own precision? Otherwise in at most 16 bits.

    Raises:
        TypeError: If ``data`` is no batch and no iterable, or an iterator that can be read once
            only.

    Examples:
        >>> images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
        >>> probe = neq.Probe((images, labels))
        >>> probe = neq.Probe(images, forward=lambda model, batch: model(batch.flatten(1)))
    """

    keeps_precision: ClassVar[bool] = False

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
        """The batches, the same each time.

        Args:
            model: The model that will get them.
        """
        if isinstance(self.data, (Tensor, Mapping)):
            return [self.data]
        if isinstance(self.data, (tuple, list)) and any(isinstance(x, Tensor) for x in self.data):
            return [self.data]
        return self.data  # type: ignore[no-any-return]

    def run(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[NeuronLayer]],
        observe: Observe,
        observe_output: Callable[[Any], None] | None = None,
    ) -> list[Tensor]:
        """Run the model, and show each output of each layer in the order of computation.

        Of a layer that looks its outputs up, it shows all of them: its parameters. They come last.

        Args:
            model: The model.
            groups: The groups of layers in the model.
            observe: Called as ``observe(group, y, channel_dim)``: the number of the group, an
                output [samples, ...], and its dimension that counts the neurons.
            observe_output: Called with what the model returned for each batch. If given, the model
                runs with a graph, in which each layer's output has a gradient.

        Returns:
            Marks that tell these samples from others: float64 vectors, on any device.

        Raises:
            TypeError: If there is no tensor in a batch.
            ValueError: If there is no batch.
        """
        with_graph = observe_output is not None
        real: Tensor | None = None  # bool [samples, positions] of the batch: no padding

        def show(number: int, layer: NeuronLayer, args: Any, kwargs: Any, output: Tensor) -> Any:
            if not with_graph:
                shown, _, channel_dim = _without_padding(layer, output, real)
                return observe(number, shown, channel_dim)
            output = _with_gradient(output)
            shown, goes_on, channel_dim = _without_padding(layer, output, real)
            observe(number, shown, channel_dim)
            return output if goes_on is output else goes_on.reshape(output.shape)

        hooks = {
            layer: partial(show, number)
            for number, layers in enumerate(groups)
            for layer in layers
            if not layer.looks_up
        }
        marks = []
        with evaluating(model), hooked(hooks), torch.set_grad_enabled(with_graph):
            for batch in self.batches(model):
                marks.append(_mark(batch))
                real = self._not_padding(model, batch)
                output = self.feed(model, batch)
                if observe_output is not None:
                    observe_output(output)
        if not marks:
            raise ValueError("the probe gave no batch: a loader must have at least one")
        for number, layers in enumerate(groups):
            for layer in layers:
                if layer.looks_up:
                    _show_parameters(observe, number, layer)
        return marks

    def feed(self, model: nn.Module, batch: Any) -> Any:
        """What the model gives for a batch.

        Args:
            model: The model.
            batch: One of ``batches``.
        """
        if self.forward is None:
            return call(model, _inputs(model, batch))
        return self.forward(model, to_device(batch, device_of(model)))

    def example(self, model: nn.Module) -> Inputs | None:
        """The model's arguments for the first batch; None if ``forward`` makes them.

        Args:
            model: The model.
        """
        if self.forward is not None:
            return None
        with evaluating(model):  # a loader draws random numbers, as seeds for its workers
            return _inputs(model, next(iter(self.batches(model))))

    def _not_padding(self, model: nn.Module, batch: Any) -> Tensor | None:
        """bool [samples, positions], on the model's device; None if no attention mask says so."""
        inputs: Mapping[str, Any] = {}
        if isinstance(batch, Mapping):
            inputs = batch
        elif self.forward is None and isinstance(batch, (tuple, list)):
            inputs = named(model, _inputs(model, batch))
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        return mask.to(device_of(model)) > 0


class NoiseProbe(Probe):
    """Measures neurons on Gaussian noise, without any data.

    ``NoiseProbe((100, 3, 32, 32))`` is the auxiliary set of NeVe, a follow-up of the method.

    Args:
        shape: The shape of the batch, samples first.
        seed: The seed of the noise.
        forward: ``forward(model, batch)``, as for ``Probe``.

    Raises:
        ValueError: If ``shape`` is empty or a size is not positive.

    Examples:
        >>> probe = neq.NoiseProbe((100, 3, 32, 32))
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
    """Measures neurons by their parameters instead of their outputs, without any samples.

    It costs no forward. A neuron with a single parameter, as in a norm without a bias, has no
    direction that could change. So it is not measured, and ``Equilibrium`` never freezes it.

    Examples:
        >>> probe = neq.WeightProbe()
    """

    keeps_precision = True

    def __init__(self) -> None:
        super().__init__(())

    def run(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[NeuronLayer]],
        observe: Observe,
        observe_output: Callable[[Any], None] | None = None,
    ) -> list[Tensor]:
        if observe_output is not None:
            raise ValueError(
                "this measure looks at the model's outputs, and a WeightProbe has none: give "
                "samples as the probe"
            )
        for number, (layer, *_) in enumerate(groups):
            _show_parameters(observe, number, layer)
        return []

    def example(self, model: nn.Module) -> None:
        return None


def on_host(marks: Iterable[Tensor]) -> Tensor:
    """float64: the marks that ``run`` returned, one after the other, on the CPU."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(mark.cpu() for mark in marks)])


def _mark(batch: Any) -> Tensor:
    """float64 [samples of all tensors]: the sum of each sample of each tensor in the batch."""
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


def _without_padding(
    layer: NeuronLayer, output: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """The output by neuron, zero at padding; what the model goes on with; the neurons' dimension.

    The model goes on with the same values, of which those that are shown may have a gradient.
    """
    y, channel_dim = layer.by_neuron(output)
    if real is None or channel_dim != 2 or y.dim() != 3 or y.shape[:2] != real.shape:
        return y, y, channel_dim
    padding = ~real.unsqueeze(2)
    shown = y.masked_fill(padding, 0)
    return shown, torch.where(padding, y.detach(), shown), channel_dim


def _with_gradient(output: Tensor) -> Tensor:
    """The output, with a gradient also where nothing trains."""
    if output.requires_grad:
        return output
    # a copy: what follows may work in place, which a leaf forbids
    return output.detach().requires_grad_().clone()


def _inputs(model: nn.Module, batch: Any) -> Inputs:
    if not _has_tensor(batch):
        raise TypeError(
            f"probe: there is no tensor in its batch, a {type(batch).__name__}: the model needs "
            "tensors, such as those that a tokenizer returns; or give neq.Probe a forward(model, "
            "batch) that makes them"
        )
    return as_inputs(model, batch)


def _has_tensor(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        return any(map(_has_tensor, batch))
    return isinstance(batch, Tensor)


def _show_parameters(observe: Observe, number: int, layer: NeuronLayer) -> None:
    parameters = layer.parameter_rows()
    if parameters.shape[1] > 1:
        observe(number, parameters.unsqueeze(0), 1)
