"""GPT-2's ``Conv1D``: a linear layer whose weight is stored column-major, as [inputs, neurons].

Only ``convert`` imports this file: it needs the transformers library, which neq does without.
"""

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neq.layers.autograd import train_active
from neq.layers.base import NeuronLayer, autocast


class NEqTransformersConv1D(NeuronLayer, Conv1D):  # type: ignore[misc]  # Conv1D is untyped
    """``transformers.pytorch_utils.Conv1D`` that trains only its active neurons, its columns."""

    plain = Conv1D

    @property
    def n_neurons(self) -> int:
        return int(self.weight.shape[1])

    @property
    def neuron_dim(self) -> int | None:
        return 1

    def spread(self, mask: Tensor) -> Tensor:
        return mask.view(1, -1)

    @staticmethod
    def macs(layer: nn.Module, x: int, y: int) -> int:
        return y * len(cast(Tensor, layer.weight))

    def _train_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor | None:
        x = autocast(input)
        args = x, weight, bias, self.active, self.trained()
        return train_active(lambda w, b: self._vendor(w, b, x), *args, dim=1)
