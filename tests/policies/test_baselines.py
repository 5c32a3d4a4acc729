"""Policies to compare with."""

import torch

import neq
from tests.support.velocities import NAN, chosen_rows, controller, motion


def test_random_draws_anew_and_reproducibly():
    motions = [motion([0] * 40), motion([0] * 7)]
    policy = neq.Random(0.25, seed=1)
    first, second = chosen_rows(policy, *motions), chosen_rows(policy, *motions)
    assert [len(rows) for rows in first] == [10, 2]
    assert first != second
    assert chosen_rows(neq.Random(0.25, seed=1), *motions) == first
    assert chosen_rows(neq.Random(0.25, seed=2), *motions) != first
    counts = torch.zeros(40)
    for _ in range(400):
        counts[chosen_rows(policy, motions[0])[0]] += 1
    assert counts.min() > 60  # each is drawn about 100 times of 400
    assert counts.max() < 140


def test_random_resumes():
    motions = [motion([0] * 40)]
    policy, other = neq.Random(0.5, seed=1), neq.Random(0.5, seed=2)
    chosen_rows(policy, *motions)
    other.load_state_dict(policy.state_dict())
    assert chosen_rows(other, *motions) == chosen_rows(policy, *motions)


def test_random_leaves_the_global_generator_alone():
    motions = motion([0] * 9)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    chosen_rows(neq.Random(0.5), motions)
    assert torch.equal(torch.rand(2), expected)


def test_lowest_velocity_is_frozen():
    motions = [motion([0.3, -0.9, 0.1, 0.2]), motion([1, NAN])]
    assert chosen_rows(neq.LowestVelocity(0.5), *motions) == [[0, 1], [1]]
    # as in the published records: the lowest signed velocity is frozen, however fast
    assert chosen_rows(neq.LowestVelocity(0.5, signed=True), *motions) == [[0, 3], [1]]


def test_fixed_and_everything():
    motions = [motion([0, 0, 0], name="0"), motion([0, 0], name="1"), motion([0, 0], name="2")]
    fixed = neq.Fixed({"0": [2, 0], "1": torch.tensor([False, True])})
    controller(fixed, probe=None)
    assert chosen_rows(fixed, *motions) == [[0, 2], [1], [0, 1]]
    assert chosen_rows(neq.Everything(), *motions) == [[0, 1, 2], [0, 1], [0, 1]]
