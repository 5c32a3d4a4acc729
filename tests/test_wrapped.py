"""What other libraries put around models and optimizers, without these libraries."""

import pytest
import torch
from torch import nn

import neq
from neq.wrapped import model_in, optimizer_in


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


@pytest.mark.parametrize("inside", [True, False])
def test_deepspeeds_optimizer_is_refused(inside):
    zero = of("deepspeed.runtime.zero.stage_1_and_2")
    given = of("accelerate.utils.deepspeed", optimizer=zero) if inside else zero
    with pytest.raises(ValueError, match=r"optimizer: Wrapper is DeepSpeed's.*DDP or fully_shard"):
        neq.Controller(
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            optimizer=given,
            policy=neq.Everything(),
        )


def test_an_optimizer_of_deepspeed_that_is_torchs_is_taken():
    kind = type("FusedAdam", (torch.optim.Adam,), {"__module__": "deepspeed.ops.adam"})
    optimizer = kind([torch.ones(1, requires_grad=True)])
    assert optimizer_in(optimizer) is optimizer


def test_a_model_is_found_in_wrappers_of_torch():
    model = nn.Linear(2, 2)
    assert model_in(model) is model
    assert model_in(nn.DataParallel(model)) is model
    assert model_in(torch.compile(nn.DataParallel(model))) is model
