"""How tuning times backends on a GPU: here one that is modelled, but for the last test."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from neq_kernels.wgrad import dense, planner, timing
from tests.support.checks import problem_of
from tests.support.modelled_gpu import Emptied, ModelledGpu
from tests.support.planning import CONV, LINEAR

SENT = 0.001  # milliseconds for a kernel of the vendor's


@pytest.fixture
def gpu(monkeypatch):
    gpu = ModelledGpu(monkeypatch)
    monkeypatch.setattr(torch, "matmul", lambda *args: gpu.launch(SENT, 0.02))
    return gpu


def on_gpu(case):
    """A case's problem, as on a GPU, and its arguments."""
    dy, x, weight, order, count, bias, *_ = case.args()
    problem = replace(problem_of(case.op, *case.args()), device="cuda")
    return problem, (dy, x, weight, order, int(count), bias)


def fastest(gpu, **kernels):
    """Of backends whose kernel takes the CPU and the GPU so many milliseconds."""
    problem, args = on_gpu(LINEAR)
    backends = {
        name: SimpleNamespace(linear_wgrad=lambda *args, times=times: gpu.kernel(*times))
        for name, times in kernels.items()
    }
    with Emptied(gpu):
        return timing.fastest(problem, backends, 0.05, *args)


@pytest.mark.parametrize(
    ("dense", "other", "choice"),
    [
        ((0.01, 0.06), (0.06, 0.03), "other"),  # launches hide behind the kernels
        ((0.001, 0.06), (0.03, 0.05), "other"),
        ((0.001, 0.06), (0.03, 0.059), "dense"),  # by the margin
        ((0.01, 0.03), (0.06, 0.01), "dense"),  # the step would wait for the CPU
    ],
)
def test_the_gpus_clock_counts(gpu, dense, other, choice):
    """By the CPU's clock, each of these takes as long as its launch, or longer."""
    assert fastest(gpu, dense=dense, other=other) == choice


def test_caches_are_cold(gpu):
    """The second of two calls would find its inputs in the cache, and so look faster."""
    assert fastest(gpu, dense=(0.001, 0.1), other=(0.001, 0.1)) == "dense"
    assert fastest(gpu, other=(0.001, 0.1), dense=(0.001, 0.1)) == "dense"
    problem, (_, x, *_) = on_gpu(LINEAR)
    with Emptied(gpu):
        spans = timing._one_round(problem, x)([lambda: gpu.kernel(0.001, 0.1)] * 3)
    assert [span.computing for span in spans] == pytest.approx([0.1] * 3)
    assert [span.launching for span in spans] == pytest.approx([0.001] * 3)


def test_small_kernels_do_not_wait_for_their_launches(gpu):
    """The gaps between three kernels, of which each takes longer to launch than to run."""
    problem, (_, x, *_) = on_gpu(LINEAR)

    def three():
        for _ in range(3):
            gpu.launch(0.05, 0.01)

    (span, *_) = timing._one_round(problem, x)([three] * 4)
    assert span.computing == pytest.approx(0.03)
    assert span.launching == pytest.approx(0.15)


class Vendor(TorchDispatchMode):
    """Sees the vendor's calls: what each was asked for of dX, dW and db."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.wanted.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_convolution_is_timed_as_a_layers_whole_backward(bias):
    problem, args = on_gpu(replace(CONV, bias=bias))
    backends = {"dense": dense, "pack": planner.BACKENDS["pack"]}
    asked = {}
    for name, run in timing.contenders(problem, backends, *args).items():
        with Vendor() as vendor:
            run()
        asked[name] = vendor.wanted
    joint, dgrad, wgrad = [True, True, bias], [True, False, False], [False, True, False]
    assert asked == {"dense": [joint], "pack": [dgrad, wgrad]}


@pytest.mark.parametrize("case", [LINEAR, CONV], ids=lambda case: case.op)
def test_a_weight_is_timed_in_the_dtype_of_the_input(case, monkeypatch):
    """As autocast's layer has it; db leaves in the weight's own."""
    problem, (dy, x, *rest) = on_gpu(case)
    args = dy.bfloat16(), x.bfloat16(), *rest
    seen = []
    monkeypatch.setattr(timing, "zero_frozen_", lambda *args: seen.append(args))
    for run in timing.contenders(problem, {"dense": dense}, *args).values():
        run()  # torch multiplies no two dtypes
    for dw, *_, db in seen:
        assert dw.dtype == db.dtype == torch.float32


def test_the_first_call_does_not_count(gpu):
    """It compiles."""
    first = iter([(1.0, 100.0)])
    problem, args = on_gpu(LINEAR)
    backends = {
        "dense": SimpleNamespace(linear_wgrad=lambda *args: gpu.kernel(0.001, 0.06)),
        "other": SimpleNamespace(
            linear_wgrad=lambda *args: gpu.kernel(*next(first, (0.001, 0.03)))
        ),
    }
    with Emptied(gpu):
        assert timing.fastest(problem, backends, 0.05, *args) == "other"


def test_a_gpu_waits_until_all_calls_are_queued(gpu):
    problem, (_, x, *_) = on_gpu(LINEAR)
    timing._one_round(problem, x)([lambda: gpu.kernel(0.001, 0.1)] * 3)
    assert gpu.slept == [3 * timing.BACKLOG]


def test_the_joint_backward_zeroes_frozen_rows(monkeypatch):
    problem, args = on_gpu(CONV)
    seen = []
    monkeypatch.setattr(timing, "zero_frozen_", lambda *args: seen.append(args))
    timing.contenders(problem, {"dense": dense}, *args)["dense"]()
    ((dw, frozen, dim, conv, db),) = seen
    assert (dw.shape, frozen.tolist(), dim) == (args[2].shape, args[3][8:].tolist(), 0)
    assert db.shape == (32,)
    assert conv == problem.conv


def test_a_linear_layer_is_timed_with_its_dgrad(monkeypatch):
    problem, args = on_gpu(LINEAR)
    calls = []
    monkeypatch.setattr(torch, "matmul", lambda dy, weight: calls.append((dy.shape, weight.shape)))
    backend = SimpleNamespace(linear_wgrad=lambda *args: calls.append("wgrad"))
    timing.contenders(problem, {"dense": backend}, *args)["dense"]()
    assert calls == [((64, 32), (32, 8)), "wgrad"]
    compact = replace(problem, compact=True)
    calls.clear()
    timing.contenders(compact, {"dense": backend}, *args)["dense"]()
    assert calls == ["wgrad"]


@pytest.mark.gpu
def test_on_a_gpu():
    """Kernels of known lengths, and one that is short but takes the CPU long to launch."""
    args = LINEAR.args((torch.bfloat16, torch.bfloat16), "cuda")
    problem = problem_of("linear_wgrad", *args)
    dy, x, weight, order, count, bias = args

    def backend(cycles, seconds=0.0):
        def run(*args):
            time.sleep(seconds)
            torch.cuda._sleep(cycles)

        return SimpleNamespace(linear_wgrad=run)

    backends = {"dense": backend(200_000), "other": backend(100_000)}
    numbers = 0.05, dy, x, weight, order, int(count), bias
    assert timing.fastest(problem, backends, *numbers) == "other"
    backends["other"] = backend(199_000)
    assert timing.fastest(problem, backends, *numbers) == "dense"
    backends["other"] = backend(1_000, seconds=2e-3)
    assert timing.fastest(problem, backends, *numbers) == "dense"
