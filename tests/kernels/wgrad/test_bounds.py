"""What the planner promises on GPUs where nothing was measured."""

from dataclasses import replace
from math import inf
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import roofline
from bench.lib.cards import CARDS
from bench.lib.designs import GRANULE
from bench.lib.problems import problems
from neq_kernels.device import gpu
from neq_kernels.device.gpu import Gpu
from neq_kernels.wgrad import bounds, planner
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import Problem

SUITE = {p.name: p for p in problems("full", "cuda")}
SHARES = (4, 8, 12)  # sixteenths


def posed(name, bucket=8, granule=1):
    """A layer of the suite, as the planner sees it on a GPU."""
    p = SUITE[name]
    conv, last = None, False
    if p.kernel:
        sizes = ((p.stride,) * 2, (p.padding,) * 2, (1, 1), False, (0, 0), p.groups)
        conv, last = Conv(*sizes), True
    layout = last, conv, bucket, p.column_major, p.bias
    return Problem(p.op, "cuda", torch.bfloat16, p.dy, p.x, p.weight, *layout, granule=granule)


def on(*cards):
    """Inside, the machine has these."""
    return mock.patch.object(bounds, "gpus", return_value={CARDS.get(c, c) for c in cards})


@pytest.mark.parametrize("card", CARDS)
def test_no_choice_is_slower_than_dense_by_the_model(card):
    chosen = set()
    for name, bucket in ((name, bucket) for name in SUITE for bucket in SHARES):
        problem = posed(name, bucket)
        with on(card):
            choice = planner.predict(problem)
        chosen.add(choice)
        if choice != "dense":
            layer = bounds.Layer.of(problem)
            times = [model(layer, CARDS[card]).time(CARDS[card])[0] for model in MODELS]
            assert times[1] <= (1 - planner.GPU_MARGIN) * times[0]
    assert chosen == {"dense", "pack"}


MODELS = bounds.dense, bounds.pack


def test_winners_and_losers():
    with on("H200"):
        assert planner.predict(posed("llama-8b/q_proj, o_proj")) == "pack"
        assert planner.predict(posed("llama-8b/q_proj, o_proj", 15)) == "dense"
        assert planner.predict(posed("resnet50/layer1.conv3")) == "dense"  # bound by memory
        assert planner.predict(posed("resnet32/fc")) == "dense"  # bound by the host


def test_a_bias_is_part_of_the_problem():
    problem = posed("vit-l/mlp.up", 12)
    costs = []
    for bias in (False, True):
        with on("H200"):
            costs.append(planner.BACKENDS["pack"].cost(replace(problem, bias=bias)))
    assert costs[1] < costs[0] - 0.05
    assert problem.key != replace(problem, bias=False).key


@pytest.mark.parametrize("card", CARDS)
def test_granules_promise_what_the_roofline_says(card):
    """Its lines for granules are choices that the planner can make, and some are won by them."""
    more = 0
    for name, bucket in ((name, bucket) for name in SUITE for bucket in SHARES):
        r = roofline.line(card, SUITE[name], GRANULE, bucket / 16)
        problem = posed(name, bucket, r["granule"])
        if bounds.Layer.of(problem).k != r["active"] * problem.neurons:
            continue  # sixteenths that are no whole granules
        time = r["us"].get("pack", inf)
        won = time <= (1 - planner.GPU_MARGIN) * r["us"]["dense"]
        with on(card):
            assert planner.predict(problem) == ("pack" if won else "dense"), name
            more += won and planner.predict(replace(problem, granule=1)) == "dense"
    assert more > 0


def test_what_is_not_known_promises_nothing():
    problem = posed("llama-8b/q_proj, o_proj", 4)
    for cards in ([], [Gpu(70, 80)], ["H200", Gpu(90, 132)]):
        with on(*cards):
            assert planner.BACKENDS["pack"].cost(problem) == 1.0
            assert planner.predict(problem) == "dense"


def test_of_several_kinds_the_one_that_gains_least_counts():
    problem = posed("resnet50/layer4.conv2")
    costs = {}
    for cards in (("A100",), ("H100",), ("A100", "H100")):
        with on(*cards):
            costs[cards] = planner.BACKENDS["pack"].cost(problem)
    assert costs["A100", "H100"] == max(costs["A100",], costs["H100",])
    assert costs["A100",] != costs["H100",]


@pytest.mark.parametrize("told", [True, False])
def test_speeds_come_from_the_device(told):
    """In kHz and bits, as CUDA gives them: an H200's memory."""
    facts = {"clock_rate": 1_980_000, "memory_clock_rate": 3_201_000, "memory_bus_width": 6144}
    properties = {"major": 9, "minor": 0, "multi_processor_count": 132} | (facts if told else {})
    gpu.gpu.cache_clear()
    found = SimpleNamespace(**properties)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=found):
        it = gpu.gpu(torch.device("cuda", 0))
    gpu.gpu.cache_clear()
    assert it.is_known == told
    assert it[:2] == (90, 132)
    assert it.clock == pytest.approx(1.98 * told)
    assert it.memory == pytest.approx(4.92 * told, rel=1e-2)
