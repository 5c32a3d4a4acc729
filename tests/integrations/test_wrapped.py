"""What other libraries put around models and optimizers, without these libraries."""

import pytest
import torch
from torch import nn

import neq
from neq.integrations.wrapped import model_in, optimizer_in


def of(module, **attributes):
    """An object of a class that this module defines."""
    return type("Wrapper", (), {"__module__": module, **attributes})()


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("accelerate.optimizer", "optimizer"),
        ("lightning.pytorch.core.optimizer", "_optimizer"),
        ("pytorch_lightning.core.optimizer", "_optimizer"),
    ],
)
def test_an_optimizer_is_found_in_known_wrappers(library, name):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert optimizer_in(of(library, **{name: optimizer})) is optimizer
    control = neq.Controller(
        nn.Sequential(nn.Linear(2, 2), model),
        optimizer=of(library, **{name: optimizer}),
        policy=neq.Everything(),
    )
    assert control.optimizers == [optimizer]


def test_no_other_is_opened():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    assert optimizer_in(optimizer) is optimizer
    other = of("somebodys.library", optimizer=optimizer, _optimizer=optimizer)
    assert optimizer_in(other) is other


def test_a_model_is_found_in_wrappers_of_torch():
    model = nn.Linear(2, 2)
    assert model_in(model) is model
    assert model_in(nn.DataParallel(model)) is model
    assert model_in(torch.compile(nn.DataParallel(model))) is model
