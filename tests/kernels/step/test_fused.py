"""The row-wise optimizers' Triton kernels: on a GPU, or anywhere in Triton's interpreter."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.adamw import adamw

from neq_kernels import ops, reference
from neq_kernels.step import fused as triton_step
from neq_kernels.step import planner as row_step
from tests.support.interpreter import INTERPRETED, not_interpreted, on_devices
from tests.support.steps import ADAMW_OPTIONS, SGD_OPTIONS, assert_lists_equal, lr, problem

DTYPES = [torch.float32, torch.float16, torch.float64]
if not INTERPRETED:  # the interpreter rounds to bfloat16 towards zero
    DTYPES.append(torch.bfloat16)
SHAPES = [(1,), (150,), (6, 5), (9, 32), (5, 2, 3, 3), (9, 4, 1, 1), (4, 8)]

pytestmark = pytest.mark.usefixtures("by_the_kernel")
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def by_the_kernel():
    """Also in the interpreter, whose tensors are on the CPU; in many launches of many programs."""
    chosen = mock.Mock(return_value=triton_step)
    with (
        mock.patch.object(row_step, "choose", chosen),
        mock.patch.multiple(triton_step, MANY=3, BLOCK=64),
        mock.patch.object(triton_step, "sgd_rows_", lending(triton_step.sgd_rows_)),
        mock.patch.object(triton_step, "adamw_rows_", lending(triton_step.adamw_rows_)),
    ):
        yield


def lending(step):
    """Its tensors are given as numbers, which the interpreter's check has to be told of."""

    def lent_step(lists, options):
        if not INTERPRETED:
            return step(lists, options)
        from tests.support.addresses import lent

        with lent(t for tensors in lists for t in tensors):
            return step(lists, options)

    return lent_step


@pytest.fixture(params=["numbers", "tensors"])
def scalars(request, monkeypatch):
    """Do the kernels get the learning rate and the steps taken as numbers, or where they are?"""
    if request.param == "tensors":
        monkeypatch.setattr(triton_step, "_rate", lambda lr, param: (lr.to(param.device), 0.0))
        monkeypatch.setattr(triton_step, "_taken", lambda step: step.dtype)


def made_up(states, share, dtype, device, layout="plain", shapes=SHAPES, shift=0):
    return problem(states, share, dtype, device, layout, shapes, shift, torch.randn)


def wide(lists, dtype):
    """Copies in the dtype in which kernels compute."""
    return [[t.to(torch.promote_types(dtype, torch.float32)) for t in ts] for ts in lists]


def check_sgd(options, dtype, given):
    """The reference's bits, rounded once to the parameters' dtype."""
    (p, g, m), rows, counts = given
    m = m if options[0] else []
    truth = copy.deepcopy(wide((p, g, m), dtype))
    ops.sgd_rows_(p, g, m, rows, counts, lr(0.1), *options)
    reference.sgd_rows_(*truth, rows, counts, lr(0.1), *options)
    assert_lists_equal(p, [t.to(dtype) for t in truth[0]])
    assert_lists_equal(m, [t.to(dtype) for t in truth[2]])


@on_devices
@in_dtypes
@pytest.mark.parametrize("options", [*SGD_OPTIONS, (0.9, 0.1, 0.01, False, False, False)], ids=str)
def test_sgd_has_the_bits_of_the_reference(device, dtype, options):
    check_sgd(options, dtype, made_up(1, 0.5, dtype, device))


@on_devices
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_sgd_of_any_share(device, share, scalars):
    check_sgd(SGD_OPTIONS[3], torch.float32, made_up(1, share, torch.float32, device))


def shapes():
    size, width = st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 3, 4, 6, 8, 16])
    shape = st.one_of(st.tuples(size), st.tuples(size, width), st.tuples(size, width, size, size))
    return st.lists(shape, min_size=1, max_size=5)


GEOMETRY = (  # shapes, share, dtype, layout, shift
    shapes(),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from(DTYPES),
    st.sampled_from(["plain", "channels_last"]),
    st.integers(0, 3),
)


@on_devices
@settings(deadline=None, max_examples=40)
@given(*GEOMETRY)
def test_sgd_of_any_geometry(device, shapes, share, dtype, layout, shift):
    given = made_up(1, share, dtype, device, layout, shapes, shift)
    check_sgd((0.9, 0.1, 0.01, False, False, False), dtype, given)


