"""bench/steps.py: steps are what they are called, and wrong ones are not timed."""

import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import end_to_end
from bench.end_to_end import Entry, Shares
from bench.lib import compact_contenders
from bench.lib import step_contenders as steps
from bench.lib.step_contenders import Bench, Gate, Step
from bench.lib.wgrad_contenders import WrongResultError
from neq_kernels import ops
from neq_kernels.wgrad import planner
from tests.support.benches import CPU, IMAGES, TinyClassifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench():
    torch.manual_seed(0)
    return Bench("images", IMAGES, TinyClassifier(), "contiguous", 4, CPU, torch.float32)


def step(bench, name, active):
    return Step(bench, name, active, Shares.of(bench).wgrads)


class Convolutions(TorchDispatchMode):
    """Of each backward of a convolution inside, whether dX and dW are computed; or "rows"."""

    def __init__(self):
        super().__init__()
        self.wanted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.wanted.append(tuple(args[-1][:2]))
        if func is ops.conv_wgrad:
            self.wanted.append("rows")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "active", "wanted"),
    [
        ("dense", 1, [(True, True), (False, True)]),
        ("none", 0, [(True, False)]),  # which dense needs for the first layer's dW
        ("neq", 0, []),
        ("masked", 0.5, [(True, True), (False, True)]),
        ("gather", 0.5, ["rows", (True, False), "rows"]),
    ],
)
def test_what_a_step_computes(bench, name, active, wanted):
    one = step(bench, name, active)
    one.prepare()
    with Convolutions() as seen:
        one.gradients(0)
    assert seen.wanted == wanted
    for name, layer in bench.layers.items():
        chosen = one.active_sets[name]
        normalises_by_batch = one.name == "none" and "bn" in name
        assert chosen.k == (1 if normalises_by_batch else active * chosen.neurons)
        grad = layer.weight.grad
        assert chosen.k == 0 or not grad[chosen.frozen].any()
        assert (grad is None) == (chosen.k == 0)


def test_granules_are_active_as_a_whole(bench):
    bench.granule = 8
    one = step(bench, "neq", 0.5)
    for chosen in one.active_sets.values():
        granules = chosen.mask.view(-1, 8)
        assert (granules.any(1) == granules.all(1)).all()
        assert chosen.k == 8  # of 8 or 16: at least one granule is active
    bench.granule = 5  # of which no layer has whole ones
    assert all(
        chosen.k == chosen.neurons / 2 for chosen in step(bench, "neq", 0.5).active_sets.values()
    )


def compact(bench, *shares):
    return compact_contenders.steps(bench, shares, Shares.of(bench).wgrads)


def test_the_parameters_of_a_compact_step_are_the_active_rows(bench):
    (one,) = compact(bench, 1, 0.5, 0)
    sizes = {name: len(p) for name, p in one.model.named_parameters()}
    for name in bench.layers:
        assert sizes[f"{name}.active_weight"] == one.active_sets[name].k
        assert f"{name}.weight" not in sizes
    assert one.model.conv1.weight.data_ptr() != bench.plain.conv1.weight.data_ptr()


def test_a_compact_step_with_its_rows_elsewhere_is_wrong(bench):
    gate = Gate(bench, step(bench, "dense", 1))
    right, wrong = compact(bench, 0.5, 0.5)
    gate.admit(right)
    chosen = wrong.active_sets["hidden"]
    chosen.set(chosen.mask.roll(1))
    with pytest.raises(WrongResultError, match="the gradient of hidden"):
        gate.admit(wrong)


def test_an_optimizers_state_is_there_before_a_peak_is_measured(bench, monkeypatch):
    ones = step(bench, "dense", 1), step(bench, "neq", 0.5), *compact(bench, 0.5)
    states = []

    def look(call, device):
        states.append(len(call.__self__._optimizer.state))
        return 0

    monkeypatch.setattr(end_to_end, "peak_bytes", look)
    end_to_end.measure_memory({Entry(s.name, s.active, "contiguous"): s for s in ones})
    assert all(states)
    assert len(states) == len(ones)


