"""φ and velocity against sequences worked out by hand."""

import pytest
import torch

import neq


def test_similarity_by_hand():
    # neurons in columns: (3,4)·(4,3) = 24/25; orthogonal; opposite; equal
    current = torch.tensor([[3.0, 1, 2, 5], [4, 0, 1, 7]])
    previous = torch.tensor([[4.0, 0, -2, 5], [3, 1, -1, 7]])
    assert neq.similarity(current, previous, 1).tolist() == [24 / 25, 0, -1, 1]


def test_similarity_takes_all_samples_as_one_vector_or_each_by_itself():
    # one neuron, two samples of two positions: cosines 1 and 0, but the first one is longer
    current = torch.tensor([[[3.0, 0]], [[0, 1]]])
    previous = torch.tensor([[[3.0, 0]], [[1, 0]]])
    assert neq.similarity(current, previous, 1).item() == pytest.approx(9 / 10, abs=1e-15)
    assert neq.similarity(current, previous, 1, per_sample=True).tolist() == [0.5]


def test_similarity_of_zero_outputs():
    current = torch.tensor([[0.0, 0, 1], [0, 0, 1]])
    previous = torch.tensor([[0.0, 1, 0], [0, 1, 0]])
    assert neq.similarity(current, previous, 1).tolist() == [1, 0, 0]  # both, one, the other
    # per sample: dead in the first and alike in the second; dead in one of two in either
    current, previous = torch.tensor([[0.0], [2]]), torch.tensor([[0.0], [3]])
    assert neq.similarity(current, previous, 1, per_sample=True).tolist() == [1]


def test_similarity_of_outputs_that_are_not_finite_is_nan():
    current = torch.tensor([[1.0, torch.inf, 1], [1, 1, torch.nan]])
    assert neq.similarity(current, torch.ones(2, 3), 1).isnan().tolist() == [False, True, True]


def test_similarity_of_unchanged_outputs_is_exactly_one():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = torch.randn(50, 8, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert (neq.similarity(y, y.clone(), 1) == 1).all()


def test_similarity_does_not_overflow():
    y = torch.full((4, 2), 3e38, dtype=torch.bfloat16).double()
    assert neq.similarity(y, y, 1).tolist() == [1, 1]
    y = torch.full((1000, 1), 6e4, dtype=torch.float16)  # squares beyond what half can hold
    assert neq.similarity(y, -y, 1).tolist() == [-1]


def test_similarity_leaves_no_graph():
    assert not neq.similarity(
        torch.ones(2, 2, requires_grad=True), torch.ones(2, 2), 1
    ).requires_grad


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
