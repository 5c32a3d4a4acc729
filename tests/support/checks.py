"""Every way of computing a weight gradient, and what has to hold for each."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

import neq_kernels
from neq_kernels import reference
from neq_kernels.device.gpu import Gpu
from neq_kernels.shapes import ceil_div, is_column_major
from neq_kernels.wgrad import planner
from neq_kernels.wgrad.geometry import Conv, full_shape, is_compact
from neq_kernels.wgrad.problem import BUCKETS, Problem
from tests.support.cases import Case


def problem_of(op, dy, x, weight, order, count, bias, *geometry) -> Problem:
    conv = Conv.of(*geometry) if geometry else None
    if conv is None:
        dy, x = (t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (dy, x))
    neurons = len(order)
    bucket = ceil_div(int(count) * BUCKETS, neurons)
    shapes = tuple(dy.shape), tuple(x.shape), full_shape(weight, neurons, conv)
    column_major = conv is None and is_column_major(weight)
    last = conv is not None and x.stride(1) == 1
    layout = last, conv, bucket, column_major, bias, is_compact(weight, neurons, conv)
    return Problem(op, dy.device.type, dy.dtype, *shapes, *layout)


def answers(op: str, args: tuple) -> Iterator[tuple[str, tuple]]:
    """(backend, (dW, db)): of the planner's choice, then of each backend that takes the problem."""
    run = getattr(neq_kernels, op)
    yield "planned", run(*args)
    problem = problem_of(op, *args)
    for name in planner.supporting(problem):
        with mock.patch.object(planner, "choose", return_value=name):
            yield name, run(*args)


def assert_exact(op: str, args: tuple) -> None:
    """All answers are the reference's, bit for bit, in the weight's dtype and strides."""
    expected = getattr(reference, op)(*args)
    for name, got in answers(op, args):
        assert_same(got, expected, name)


def exact_gradients(op: str, args: tuple) -> tuple:
    """The reference in float64, by an algorithm that is exact on integers.

    Vendors' in float16 on a CPU, and Winograd and FFT in cuDNN, are not. And of an image of one
    column that lies the other way round, torch's on a CPU reads other values.
    """
    dy, x, *rest = args
    with torch.backends.cudnn.flags(enabled=False):
        return getattr(reference, op)(dy.double().contiguous(), x.double().contiguous(), *rest)


def assert_planned_is_exact(op: str, args: tuple) -> None:
    """What the operator returns, by the backend that the planner chooses, is exact."""
    assert_same(getattr(neq_kernels, op)(*args), exact_gradients(op, args))


@contextmanager
def every_call_by(name: str, gpu: Gpu):
    """Inside, each call is this backend's, also where there is no GPU to ask for its size."""
    with (
        mock.patch.object(planner, "choose", return_value=name),
        mock.patch.object(planner.BACKENDS[name], "gpu", return_value=gpu),
    ):
        yield


def assert_same(got, expected, name="") -> None:
    """The same bits, and in the same order in memory."""
    torch.testing.assert_close(
        got, expected, rtol=0, atol=0, check_stride=True, msg=lambda text: f"{name}: {text}"
    )


def no_worse_than_the_vendor(op: str, case: Case, dtypes, device) -> None:
    """The error against float64 is at most twice that of the plain layer's gradient."""
    dy, x, weight, order, *rest = case.args((torch.float64,) * 2, device)
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(t.shape, generator=generator).to(device, dtypes[0]) for t in (dy, x))
    weight = weight.to(dtypes[1])

    def dense(dy, x):
        if case.conv is None:
            return dy.t() @ x, dy.sum(0)
        layer = weight.to(x.dtype), [case.neurons], *case.conv
        return torch.ops.aten.convolution_backward(dy, x, *layer, [False, True, True])[1:]

    truth = dense(dy.double(), x.double())
    vendor = dense(dy, x)
    dim = int(case.conv is not None and case.conv.transposed)
    active = order[: len(case.active)]
    for name, got in answers(op, (dy, x, weight, order, *rest)):
        for what, axis, *values in zip(("dW", "db"), (dim, 0), got, vendor, truth, strict=True):
            mine, theirs, exact = (value.index_select(axis, active) for value in values)
            error, allowed = (mine - exact).norm(), 2 * (theirs - exact).norm()
            assert error <= allowed + torch.finfo(dtypes[0]).eps, f"{name}: {what}"


