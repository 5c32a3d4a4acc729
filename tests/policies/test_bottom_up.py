"""A prefix that grows, by made-up velocities."""

import copy
from math import cos, pi

import pytest
import torch

import neq
from tests.support.bottom_up import NAN, Told

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW, FAST = 0.01, 1.0


def depths(policy, *epochs, **options):
    told = Told(policy)
    return [told.after(*speeds, **options) for speeds in epochs]


def test_a_block_is_frozen_when_it_was_settled_so_often():
    policy = neq.BottomUp(patience=3)
    epochs = [(FAST,), (SLOW,), (SLOW,), (FAST,), (SLOW,), (SLOW,), (SLOW,), (0.0,)]
    assert depths(policy, *epochs) == [0, 0, 0, 0, 0, 0, 1, 1]


def test_blocks_are_frozen_from_the_input_up():
    policy = neq.BottomUp(patience=2)
    epochs = [(FAST, SLOW, SLOW), (FAST, SLOW, SLOW), (SLOW, SLOW, FAST), (SLOW, SLOW, FAST)]
    # the second waits for the first, and is then frozen with it
    assert depths(policy, *epochs, (0.0, 0.0, SLOW), (0.0, 0.0, SLOW)) == [0, 0, 0, 2, 2, 3]


def test_eps_is_a_share_of_the_highest_median_of_any_block_at_any_time():
    policy = neq.BottomUp(eps=0.1, patience=1)
    for scale in (1.0, 1e-4):  # so the length of an epoch does not matter
        policy = neq.BottomUp(eps=0.1, patience=1)
        told = Told(policy)
        answers = [
            told.after(*(scale * v for v in speeds))
            for speeds in (
                (0.4, 1.0, 0.4, 9.0),  # of a block: the head does not count
                (0.11, 0.5, 0.5),
                (0.11, 0.5, 0.5),  # not a share of 0.5, the highest now
                (0.09, 0.5, 0.5),
            )
        ]
        assert answers == [0, 0, 0, 1]
    # the median: one fast neuron of four does not count
    for slow, depth in ((0.09, 0), (0.04, 1)):
        assert depths(neq.BottomUp(patience=1), (slow, [9.0, 0.5, 0.5, 0.5], 0.5)) == [depth]


def test_a_share_of_the_neurons_is_enough():
    speeds = [SLOW, SLOW, FAST, -SLOW], FAST
    assert depths(neq.BottomUp(share=0.75, patience=1), speeds) == [1]
    assert depths(neq.BottomUp(share=0.76, patience=1), speeds) == [0]
    # of those that were measured
    speeds = [SLOW, NAN, NAN, FAST], FAST
    assert depths(neq.BottomUp(share=0.5, patience=1), speeds) == [1]
    assert depths(neq.BottomUp(share=0.6, patience=1), speeds) == [0]


def test_a_block_in_which_nothing_is_measured_follows_the_one_above():
    for speeds, depth in (
        ((NAN, SLOW, FAST), 2),
        ((NAN, FAST, FAST), 0),
        ((SLOW, NAN, FAST), 1),
        ((NAN, NAN, SLOW), 0),  # the fastest block is itself
        ((SLOW, SLOW, NAN), 0),
        ((NAN, NAN, NAN), 0),
    ):
        assert depths(neq.BottomUp(patience=1), speeds) == [depth], speeds
    told = Told(neq.BottomUp(patience=1))
    assert told.after(FAST, FAST, FAST) == 0
    assert told.after(SLOW, SLOW, NAN) == 2  # above the last block nothing is settled
    assert told.after(NAN, NAN, SLOW) == 3


def test_where_nothing_moves_nothing_is_settled():
    assert depths(neq.BottomUp(patience=1), (0.0,) * 4, (0.0,) * 4) == [0, 0]


def lengths(told, steps):
    """How far the first block and the head go, in each of so many steps."""
    found = []
    for _ in range(steps):
        before = [told.model[i].bias[0].item() for i in (0, 3)]
        told.step()
        found.append(
            [b - told.model[i].bias[0].item() for i, b in zip((0, 3), before, strict=True)]
        )
    return torch.tensor(found) / 0.1