def test_whole_layers(bench):
    wgrads = dict(Shares.of(bench).wgrads)
    assert wgrads.keys() == {"conv1", "bn1", "conv2", "bn2", "hidden"}
    for share in (1, 0.5, 0.1, 0):
        one = Step(bench, "layers", 1 - share, wgrads)
        frozen = [name for name, chosen in one.active_sets.items() if chosen.k == 0]
        rest = [flops for name, flops in wgrads.items() if name not in frozen]
        left = share * sum(wgrads.values()) - sum(wgrads[name] for name in frozen)
        assert 0 <= left < min(rest, default=1)
        one.prepare()
        for name, layer in bench.layers.items():
            assert layer.weight.requires_grad == (name not in frozen)
    step(bench, "dense", 1).prepare()
    assert all(p.requires_grad for p in bench.parameters.values())


def test_frozen_rows_stay_under_the_optimizer_by_rows(bench):
    bench.row_optimizer.param_groups[0]["lr"] = 1.0
    half = step(bench, "neq", 0.5)
    before = {name: layer.weight.detach().clone() for name, layer in bench.layers.items()}
    for _ in range(2):
        half.lead(0)
        half.gradients(0)
        half.update(0)
    for name, layer in bench.layers.items():
        moved = (layer.weight != before[name]).view(layer.n_neurons, -1).any(1)
        assert torch.equal(moved, half.active_sets[name].mask)
    assert all(p.grad is None for p in bench.parameters.values())


def test_share_of_the_weight_gradients(bench):
    shares = Shares.of(bench)
    per_pixel = {"conv1": 36 * 27 * 8, "conv2": 16 * 72 * 8, "bn1": 2 * 36 * 8, "bn2": 2 * 16 * 8}
    macs = {**per_pixel, "hidden": 8 * 16, "fc": 16 * 5}
    assert shares.wgrads == {name: 2 * macs[name] for name in bench.layers}
    # the first layer has no dgrad
    everything = 2 * (3 * sum(macs.values()) - macs["conv1"])
    assert shares.of_step == pytest.approx(sum(shares.wgrads.values()) / everything)


def off_by_a_little(dw):
    dw[torch.nonzero(dw)[0][0]] *= 1.01


def unwritten(dw):
    dw[torch.nonzero(dw)[0][0]] = math.nan


def thawed(dw):
    dw[(dw == 0).flatten(1).all(1).nonzero()[0]] = 1e-9


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (off_by_a_little, r"the gradient of conv\d.weight is off by [\d.e-]+, allowed are"),
        (unwritten, r"the gradient of conv\d.weight is off by nan"),
        (thawed, r"the gradient of conv\d.weight is not zero for frozen neurons"),
    ],
)
def test_a_wrong_gradient_is_not_timed(bench, monkeypatch, fault, message):
    right = planner.conv_wgrad

    def wrong(*args):
        dw, db = right(*args)
        fault(dw)
        return dw, db

    gate = Gate(bench, step(bench, "dense", 1))
    gate.admit(step(bench, "gather", 0.5))
    monkeypatch.setattr(planner, "conv_wgrad", wrong)
    with pytest.raises(steps.WrongResultError, match=message) as error:
        gate.admit(step(bench, "gather", 0.5))
    where = r"gather is wrong for images (contiguous) with 0.5 of the neurons active: "
    assert str(error.value).startswith(where)


def test_backends_are_those_that_granules_get(bench):
    order, count = torch.arange(8), torch.tensor(4)
    arguments = torch.ones(2, 8), torch.ones(2, 3), torch.empty(8, 3), order, count, True
    with mock.patch.object(planner, "choose", return_value="pack") as choose:
        with steps.Backends(step(bench, "neq", 0.5)):
            ops.linear_wgrad(*arguments, granule=4)
        choose.assert_called_with(*arguments[1:3], 8, 4, True, None, granule=4)
