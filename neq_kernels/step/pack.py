"""Pack the active rows, let torch's own optimizer step them, scatter the result.

It supports every device and dtype that torch does. It uses torch's default steps and not the fused
ones: on a CPU, fused SGD in torch 2.13 is wrong for 16-bit dtypes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from neq_kernels.step.options import SGD, AdamW, AdamWLists, SGDLists


def sgd_rows_(lists: SGDLists, options: SGD) -> None:
    rows = _active_rows(lists)
    g = _pack(lists.grads, rows)
    with _packed(lists.params, rows) as p, _packed(lists.momentum_buffers, rows) as m:
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


def adamw_rows_(lists: AdamWLists, options: AdamW) -> None:
    rows = _active_rows(lists)
    g = _pack(lists.grads, rows)
    with (
        _packed(lists.params, rows) as p,
        _packed(lists.exp_avgs, rows) as m,
        _packed(lists.exp_avg_sqs, rows) as v,
        _packed(lists.max_exp_avg_sqs, rows) as v_max,
    ):
        adamw(
            p,
            g,
            m,
            v,
            v_max,
            lists.steps,
            capturable=any(not step.is_cpu for step in lists.steps),
            **{**options._asdict(), "lr": _number(options.lr)},
        )


def _active_rows(lists: SGDLists | AdamWLists) -> list[Tensor]:
    return [o[: int(count)] for o, count in zip(lists.orders, lists.counts, strict=True)]


def _pack(tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    return [t.index_select(0, r) for t, r in zip(tensors, rows, strict=True)]


@contextmanager
def _packed(tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the active rows of each tensor. What they are in the end is scattered into it."""
    if not tensors:
        yield []
        return
    packed = _pack(tensors, rows)
    yield packed
    for t, r, new in zip(tensors, rows, packed, strict=True):
        t.index_copy_(0, r, new)


def _number(lr: Tensor) -> float | Tensor:
    """The learning rate as a number, as torch prefers it, unless that waits for a GPU."""
    return lr.item() if lr.is_cpu else lr
