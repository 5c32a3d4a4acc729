"""The arguments of ``sgd_rows_`` and ``adamw_rows_``: lists of tensors, and scalar options.

A list has one tensor for each parameter. Dimension 0 of a parameter [n, ...], of its gradient and
of its state counts the neurons.
"""

from typing import NamedTuple

from torch import Tensor


class SGDLists(NamedTuple):
    """The lists of ``sgd_rows_``."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]  # empty without momentum
    orders: list[Tensor]  # int64 [n]: the active neurons first
    counts: list[Tensor]  # int64 []: how many neurons are active


class AdamWLists(NamedTuple):
    """The lists of ``adamw_rows_``."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    steps: list[Tensor]  # []: how many steps the parameter has taken
    orders: list[Tensor]
    counts: list[Tensor]


class SGD(NamedTuple):
    """The options of ``sgd_rows_``."""

    lr: Tensor  # [], on any device
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool  # is it the first step? Then the momentum buffers start with the gradient


class AdamW(NamedTuple):
    """The options of ``adamw_rows_``."""

    lr: Tensor  # [], on any device
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
