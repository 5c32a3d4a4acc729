"""What the planner promises on GPUs where nothing was measured."""

from collections import Counter
from dataclasses import replace
from itertools import product
from math import inf
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import roofline
from bench.lib import designs
from bench.lib.cards import CARDS
from bench.lib.designs import GRANULE
from bench.lib.problems import problems
from bench.lib.second_opinion import FLOPS_PER_BYTE, opinion
from neq_kernels.device import gpu
from neq_kernels.device.gpu import Gpu
from neq_kernels.wgrad import bounds, planner
from neq_kernels.wgrad.problem import BUCKETS

SUITE = {p.name: p for p in problems("full", "cuda")}
HEADS = "/fc", "/classifier"  # of one sample for an image: dW is most of what moves


def posed(name, bucket=8, granule=1):
    """A layer of the suite, with so many sixteenths of its neurons active."""
    return replace(designs.posed(SUITE[name], bucket / BUCKETS), granule=granule)


def on(*cards):
    """Inside, the machine has these."""
    return mock.patch.object(bounds, "gpus", return_value={CARDS.get(c, c) for c in cards})


@pytest.mark.parametrize("card", FLOPS_PER_BYTE)
def test_no_choice_is_slower_than_dense_by_another_model(card):
    """Made apart from the planner's. Where the planner leaves it at dense, zeros cost little."""
    chosen, winners, found = Counter(), 0, 0
    for layer, active in product(SUITE.values(), (0.1, 0.25, 0.5, 0.75)):
        choice = designs.planned(layer, active, card)
        view = opinion(designs.posed(layer, active), card)
        where = layer.name, active
        chosen[choice] += 1
        if choice == "pack":
            assert view.packed <= 1, where
        else:
            assert view.zeroed <= 1.05 or layer.name.endswith(HEADS), where
        wins = layer.groups == 1 and view.packed <= 1 - planner.GPU_MARGIN
        winners += wins
        found += wins and choice == "pack"
    assert chosen.keys() == {"dense", "pack"}
    assert found >= 0.6 * winners > 50  # the CPU's launches keep the planner from the others


def test_the_other_model_as_by_hand():
    """1024 inputs, 4096 neurons, 12608 samples. A byte is 290 FLOPs."""
    layer = SUITE["vit-l/mlp.up"]
    view = opinion(designs.posed(layer, 0.5), "H100")
    flops, dy, dw = 1.0576e11, 2.9952e10, 2.4327e9
    dense = flops + dy
    problem = bounds.Layer.of(designs.posed(layer, 0.5))
    kernels = [len(model(problem, CARDS["H100"]).kernels) for model in (bounds.pack, bounds.dense)]
    moved = 1.5 * (dy + dw) + 2e9 * (kernels[0] - kernels[1])
    assert view.packed == pytest.approx((flops / 2 + moved) / dense, rel=1e-3)
    assert view.packed_unbound == view.packed
    assert view.zeroed == pytest.approx(1 + dw / 2 / dense, rel=1e-3)
    narrow = opinion(designs.posed(SUITE["swin-b/stage0.mlp.up"], 0.25), "H100")
    assert narrow.packed < narrow.packed_unbound - 0.1  # dense would move 9 TB/s


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
    for name, bucket in product(SUITE, (4, 8, 12)):  # sixteenths
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compact", [True, False])
def test_packing_as_by_hand(bias, compact):
    """4096 x 4096 weights of which half are active: dW is written once, from packed rows."""
    layer = bounds.Layer(16384, 4096, 4096, 16384 * 4096, 2, bias, 2048, compact=compact)
    kernels, host = bounds.pack(layer, CARDS["H200"])
    assert len(kernels) == 2 + bias + (not compact)
    if not compact:
        assert kernels[-1].memory == 1.5 * 2 * 4096**2
        assert kernels[-1].slots == 2 * 4096**2 / 512 * 100
        assert kernels[-1].time(CARDS["H200"])[1] == "memory"
    calls, tensors = 1 + (not compact), 1 + 2 * bias + 2 * (not compact)
    assert host == 6 + 2 * tensors + 4 * calls + 2.5 * len(kernels)


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
