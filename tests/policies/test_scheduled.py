"""A prefix that grows at given times."""

from math import cos, pi

import pytest
import torch

import neq
from neq.prefix.blocks import NoCutError
from tests.support.bottom_up import Told
from tests.support.cuttable import IMAGES, optimizer_of, resnet, step

pytestmark = pytest.mark.usefixtures("one_thread")


def depths(policy, epochs):
    told = Told(policy)
    return [told.after(0.0) for _ in range(epochs)]


def test_at_shares_of_the_training():
    policy = neq.BottomUp.scheduled([0.2, 0.2, 0.7], epochs=10)
    assert depths(policy, 10) == [0, 2, 2, 2, 2, 2, 3, 3, 3, 3]
    # .55 of 20 are a little more than 11, and .07 of 100 more than 7
    assert depths(neq.BottomUp.scheduled([0.55], epochs=20), 11) == [0] * 10 + [1]
    assert depths(neq.BottomUp.scheduled([0.07], epochs=100), 7) == [0] * 6 + [1]
    # between two decisions it is the later one
    assert depths(neq.BottomUp.scheduled([0.25], epochs=10), 3) == [0, 0, 1]
    assert depths(neq.BottomUp.scheduled([], epochs=10), 2) == [0, 0]


def test_from_the_start_or_never():
    told = Told(neq.BottomUp.scheduled([0.0, 1.0], epochs=4))
    assert told.policy.depth(told.motions(), 0) == 1
    assert [told.after(0.0) for _ in range(4)] == [1, 1, 1, 2]


def test_cubic_is_freeze_outs_by_hand():
    """Of three blocks and a head: t_i = (t_0 + (1 - t_0) i / 3)³, and the head's is 1."""
    told = Told(neq.BottomUp.scheduled(epochs=100, first=0.5))
    shares = [0.5**3, (2 / 3) ** 3, (5 / 6) ** 3]
    assert told.policy.shares == pytest.approx(shares)
    found = [told.after(0.0) for _ in range(100)]
    ends = [13, 30, 58]  # 12.5, 29.6 and 57.9 percent
    assert found == [sum(n >= end for end in ends) for n in range(1, 101)]
    # of the rate: half a cosine from the start on
    told = Told(neq.BottomUp.scheduled("cubic", epochs=100, first=0.5))
    told.after(0.0, steps=10)
    for _ in range(8):
        told.after(0.0, steps=10)
    for _ in range(5):
        told.step()
    for block, share in enumerate(shares):
        rate = told.policy._annealing.rate(told.model[block].weight)
        assert rate == pytest.approx(0.5 * (1 + cos(pi * 9.5 / (100 * share))))
    assert told.policy._annealing.rate(told.model[3].weight) == 1


def test_the_default_is_cubic_from_eight_tenths():
    told = Told(neq.BottomUp.scheduled(epochs=10))
    assert told.policy.shares == pytest.approx([(0.8 + 0.2 * i / 3) ** 3 for i in range(3)])


def test_shares_are_annealed_if_asked_for():
    told = Told(neq.BottomUp.scheduled([0.5], epochs=8))
    assert told.policy._annealing.spans == {}
    told = Told(neq.BottomUp.scheduled([0.5, 1.0], epochs=8, anneal=0.25))
    spans = told.policy._annealing.spans
    assert spans[told.model[0].weight] == spans[told.model[0].bias] == (3, 4)
    assert spans[told.model[1].weight] == (6, 8)
    assert told.model[2].weight not in spans
    assert Told(neq.BottomUp.scheduled(epochs=8, anneal=0)).policy._annealing.spans == {}


def test_nothing_is_measured_but_for_the_layers_above():
    assert not neq.BottomUp.scheduled(epochs=3).measures
    assert neq.BottomUp.scheduled(epochs=3, above=neq.Equilibrium()).measures
    with pytest.raises(ValueError, match="Scheduled decides by how neurons move, so it needs a pr"):
        neq.Controller(
            resnet(), optimizer=(), policy=neq.BottomUp.scheduled(epochs=3, above=neq.Equilibrium())
        )


@pytest.mark.parametrize(
    ("shares", "options", "message"),
    [
        ("square", {}, "shares must be numbers or 'cubic', got 'square'"),
        ([0.5, 0.4], {}, r"shares must not fall, since blocks freeze in order; got \[0.5, 0.4\]"),
        ([0.5, 1.4], {}, r"shares must lie in \[0, 1\], got 1.4"),
        ([0.5], {"epochs": 0}, "epochs must be at least 1, got 0"),
        ("cubic", {"first": 80}, r"first must lie in \[0, 1\], got 80"),
        ([0.5], {"anneal": 2}, r"anneal must lie in \[0, 1\], got 2"),
    ],
)
def test_arguments_out_of_range(shares, options, message):
    with pytest.raises(ValueError, match=message):
        neq.BottomUp.scheduled(shares, **{"epochs": 9, **options})


# -- with a Controller --------------------------------------------------------------------------


def test_more_shares_than_blocks_and_a_model_without_blocks():
    given = {"optimizer": (), "example_inputs": IMAGES}
    policy = neq.BottomUp.scheduled([0.1] * 4, epochs=9)
    message = "4 shares, but the model has 3 blocks that can be frozen: stem, blocks.0, blocks.1"
    with pytest.raises(ValueError, match=message):
        neq.Controller(resnet(), policy=policy, **given)
    with pytest.raises(NoCutError, match="Linear has no place to cut"):
        neq.Controller(
            torch.nn.Linear(3, 2),
            policy=neq.BottomUp.scheduled(epochs=9),
            optimizer=(),
            example_inputs=torch.randn(2, 3),
            leave_alone=(),
        )
    with pytest.raises(ValueError, match=r"Scheduled freezes a prefix, .* example_inputs, a batch"):
        neq.Controller(resnet(), policy=neq.BottomUp.scheduled(epochs=9), optimizer=())


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_a_controllers_record_and_prefix_follow_the_schedule(warmup):
    model = resnet()
    optimizer = optimizer_of(model)
    control = neq.Controller(
        model,
        optimizer=optimizer,
        policy=neq.BottomUp.scheduled([0.25, 0.75], epochs=4, anneal=0.5),
        example_inputs=IMAGES,
        warmup=warmup,
    )
    expected = [(0, 1), (1, 1), (1, 2), (2, 2)] if warmup < 2 else [(0, 0), (0, 0), (0, 2), (2, 2)]
    for depths in expected:
        step(model, optimizer)
        record = control.step()
        assert (record.depth, record.depth_next) == depths
        assert control.prefix.depth == record.depth_next
        inside = [x.active for x in record.layers if x.block is not None and x.block < depths[1]]
        assert not any(inside)
    control.remove()
    assert control.prefix.depth == 0
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
