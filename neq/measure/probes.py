"""What neurons are measured on: a batch or a loader, noise, or their own weights.

A good probe is small. The authors of the method recommend one sample per class, held out of the
training set, and report comparable results with a single image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neq.layers.base import NeuronLayer
from neq.measure.evaluating import Inputs, as_inputs, call, device_of, evaluating, hooked, to_device

# given the number of a group of layers, values [samples, ...] and the dimension of its neurons
Observe = Callable[[int, Tensor, int], None]


class Probe:
    """Runs the model on the same samples each time, and shows what each layer puts out.

    The model runs in eval mode, without gradients, and is left as it was found: each module's
    training flag, BatchNorm's statistics, autocast's cache, and the random state of torch, numpy
    and Python. Inside, all three start from the same seed each time.

    Args:
        data: One batch, as the model takes it: a tensor; a dict, given as keyword arguments; a
            tuple or list, of which the model gets as many items as its forward requires (so that a
            loader's ``(images, labels)`` works). Or any other iterable of such batches, like a
            DataLoader, which has to give the same samples in the same order each time: no
            shuffling, no augmentation.
        forward: ``forward(model, batch)``, where that isn't how the model is called. The batch
            comes on the model's device.
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
        self, model: nn.Module, groups: Sequence[Sequence[NeuronLayer]], observe: Observe
    ) -> list[Tensor]:
        """Show each output of each group's layers, in the order in which they are computed.

        What comes back tells these samples from others: float64 vectors, on any device.
        """
        hooks = {
            layer: partial(_show, observe, number)
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
            self.forward(model, to_device(batch, device_of(model)))

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
        self, model: nn.Module, groups: Sequence[Sequence[NeuronLayer]], observe: Observe
    ) -> list[Tensor]:
        for number, (layer, *_) in enumerate(groups):
            parameters = layer.parameter_rows()
            if parameters.shape[1] > 1:
                observe(number, parameters.unsqueeze(0), 1)
        return []

    def example(self, model: nn.Module) -> None:
        return None


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
    observe: Observe, number: int, layer: NeuronLayer, args: Any, kwargs: Any, output: Tensor
) -> None:
    observe(number, *layer.by_neuron(output))