def check_adamw(options, dtype, given, device):
    """The moments have the bits of the reference. Gives of each parameter its active rows, in
    float64, as they are, as torch's fused step has them, and as they should be."""
    amsgrad, maximize, decay = options
    (p, g, m, v, v_max), rows, counts = given
    v_max = v_max if amsgrad else []
    steps = [torch.tensor(float(i % 2), device=device) for i in range(len(p))]
    mine = [p, g, m, v, v_max, steps]
    truth = copy.deepcopy([*wide(mine[:5], dtype), steps])
    exact = copy.deepcopy(wide(mine, torch.float64))
    theirs = [[t[r[:k]].clone() for t, r, k in zip(ts, rows, counts, strict=True)] if ts else []
              for ts in mine[:5]]  # fmt: skip
    their_steps = copy.deepcopy(steps)
    numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": decay}
    after = rows, counts, lr(0.01), *numbers.values(), amsgrad, maximize
    ops.adamw_rows_(*mine, *after)
    reference.adamw_rows_(*truth, *after)
    reference.adamw_rows_(*exact, *after)
    adamw(*theirs, their_steps, fused=True, lr=0.01, amsgrad=amsgrad, maximize=maximize, **numbers)
    assert_lists_equal(steps, truth[5])
    for moments, expected in zip((m, v, v_max), truth[2:5], strict=True):
        assert_lists_equal(moments, [t.to(dtype) for t in expected])
    assert all(a[r[k:]].isnan().all() for a, r, k in zip(p, rows, counts, strict=True))
    active = [r[:k] for r, k in zip(rows, counts, strict=True)]
    return [
        (a[r].double(), b.double(), c[r])
        for a, b, c, r in zip(p, theirs[0], exact[0], active, strict=True)
    ]


@on_devices
@in_dtypes
@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw(device, dtype, options, scalars):
    """The parameters are as near to float64 as torch's fused step."""
    for a, b, c in check_adamw(options, dtype, made_up(3, 0.5, dtype, device), device):
        # in float64 the truth itself is rounded
        rounding = 2 * torch.finfo(torch.float64).eps * c.norm()
        assert (a - c).norm() <= 2 * (b - c).norm() + rounding


@on_devices
@settings(deadline=None, max_examples=40)
@given(*GEOMETRY, st.sampled_from(ADAMW_OPTIONS))
def test_adamw_of_any_geometry(device, shapes, share, dtype, layout, shift, options):
    """Of parameters so small, torch's error may be none by luck: a few roundings are allowed."""
    given = made_up(3, share, dtype, device, layout, shapes, shift)
    for a, b, c in check_adamw(options, dtype, given, device):
        rounding = 4 * torch.finfo(dtype).eps * (1 + c.abs())
        assert ((a - c).abs() <= 2 * (b - c).abs() + rounding).all()


@on_devices
def test_what_is_not_finite_stays_in_its_element(device):
    p, g, m, v, v_max = ([torch.ones(4, 4, device=device)] for _ in range(5))
    g[0][1, 2] = torch.nan
    rows, counts = [torch.arange(4, device=device)], [torch.tensor(2)]
    after = rows, counts, lr(0.1), 0.9, 0.99, 1e-8, 0.0, True, False
    ops.adamw_rows_(p, g, m, v, v_max, [torch.tensor(0.0)], *after)
    for t in (p[0], m[0], v[0], v_max[0]):
        assert t.isnan().nonzero().tolist() == [[1, 2]]


def on_gpu(kind):
    """A function that steps fresh parameters, those, and what a captured step needs."""
    given, rows, counts = made_up(3, 0.5, torch.float32, "cuda")
    p, g, m, v, _ = given
    rate = torch.tensor(0.1, device="cuda")
    steps = [torch.zeros((), device="cuda") for _ in p]

    def step():
        if kind == "sgd":
            ops.sgd_rows_(p, g, m, rows, counts, rate, 0.9, 0.0, 0.1, False, False, False)
        else:
            numbers = 0.9, 0.99, 1e-8, 0.1, False, False
            ops.adamw_rows_(p, g, m, v, [], steps, rows, counts, rate, *numbers)

    return step, p, g, rate


of_both = pytest.mark.parametrize("kind", ["sgd", "adamw"])


@pytest.mark.gpu
@not_interpreted
@of_both
def test_nothing_waits_for_the_gpu(kind):
    step, *_ = on_gpu(kind)
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@not_interpreted
@of_both
def test_replays_in_a_graph(kind):
    """With what the gradients and the learning rate are by then."""
    torch.manual_seed(1)
    step, p, g, rate = on_gpu(kind)
    torch.manual_seed(1)
    eager, expected, g_, rate_ = on_gpu(kind)
    step()  # compiles
    eager()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    eager()
    for t in (*g, *g_, rate, rate_):
        t.mul_(2)
    graph.replay()
    eager()
    assert_lists_equal(p, expected)


@pytest.mark.gpu
@not_interpreted
@of_both
def test_follows_the_current_stream(kind):
    torch.manual_seed(1)
    step, p, g, _ = on_gpu(kind)
    torch.manual_seed(1)
    eager, expected, *_ = on_gpu(kind)
    kept = copy.deepcopy(g)
    for t in g:
        t.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # a launch on any other stream would read zeros
        torch._foreach_copy_(g, kept)
        step()
    torch.cuda.synchronize()
    eager()
    assert_lists_equal(p, expected)
