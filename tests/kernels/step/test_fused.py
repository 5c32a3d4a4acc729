"""The row-wise optimizers' Triton kernels: on a GPU, or anywhere in Triton's interpreter."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.adamw import adamw
from transformers.pytorch_utils import Conv1D

import neq
from neq_kernels import ops, reference
from neq_kernels.step import fused as triton_step
from neq_kernels.step import planner as row_step
from neq_kernels.step.planner import choose as really_chosen
from tests.kernels.step.test_planner import OnGpu
from tests.support.interpreter import INTERPRETED, not_interpreted, on_devices
from tests.support.layers import trained_elements
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
    """Its tensors are given as numbers, which the interpreter's check has to be told of.

    Of what has rows, it may use the active ones only.
    """

    def lent_step(lists, options):
        if not INTERPRETED:
            return step(lists, options)
        from tests.support.addresses import lent

        active = [o[: int(k)].tolist() for o, k in zip(lists.orders, lists.counts, strict=True)]
        by_rows = {*lists._fields} - {"steps", "orders", "counts"}
        used = [t for name, ts in lists._asdict().items() if name not in by_rows for t in ts]
        for name in by_rows:
            used += [t[i] for t, of in zip(getattr(lists, name), active, strict=False) for i in of]
        with lent(used):
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


LINES = [(5, 40), (300, 3), (6, 5, 3, 3), (7, 5, 4, 4)]  # the first two of several programs


@on_devices
@in_dtypes
@pytest.mark.parametrize("layout", ["inputs_first", "transposed"])
@pytest.mark.parametrize("options", [*SGD_OPTIONS, (0.9, 0.1, 0.01, False, False, False)], ids=str)
def test_sgd_of_neurons_in_many_lines(device, dtype, layout, options):
    check_sgd(options, dtype, made_up(1, 0.5, dtype, device, layout, LINES))


@on_devices
@in_dtypes
@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw_of_neurons_in_many_lines(device, dtype, options):
    """It has the bits that it has of rows, in parameters and state."""
    results = []
    for layout in ("plain", "inputs_first"):
        torch.manual_seed(1)
        (p, g, m, v, v_max), rows, counts = made_up(3, 0.5, dtype, device, layout, LINES)
        v_max = v_max if options[0] else []
        steps = [torch.tensor(float(i % 2), device=device) for i in range(len(p))]
        numbers = 0.9, 0.99, 1e-8, options[2], *options[:2]
        ops.adamw_rows_(p, g, m, v, v_max, steps, rows, counts, lr(0.01), *numbers)
        results.append([*p, *m, *v, *v_max])
    assert_lists_equal(*results)


@on_devices
@in_dtypes
@pytest.mark.parametrize("n", [2, 9, 130])
@pytest.mark.parametrize("most", [False, True], ids=["one is active", "one is frozen"])
def test_one_neuron_in_many_lines(device, dtype, n, most):
    shapes, share = [(n, 1), (n, 3), (n, 50), (n, 4, 2, 2)], (n - 1 if most else 1) / n
    for layout in ("inputs_first", "transposed"):
        given = made_up(1, share, dtype, device, layout, shapes)
        check_sgd(SGD_OPTIONS[3], dtype, given)


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
    st.sampled_from(["plain", "channels_last", "inputs_first", "transposed"]),
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


@on_devices
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_layers_whose_neurons_lie_in_many_lines(device, name):
    """As torch has them by neq.optim: GPT-2's and transposed convolutions."""
    row_step.choose.reset_mock()
    torch.manual_seed(1)
    mine = nn.ModuleList([Conv1D(37, 20), nn.ConvTranspose2d(5, 6, 3), nn.Linear(4, 5)]).to(device)
    dense = copy.deepcopy(mine)
    before = copy.deepcopy([*mine.parameters()])
    neq.convert(mine)
    options = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    optimizer = getattr(neq.optim, name)(mine.parameters(), lr=0.01, layers=mine, **options)
    truth = getattr(torch.optim, name)(dense.parameters(), lr=0.01, **options)
    for layer in mine:
        layer.set_active(range(0, layer.n_neurons, 2))
    inputs = [torch.randn(3, *size, device=device) for size in ((20,), (5, 4, 4), (4,))]
    for _ in range(3):
        for layers in (mine, dense):
            sum(layer(x).square().sum() for layer, x in zip(layers, inputs, strict=True)).backward()
        for p, q in zip(mine.parameters(), dense.parameters(), strict=True):
            assert p.grad.stride() == p.stride()  # else the planner would not take the kernel
            q.grad = p.grad.clone()
        optimizer.step()
        truth.step()
    active = trained_elements(mine)
    for p, q, b in zip(mine.parameters(), dense.parameters(), before, strict=True):
        assert not torch.equal(p[active[p]], b[active[p]])
        assert torch.equal(p[~active[p]], b[~active[p]])
        torch.testing.assert_close(p[active[p]], q[active[p]])
    posed = row_step.choose.call_args_list
    assert len(posed) >= 5  # one for each parameter
    for call in posed:
        on_a_gpu = (t.detach().as_subclass(OnGpu) for t in call.args)
        assert really_chosen(*on_a_gpu) is triton_step


def on_gpu(kind):
    """A function that steps fresh parameters, those, and what a captured step needs."""
    rows, lines = (
        made_up(3, 0.5, torch.float32, "cuda", *more) for more in ((), ("inputs_first", LINES))
    )
    p, g, m, v, _ = (a + b for a, b in zip(rows[0], lines[0], strict=True))
    orders, counts = rows[1] + lines[1], rows[2] + lines[2]
    rate = torch.tensor(0.1, device="cuda")
    steps = [torch.zeros((), device="cuda") for _ in p]

    def step():
        if kind == "sgd":
            ops.sgd_rows_(p, g, m, orders, counts, rate, 0.9, 0.0, 0.1, False, False, False)
        else:
            numbers = 0.9, 0.99, 1e-8, 0.1, False, False
            ops.adamw_rows_(p, g, m, v, [], steps, orders, counts, rate, *numbers)

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
