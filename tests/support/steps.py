"""Parameters to step, by rows."""

from functools import partial

import torch

from tests.support.tensors import equal_with_nan, integers

SHAPES = [(1,), (300,), (7, 1), (6, 5), (64, 33), (5, 2, 3, 3), (9, 4, 1, 1), (3, 2, 2, 3, 3)]
EXACT = partial(integers, most=8)
SHARES = [0.0, 0.1, 0.5, 1.0]


def laid_out(t, layout):
    """The same values in another order in memory; dimension 0 counts the neurons.

    "inputs_first" is how GPT-2's weights lie, and those of transposed convolutions.
    """
    if layout == "inputs_first" and t.dim() > 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t


def problem(
    states, share, dtype=torch.float32, device="cpu", layout="plain",
    shapes=SHAPES, shift=0, values=EXACT,
):  # fmt: skip
    """Parameters, gradients and states of small integers, with NaN wherever a row is frozen.

    shift: so many elements lie between where memory begins and the tensors.
    """
    lists = [[] for _ in range(2 + states)]
    orders, counts = [], []
    for shape in shapes:
        order = torch.randperm(shape[0], device=device)
        k = round(share * shape[0])
        for i, tensors in enumerate(lists):
            t = laid_out(values(shape), layout)
            t = (t if i < 3 else t.abs()).to(device, dtype)  # second moments are not negative
            memory = t.new_empty(t.numel() + shift)[shift:]
            t = memory.as_strided(t.shape, t.stride(), shift).copy_(t)
            tensors.append(t.index_fill_(0, order[k:], torch.nan))
        orders.append(order)
        counts.append(torch.tensor(k))
    return lists, orders, counts


def assert_lists_equal(mine, truth, close=None):
    """NaN for NaN; the same values but for ``close``, if given."""
    for a, b in zip(mine, truth, strict=True):
        if close is None:
            assert equal_with_nan(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True)


def lr(value):
    return torch.tensor(value, dtype=torch.float64)


SGD_OPTIONS = [  # momentum, dampening, weight_decay, nesterov, maximize, first: exact in binary
    (0.0, 0.0, 0.0, False, False, False),
    (0.0, 0.0, 0.25, False, True, False),
    (0.5, 0.0, 0.0, False, False, False),
    (0.5, 0.25, 0.5, False, False, False),
    (0.5, 0.25, 0.5, False, True, True),
    (0.5, 0.0, 0.5, True, False, False),
    (0.5, 0.0, 0.0, True, True, True),
]


ADAMW_OPTIONS = [  # amsgrad, maximize, weight_decay
    (False, False, 0.0),
    (False, True, 0.1),
    (True, False, 0.1),
]


def sgd_arguments(**changed):
    """Arguments of ``sgd_rows_`` for one parameter [4, 2]."""
    args = {
        "params": [torch.ones(4, 2)],
        "grads": [torch.ones(4, 2)],
        "momentum_buffers": [torch.ones(4, 2)],
        "orders": [torch.arange(4)],
        "counts": [torch.tensor(2)],
        "lr": lr(0.5),
        "momentum": 0.5,
    }
    return (*(args | changed).values(), 0.0, 0.0, False, False, False)
