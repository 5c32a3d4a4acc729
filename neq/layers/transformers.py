"""GPT-2's ``Conv1D``: a linear layer whose weight is stored [inputs, neurons].

Apart from ``modules.py`` because it needs the transformers library, which neq does not.
"""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from neq.layers.autograd import mask_grad, planned, row_grad
from neq.layers.base import NeuronLayer, _autocast, _detach


class NEqTransformersConv1D(NeuronLayer, Conv1D):  # type: ignore[misc]  # Conv1D is untyped
    plain = Conv1D

    @property
    def n_neurons(self) -> int:
        return int(self.weight.shape[1])

    @property
    def neuron_dim(self) -> int | None:
        return 1

    def spread(self, mask: Tensor) -> Tensor:
        return mask.view(1, -1)

    def _row_wise(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        x = _autocast(x)
        plan = planned(x, weight.t(), self.rows)
        if plan == "dense":
            return self._vendor(*mask_grad(weight, bias, self.rows, dim=1), x)
        y = self._vendor(weight.detach(), _detach(bias), x)
        return row_grad(y, x, weight.t(), bias, self.rows, None, plan)
