"""``neq::sgd_rows_`` and ``neq::adamw_rows_``: schemas, checks and fakes.

Dimension 0 of each parameter counts its neurons. Each parameter has an ``order`` and a ``count``.
"""

from typing import Any

from torch import Tensor

from neq_kernels.library import check_rows, define
from neq_kernels.step import planner, reference
from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists


def _check(lists: SGDLists | AdamWLists, lr: Tensor, **alike: list[Tensor]) -> None:
    """Raise a ValueError unless the lists fit each other.

    ``alike``: lists of tensors shaped like the parameters, by name.
    """
    params = lists.params
    each = {name: tensors for name, tensors in lists._asdict().items() if name not in _OPTIONAL}
    for name, tensors in (each | alike).items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{name} must have one entry for each of the {len(params)} params, "
                f"got {len(tensors)}"
            )
    if lr.dim() != 0:
        raise ValueError(f"lr must have no dimensions, got {list(lr.shape)}")
    for i, p in enumerate(params):
        if p.dim() == 0 or not p.is_floating_point():
            raise ValueError(
                f"params[{i}] must be [neurons, ...] and floating point, "
                f"got {list(p.shape)} {p.dtype}"
            )
        for name, tensors in alike.items():
            t = tensors[i]
            if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
                raise ValueError(
                    f"{name}[{i}] must be like params[{i}], {list(p.shape)} {p.dtype} on "
                    f"{p.device}, got {list(t.shape)} {t.dtype} on {t.device}"
                )
        check_rows(p.shape[0], p, lists.orders[i], lists.counts[i], f"params[{i}]")


_OPTIONAL = "momentum_buffers", "max_exp_avg_sqs"  # empty unless an option needs them


def _check_sgd(*args: Any) -> None:
    lists, options = SGDLists(*args[:5]), SGD(*args[5:])
    if options.momentum == 0 and lists.momentum_buffers:
        raise ValueError("momentum_buffers must be empty without momentum")
    buffers = {"momentum_buffers": lists.momentum_buffers} if options.momentum else {}
    _check(lists, options.lr, grads=lists.grads, **buffers)


def _check_adamw(*args: Any) -> None:
    lists, options = AdamWLists(*args[:8]), AdamW(*args[8:])
    if lists.max_exp_avg_sqs and not options.amsgrad:
        raise ValueError("max_exp_avg_sqs must be empty without amsgrad")
    largest = {"max_exp_avg_sqs": lists.max_exp_avg_sqs} if options.amsgrad else {}
    moments = {"exp_avgs": lists.exp_avgs, "exp_avg_sqs": lists.exp_avg_sqs, **largest}
    _check(lists, options.lr, grads=lists.grads, **moments)


def _sgd_rows_(*args: Any) -> None:
    _check_sgd(*args)
    planner.sgd_rows_(SGDLists(*args[:5]), SGD(*args[5:]))


def _adamw_rows_(*args: Any) -> None:
    _check_adamw(*args)
    planner.adamw_rows_(AdamWLists(*args[:8]), AdamW(*args[8:]))


sgd_rows_ = define(
    "sgd_rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] orders,"
    " Tensor[] counts, Tensor lr, float momentum, float dampening, float weight_decay,"
    " bool nesterov, bool maximize, bool first) -> ()",
    _sgd_rows_,
    _check_sgd,
    reference.sgd_rows_,
)
adamw_rows_ = define(
    "adamw_rows_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor[] orders,"
    " Tensor[] counts, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
    " bool amsgrad, bool maximize) -> ()",
    _adamw_rows_,
    _check_adamw,
    reference.adamw_rows_,
)
