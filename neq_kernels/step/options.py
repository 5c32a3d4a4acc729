"""What ``sgd_rows_`` and ``adamw_rows_`` are given: a tensor for each parameter, and options.

Dimension 0 of a parameter [n, ...], its gradient and its state counts the neurons.
"""

from typing import NamedTuple

from torch import Tensor


class SGDLists(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]  # empty without momentum
    orders: list[Tensor]  # int64 [n]: the active neurons first
    counts: list[Tensor]  # int64 []: how many those are


class AdamWLists(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    steps: list[Tensor]  # []: how many steps the parameter has taken
    orders: list[Tensor]
    counts: list[Tensor]


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
