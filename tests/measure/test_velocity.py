"""Velocity against sequences worked out by hand."""

import pytest
import torch

import neq

PHI = [0.5, 0.75, 1.0, 0.875]  # all figures below are exact in binary


def run(velocity, phis=PHI):
    return [velocity.update(torch.tensor([phi], dtype=torch.float64)).item() for phi in phis]


def test_velocity_of_the_paper_by_hand():
    # v_0 = 1/2 - 1;  v_1 = 1/4 + 1/4;  v_2 = 1/4 - 1/4;  v_3 = -1/8 - 0
    assert run(neq.Velocity(0.5)) == [-0.5, 0.5, 0, -0.125]


def test_velocity_of_the_released_code_by_hand():
    # v_0 = -1/2;  v_1 = -1/4 + 1/4 + 1/2;  v_2 = 1/4 + 1/4 - 1/4;  v_3 = 1/8 - 1/8 - 1/4
    assert run(neq.Velocity(0.5, "released")) == [-0.5, 0.5, 0.25, -0.25]


def test_velocity_without_momentum():
    assert run(neq.Velocity(0)) == [-0.5, 0.25, 0.25, -0.125]  # the change of φ
    assert run(neq.Velocity(0, "released")) == [-0.5, 0.75, 0, -0.375]  # the change of that


def test_velocity_as_recorded_from_the_released_code():
    # one neuron of the published code when run, and the paper's recursion on the same φ; its record
    # has three decimals, and so has φ, worked back from it
    phi = [0.586, 0.920, 0.956, 0.988, 0.992, 0.987]
    recorded = {
        "released": [-0.414, 0.541, -0.028, -0.018, -0.036, -0.027],
        "paper": [-0.414, 0.541, -0.235, 0.149, -0.070, 0.030],
    }
    for recurrence, expected in recorded.items():
        assert run(neq.Velocity(0.5, recurrence), phi) == pytest.approx(expected, abs=1.5e-3)


def test_velocity_of_a_neuron_that_does_not_move_is_zero():
    for recurrence in ("paper", "released"):
        assert run(neq.Velocity(0.5, recurrence), [1, 1, 1]) == [0, 0, 0]


def test_velocity_goes_on_after_an_epoch_without_measurement():
    with_gap = run(neq.Velocity(0.5), [0.5, 0.75, float("nan"), 1.0, 0.875])
    assert with_gap[2] != with_gap[2]
    assert [*with_gap[:2], *with_gap[3:]] == run(neq.Velocity(0.5))


def test_velocity_is_float32_or_better():
    assert neq.Velocity().update(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert neq.Velocity().update(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_velocity_resumes():
    whole, first, second = (neq.Velocity(0.5, "released") for _ in range(3))
    expected = run(whole)
    run(first, PHI[:2])
    second.load_state_dict(first.state_dict())
    assert run(second, PHI[2:]) == expected[2:]
    fresh = neq.Velocity()
    fresh.load_state_dict(neq.Velocity().state_dict())
    assert run(fresh) == run(neq.Velocity())


def test_velocity_refuses():
    for mu in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\).*got"):
            neq.Velocity(mu)
    with pytest.raises(ValueError, match="'paper' or 'released', got 'published'"):
        neq.Velocity(0.5, "published")
    velocity = neq.Velocity()
    velocity.update(torch.ones(3))
    with pytest.raises(ValueError, match=r"each of the 3 neurons.*\[2\]"):
        velocity.update(torch.ones(2))