def assert_frozen_rows_are_zero(case: Case, args: tuple, poison: float, run=answers) -> None:
    """Whatever meets in them; and the active rows are none the worse for it."""
    dy, x, *rest = args
    clean = dict(run(case.op, (dy, x, *rest)))
    dy.movedim(-1 if case.conv is None else 1, 0)[case.frozen] = poison
    for name, got in run(case.op, (dy, x, *rest)):
        assert_same(got, clean[name], name)
    x.fill_(poison)
    for name, (dw, db) in run(case.op, (dy, x, *rest)):
        assert case.of_neurons(dw, case.frozen).count_nonzero() == 0, name
        assert db[case.frozen].count_nonzero() == 0, name
        assert not case.of_neurons(dw, case.active).isfinite().any(), name


def assert_like_the_parameters(case: Case, args: tuple) -> None:
    weight = args[2]
    for name, (dw, db) in answers(case.op, args):
        assert (dw.dtype, dw.stride()) == (weight.dtype, weight.stride()), name
        assert (db.dtype, db.shape) == (weight.dtype, (case.neurons,)), name


def assert_disjoint_row_sets_add_up(case: Case, neurons: int, *args) -> None:
    """Two thirds of the first ``neurons``, at once and one third after the other."""
    thirds = range(0, neurons, 3), range(1, neurons, 3)
    first, second, both = (
        dict(answers(case.op, case.with_rows(rows).args(*args)))
        for rows in (*thirds, {row for third in thirds for row in third})
    )
    for name in both:
        added = tuple(a + b for a, b in zip(first[name], second[name], strict=True))
        assert_same(added, both[name], name)


def assert_the_order_of_samples_is_nothing(op: str, args: tuple) -> None:
    dy, x, *rest = args
    forwards = dict(answers(op, (dy, x, *rest)))
    for name, got in answers(op, (dy.flip(0), x.flip(0), *rest)):
        assert_same(got, forwards[name], name)


def planned_answer(op: str, args: tuple) -> Iterator[tuple[str, tuple]]:
    """Of ``answers`` the first one only."""
    yield "planned", getattr(neq_kernels, op)(*args)


def meta(args: tuple) -> tuple:
    """The same call without values. The count is on the CPU, whatever the device."""
    tensors = (
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in args[:4]
    )
    return *tensors, *args[4:]


def metadata(tensors) -> list[tuple]:
    """Shape, dtype and the strides that address anything."""

    def strides(t):
        pairs = zip(t.shape, t.stride(), strict=True)
        return [stride for size, stride in pairs if size > 1 and t.numel()]

    return [(t.shape, t.dtype, strides(t)) for t in tensors]


def vendor_kernels(run) -> set[str]:
    """Which of the vendor's multiplications ``run`` launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.name for event in profile.events()}
    return names & {"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution_backward"}


def _elsewhere(order):
    return torch.empty_like(order, device="cpu" if order.is_meta else "meta")


def common_mistakes(neurons: int) -> dict[str, tuple[dict, str]]:
    """What can be wrong with a call of any operator: changes of arguments, and the message."""
    int64 = rf"order must be int64 of shape \[{neurons}\], one entry per neuron, got torch"
    count = "count must be a 0-dim int64 tensor on the CPU, got torch"
    return {
        "dtypes": ({"dy": torch.Tensor.half}, "dy and x must .* torch.float16 and torch.float32"),
        "order int32": ({"order": torch.Tensor.int}, rf"{int64}.int32 \[{neurons}\]"),
        "order too short": ({"order": lambda r: r[1:]}, rf"{int64}.int64 \[{neurons - 1}\]"),
        "order elsewhere": ({"order": _elsewhere}, "order must be on the device of dy, .*, got"),
        "count int32": ({"count": torch.Tensor.int}, rf"{count}.int32 \[\] on cpu"),
        "count of one dimension": ({"count": lambda c: c[None]}, rf"{count}.int64 \[1\] on cpu"),
        "count elsewhere": ({"count": lambda c: c.to("meta")}, rf"{count}.int64 \[\] on meta"),
    }


def assert_mistake_is_named(op, names: list, args: tuple, mistake: dict, message: str) -> None:
    """``mistake``: for some of the arguments, a function that spoils them."""
    named = dict(zip(names, args, strict=True))
    named |= {name: change(named[name]) for name, change in mistake.items()}
    with pytest.raises(ValueError, match=message):
        op(**named)
