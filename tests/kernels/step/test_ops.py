"""``sgd_rows_`` and ``adamw_rows_``: as the reference has it, by each backend."""

import copy

import pytest
import torch
from torch.library import opcheck

from neq_kernels import ops, reference
from neq_kernels.device import extension as compiled
from tests.support.steps import (
    ADAMW_OPTIONS,
    SGD_OPTIONS,
    SHARES,
    assert_lists_equal,
    laid_out,
    lr,
    problem,
    sgd_arguments,
)
from tests.support.tensors import on_devices

if compiled.why_not("cpu"):
    raise RuntimeError(compiled.why_not("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")


def check_sgd(options, share, dtype, device, layout, close=None):
    (p, g, m), rows, counts = problem(1, share, dtype, device, layout)
    m = m if options[0] else []
    truth = copy.deepcopy((p, g, m))
    ops.sgd_rows_(p, g, m, rows, counts, lr(0.5), *options)
    reference.sgd_rows_(*truth, rows, counts, lr(0.5), *options)
    assert_lists_equal(p, truth[0], close)
    assert_lists_equal(m, truth[2], close)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("share", SHARES)
@on_devices
def test_sgd_exact(options, share, device, step_backend):
    for dtype in (torch.float32, torch.float64):
        check_sgd(options, share, dtype, device, "plain")


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_sgd_exact_in_any_layout(options, share, layout, step_backend):
    for dtype in (torch.float32, torch.float64):
        check_sgd(options, share, dtype, "cpu", layout)


def test_sgd_exact_with_gradients_in_another_layout(step_backend):
    (p, g, m), rows, counts = problem(1, 0.5)
    truth = copy.deepcopy((p, g, m))
    g = [laid_out(t, "transposed") for t in g]
    ops.sgd_rows_(p, g, m, rows, counts, lr(0.5), *SGD_OPTIONS[3])
    reference.sgd_rows_(*truth, rows, counts, lr(0.5), *SGD_OPTIONS[3])
    assert_lists_equal(p, truth[0])


def test_parameters_without_neurons_or_weights(step_backend):
    shapes, counts = [(0, 3), (4, 0), (2, 2)], [torch.tensor(k) for k in (0, 2, 1)]
    p, g = ([torch.ones(shape) for shape in shapes] for _ in "pg")
    rows = [torch.arange(shape[0]) for shape in shapes]
    ops.sgd_rows_(p, g, [], rows, counts, lr(0.5), *SGD_OPTIONS[0])
    assert p[2].tolist() == [[0.5, 0.5], [1, 1]]


def test_rows_that_lie_apart(step_backend):
    (p, g, m), rows, counts = problem(1, 0.5)
    truth = copy.deepcopy((p, g, m))
    apart = [torch.stack([r, r.new_full((), 99).expand_as(r)], 1)[:, 0] for r in rows]
    ops.sgd_rows_(p, g, m, apart, counts, lr(0.5), *SGD_OPTIONS[3])
    reference.sgd_rows_(*truth, rows, counts, lr(0.5), *SGD_OPTIONS[3])
    assert_lists_equal(p, truth[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sgd_in_half_precision(dtype):
    check_sgd(SGD_OPTIONS[3], 0.5, dtype, "cpu", "plain", close=0.05)


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@on_devices
def test_adamw(options, share, dtype, device, step_backend):
    check_adamw(options, share, dtype, device, "plain")


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw_of_transposed_matrices(options, step_backend):
    for dtype in (torch.float32, torch.float64):
        check_adamw(options, 0.5, dtype, "cpu", "transposed")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99999), (1 - 1e-6, 1 - 1e-7)], ids=str)
