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
from neq.measure.evaluating import Inputs, as_inputs, call, device_of, evaluating, hooked, to_device

Observe = Callable[[int, Tensor, int], None]
"""Takes the number of a group, an output [samples, ...], and its dimension that counts the neurons.
"""


class Probe:
    """Runs the model on the same samples each time, and shows the output of each layer.

    The model runs in eval mode, without gradients. Nothing changes outside: training flags,
    BatchNorm's statistics, autocast's cache, and the random states of torch, numpy and Python.
    While the probe runs, these three start from the same seed each time.

    Args:
        data: One batch, or an iterable of batches such as a DataLoader. A batch is a tensor, a dict
            of keyword arguments, or a tuple or list. Of a tuple or list the model gets as many
            items as its forward requires, so ``(images, labels)`` works. An iterable has to give
            the same samples in the same order each time, without shuffling or augmentation.
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
            ValueError: If there is no batch.
        """
        hooks = {
            layer: partial(_show if observe_output is None else show_in_graph, observe, number)
            for number, layers in enumerate(groups)
            for layer in layers
        }
        marks = []
        with_graph = observe_output is not None
        with evaluating(model), hooked(hooks), torch.set_grad_enabled(with_graph):
            for batch in self.batches(model):
                marks.append(_mark(batch))
                output = self.feed(model, batch)
                if observe_output is not None:
                    observe_output(output)
        if not marks:
            raise ValueError("the probe gave no batch: a loader must have at least one")
        return marks

    def feed(self, model: nn.Module, batch: Any) -> Any:
        """What the model gives for a batch.

        Args:
            model: The model.
            batch: One of ``batches``.
        """
        if self.forward is None:
            return call(model, as_inputs(model, batch))
        return self.forward(model, to_device(batch, device_of(model)))

    def example(self, model: nn.Module) -> Inputs | None:
        """The model's arguments for the first batch; None if ``forward`` makes them.

        Args:
            model: The model.
        """
        if self.forward is not None:
            return None
        with evaluating(model):  # a loader draws random numbers, as seeds for its workers
            return as_inputs(model, next(iter(self.batches(model))))


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
            parameters = layer.parameter_rows()
            if parameters.shape[1] > 1:
                observe(number, parameters.unsqueeze(0), 1)
        return []

    def example(self, model: nn.Module) -> None:
        return None


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


def _show(
    observe: Observe, number: int, layer: NeuronLayer, args: Any, kwargs: Any, output: Tensor
) -> None:
    observe(number, *layer.by_neuron(output))


def show_in_graph(
    observe: Observe, number: int, layer: NeuronLayer, args: Any, kwargs: Any, output: Tensor
) -> Tensor:
    """Show an output that has a gradient, also where nothing trains. Returns it for the model."""
    if not output.requires_grad:
        # a copy: what follows may work in place, which a leaf forbids
        output = output.detach().requires_grad_().clone()
    shown, channel_dim = layer.by_neuron(output)
    observe(number, shown, channel_dim)
    return output if shown is output else shown.reshape(output.shape)
