"""What the optimizers' operators take beside lists of tensors, as every backend passes it on."""

from typing import NamedTuple

from torch import Tensor


class SGD(NamedTuple):
    lr: Tensor  # [], on any device
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool  # there is no momentum yet, so the buffers start with the gradient


class AdamW(NamedTuple):
    lr: Tensor  # [], on any device
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