def test_adamw_is_as_exact_as_torchs_for_betas_close_to_1(betas, step_backend):
    rows, counts = [torch.arange(64)], [torch.tensor(64)]
    start, grads = torch.randn(64, 9), [torch.randn(64, 9) for _ in range(3)]
    results = {}
    for name, dtype in (("ours", torch.float32), ("exact", torch.float64)):
        p, m, v = start.to(dtype, copy=True), *(torch.zeros(64, 9, dtype=dtype) for _ in "mv")
        step = torch.tensor(0.0)
        for g in grads:
            lists = [p], [g.to(dtype)], [m], [v], [], [step], rows, counts
            ops.adamw_rows_(*lists, lr(1e-3), *betas, 1e-8, 0.0, False, False)
        results[name] = v, p - start
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], betas=betas, weight_decay=0.0, fused=True)
    for theirs.grad in grads:
        optimizer.step()
    results["theirs"] = optimizer.state[theirs]["exp_avg_sq"], theirs.detach() - start

    def error(name, i):
        exact = results["exact"][i]
        return ((results[name][i].double() - exact) / exact).abs().median()

    for i in range(2):
        assert error("ours", i) <= 2 * error("theirs", i)


def check_adamw(options, share, dtype, device, layout):
    amsgrad, maximize, decay = options
    (p, g, m, v, v_max), rows, counts = problem(3, share, dtype, device, layout)
    v_max = v_max if amsgrad else []
    steps = [torch.tensor(float(i)) for i in range(len(p))]
    mine = [p, g, m, v, v_max, steps]
    truth = [[t.double() for t in tensors] for tensors in copy.deepcopy(mine)]
    after = rows, counts, lr(0.25), 0.75, 0.9375, 1e-3, decay, amsgrad, maximize
    ops.adamw_rows_(*mine, *after)
    reference.adamw_rows_(*truth, *after)
    for tensors, exact in zip(mine, truth, strict=True):
        assert_lists_equal(
            [t.double() for t in tensors], exact, 1e-6 if dtype == torch.float32 else 1e-14
        )


def one_adamw(**changed):
    like = {name: [torch.ones(4, 2)] for name in ("params", "grads", "m", "v")}
    args = like | {
        "max_exp_avg_sqs": [],
        "steps": [torch.tensor(0.0)],
        "rows": [torch.arange(4)],
        "counts": [torch.tensor(2)],
        "lr": lr(0.5),
    }
    return (*(args | changed).values(), 0.9, 0.99, 1e-8, 0.0, changed.get("v_max", False), False)


def test_opcheck():
    opcheck(ops.sgd_rows_, sgd_arguments())
    opcheck(ops.sgd_rows_, sgd_arguments(momentum=0.0, momentum_buffers=[]))
    opcheck(ops.adamw_rows_, one_adamw())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grads": []}, r"grads must have one entry for each of the 1 params, got 0"),
        ({"grads": [torch.ones(4, 3)]}, r"grads\[0\] must be like params\[0\], .* got \[4, 3\]"),
        ({"grads": [torch.ones(4, 2).half()]}, r"grads\[0\] must be like .* got .* torch.float16"),
        ({"momentum_buffers": []}, r"momentum_buffers must have one entry for each of the 1"),
        ({"momentum": 0.0}, r"momentum_buffers must be empty without momentum"),
        ({"rows": [torch.arange(3)]}, r"rows must be int64 of shape \[4\].* got torch.int64 \[3\]"),
        ({"counts": [torch.ones(1)]}, r"count must be a 0-dim int64 tensor on the CPU"),
        ({"lr": torch.ones(2)}, r"lr must have no dimensions, got \[2\]"),
        (
            {name: [torch.ones(4, dtype=torch.int64)] for name in ("params", "grads")},
            r"params\[0\] must be \[neurons, ...\] and floating point, got \[4\] torch.int64",
        ),
    ],
    ids=str,
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=message):
        ops.sgd_rows_(*sgd_arguments(**changed))


def test_bad_input_of_adamw():
    with pytest.raises(ValueError, match="max_exp_avg_sqs must be empty without amsgrad"):
        ops.adamw_rows_(*one_adamw(max_exp_avg_sqs=[torch.ones(4, 2)]))
    with pytest.raises(ValueError, match="steps must have one entry for each of the 1 params"):
        ops.adamw_rows_(*one_adamw(steps=[]))


def test_autograd_sees_the_step():
    """A backward that needs the old weight fails, as it does after a step of torch's."""
    args = sgd_arguments()
    x = torch.ones(4, 2, requires_grad=True)
    y = (args[0][0] * x).sum()
    ops.sgd_rows_(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
