"""φ against similarities worked out by hand."""

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
