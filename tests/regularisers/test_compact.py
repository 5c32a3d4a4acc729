"""Regularisers of a compact model."""

import pytest
import torch
from torch import nn

import neq
from tests.support.compact import (
    OTHER,
    ROWS,
    assert_same_weights,
    same_arithmetic,
    set_rows,
    step,
    twins,
)

by_neuron = pytest.mark.parametrize("kind", [neq.NeuronLOBSTER, neq.SeReNe])


def model_and_optimizer():
    model = neq.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@by_neuron
def test_decay_by_neuron_is_refused(kind):
    model, optimizer = model_and_optimizer()
    neq.compact(model, capacity=1.0)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: layer '0' is in the compact form"):
        kind(model, optimizer)


@by_neuron
def test_so_it_is_in_the_step_after_it_was_made_compact(kind):
    model, optimizer = model_and_optimizer()
    made = kind(model, optimizer)
    neq.compact(model, capacity=1.0)
    output = model(torch.randn(3, 4))
    if kind is neq.SeReNe:
        made.observe(output)
    output.sum().backward()
    with pytest.raises(ValueError, match=rf"{kind.__name__}: layer '0' is in the compact form"):
        optimizer.step()


def test_leaves_decay_as_the_rows_that_they_hold():
    masked, compact = twins()
    with same_arithmetic():
        for model in masked, compact:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            if model is masked:
                neq.optim.Guard(optimizer, model, on_thaw="reset")
            neq.LOBSTER(model, optimizer, lam=0.1)
            for rows in ROWS, OTHER:
                set_rows(model, rows)
                step(model, optimizer)
    assert_same_weights(masked, compact)
