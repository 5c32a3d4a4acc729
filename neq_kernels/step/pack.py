"""Pack the active rows, let torch's own optimizer step them, scatter the result.

``sgd_rows_`` and ``adamw_rows_`` for every device and dtype that torch steps, as torch does by
default. (Not its fused steps: on a CPU, that of SGD in torch 2.13 is wrong for 16-bit dtypes.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from neq_kernels.step.options import SGD, AdamW


def sgd_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: SGD,
) -> None:
    active = _active(rows, counts)
    g = _pack(grads, active)
    with _packed(params, active) as p, _packed(momentum_buffers, active) as m:
        buffers: list[Tensor | None] = [None] * len(p) if options.first or not m else [*m]
        sgd(
            p,
            g,
            buffers,
            lr=_number(options.lr),  # type: ignore[arg-type]
            momentum=options.momentum,
            dampening=options.dampening,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
            maximize=options.maximize,
        )
        if m:
            m[:] = [buffer for buffer in buffers if buffer is not None]


def adamw_rows_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rows: list[Tensor],
    counts: list[Tensor],
    options: AdamW,
) -> None:
    active = _active(rows, counts)
    g = _pack(grads, active)
    with (
        _packed(params, active) as p,
        _packed(exp_avgs, active) as m,
        _packed(exp_avg_sqs, active) as v,
        _packed(max_exp_avg_sqs, active) as v_max,
    ):
        adamw(
            p,
            g,
            m,
            v,
            v_max,
            steps,
            capturable=any(not step.is_cpu for step in steps),
            **{**options._asdict(), "lr": _number(options.lr)},
        )


def _active(rows: Sequence[Tensor], counts: Sequence[Tensor]) -> list[Tensor]:
    return [r[: int(count)] for r, count in zip(rows, counts, strict=True)]


def _pack(tensors: Sequence[Tensor], active: Sequence[Tensor]) -> list[Tensor]:
    return [t.index_select(0, rows) for t, rows in zip(tensors, active, strict=True)]


@contextmanager
def _packed(tensors: Sequence[Tensor], active: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The active rows of each tensor, to be changed; what they then are goes back into it."""
    if not tensors:
        yield []
        return
    packed = _pack(tensors, active)
    yield packed
    for t, rows, new in zip(tensors, active, packed, strict=True):
        t.index_copy_(0, rows, new)


def _number(lr: Tensor) -> float | Tensor:
    """A number where that takes no waiting for a GPU, as torch prefers."""
    return lr.item() if lr.is_cpu else lr
