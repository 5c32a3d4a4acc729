"""``NEqLinear``."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neq.layers.autograd import is_usual_product, train_active
from neq.layers.base import NeuronLayer, autocast


class NEqLinear(NeuronLayer, nn.Linear):
    """``nn.Linear`` that trains only its active neurons, the rows of its weight.

    Takes the arguments of ``nn.Linear``. All neurons are active until ``set_active``.

    Examples:
        >>> layer = neq.NEqLinear(64, 10)
        >>> layer.set_active([0, 3])  # the gradients of other rows are zero from here on
        >>> layer(torch.randn(8, 64)).sum().backward()
        >>> layer.weight.grad.any(1).nonzero().flatten()
        tensor([0, 3])
    """

    plain = nn.Linear

    def _train_active(self, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor | None:
        if input.layout is not torch.strided or input.is_nested:
            return None
        x = autocast(input)
        run = partial(F.linear, x)
        leaves, may_hook = self.trained(), is_usual_product(x, weight)
        return train_active(run, x, weight, bias, self.active, leaves, may_hook=may_hook)