def test_the_rate_is_zero_before_the_block_is_frozen():
    told = Told(neq.BottomUp(patience=1, anneal=2))
    steps = 4
    assert told.after(SLOW, FAST, steps=steps) == 0
    found = lengths(told, steps)
    assert told.after(FAST, FAST) == 0  # it is decided
    found = torch.cat([found, lengths(told, steps)])
    assert told.after(FAST, FAST) == 1
    expected = torch.tensor([[0.5 * (1 + cos(pi * i / 8)), 1] for i in range(8)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # no step is shortened any more: its Guard keeps it
    assert lengths(told, 1).tolist()[0] == pytest.approx([1, 1], rel=1e-4)


def test_annealing_after_a_warm_up_ends_with_the_freeze():
    told = Told(neq.BottomUp(patience=1, anneal=1))
    for _ in range(12):
        told.step()
    told.epoch = 2  # two epochs of warm-up are over, in which the policy is not asked
    assert told.after(SLOW, FAST) == 0
    found = lengths(told, 4)
    assert told.after(SLOW, FAST) == 1
    expected = torch.tensor([[0.5 * (1 + cos(pi * i / 4)), 1] for i in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_thaws_and_that_patience_begins_again():
    def settled():
        told = Told(neq.BottomUp(patience=2))
        assert [told.after(SLOW, FAST, FAST) for _ in range(3)] == [0, 1, 1]
        return told

    told = settled()
    told.optimizers[0].param_groups[0]["lr"] *= 2
    assert [told.after(SLOW, FAST, FAST) for _ in range(3)] == [0, 0, 1]
    told = settled()
    assert told.after(0.0, 5 * FAST, 5 * FAST, 5 * FAST) == 0
    assert [told.after(SLOW, FAST, FAST) for _ in range(3)] == [0, 1, 1]
    told = settled()
    losses = [told.after(SLOW, FAST, FAST, loss=x) for x in (1.0, 1.1, 1.0, 1.1, 2.0)]
    assert losses == [1, 1, 1, 1, 0]
    assert [told.after(SLOW, FAST, FAST, loss=1.9) for _ in range(2)] == [0, 1]


def test_a_thaw_gives_back_the_rate_too():
    told = Told(neq.BottomUp(patience=1, anneal=3))
    told.after(SLOW, FAST, steps=4)
    assert lengths(told, 4)[-1, 0] < 1
    told.optimizers[0].param_groups[0]["lr"] *= 2
    told.after(FAST, FAST)
    assert torch.allclose(lengths(told, 4), torch.tensor(2.0))
    told.after(FAST, FAST)
    assert told.after(FAST, FAST) == 0  # it is not frozen at the time that was planned


def test_surge_is_an_argument():
    for surge, depth in ((2.0, 0), (4.0, 1)):
        told = Told(neq.BottomUp(patience=1, surge=surge))
        told.after(SLOW, FAST, FAST)
        assert told.after(0.0, 3 * FAST, 3 * FAST, 3 * FAST) == depth


@pytest.mark.parametrize("at", range(1, 12))
def test_it_resumes_with_the_same_bits_in_the_middle_of_anything(at):
    """Settling, annealing, freezing, a thaw, and settling again."""
    epochs = [(FAST, FAST), *[(SLOW, FAST)] * 4, *[(0.0, SLOW, FAST)] * 4, *[(SLOW, FAST)] * 3]
    rates = [0.1] * 8 + [0.3] * 4

    def start():
        return Told(neq.BottomUp(patience=2, anneal=2, above=neq.Equilibrium(share=0.5)))

    def run(told, numbers):
        answers = []
        for n in numbers:
            told.optimizers[0].param_groups[0]["lr"] = rates[n]
            answers.append(told.after(*epochs[n], steps=3, loss=1.0 + n % 2))
            told.rows(*epochs[n])
        return answers

    whole = start()
    answers = run(whole, range(12))
    assert answers == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    first, second = start(), start()
    run(first, range(at))
    for part in "model", "policy":
        getattr(second, part).load_state_dict(copy.deepcopy(getattr(first, part).state_dict()))
    second.epoch = first.epoch
    assert run(second, range(at, 12)) == answers[at:]
    for p, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, other)
    assert second.policy.above.eps == whole.policy.above.eps


def test_another_policy_chooses_above_and_is_measured_for():
    told = Told(neq.BottomUp(above=neq.LowestVelocity(0.5)))
    assert told.rows([0.1, 0.2, 0.3, 0.4])[0] == [2, 3]
    assert Told(neq.BottomUp()).rows(0.0) == [[0, 1, 2, 3]] * 4
    for policy, mu in (
        (neq.BottomUp(mu=0.25), 0.25),
        (neq.BottomUp(above=neq.Equilibrium(mu=0.75)), 0.75),
        (neq.BottomUp(mu=0.25, above=neq.Random(0.5)), 0.25),
    ):
        assert policy.measure()._velocity.mu == mu
    assert neq.BottomUp().by_granule
    assert not neq.BottomUp(above=neq.Fixed({})).by_granule


def test_its_optimizers_are_let_go():
    told = Told(neq.BottomUp(anneal=1))
    (optimizer,) = told.optimizers
    assert optimizer._optimizer_step_pre_hooks
    told.policy.detach()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1}, "eps must be at least 0, got -1"),
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"anneal": -1}, "anneal must be at least 0, got -1"),
        ({"surge": 1}, "surge must be above 1, got 1"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        neq.BottomUp(**options)
