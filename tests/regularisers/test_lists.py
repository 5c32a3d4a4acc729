"""LOBSTER's parameters in one list, as on a GPU: the same bits as one by one, as on a CPU."""

import pytest
import torch

import neq
from neq.regularisers import lobster
from tests.support.training import Net, train


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rescaled", [False, True])
def test_all_at_once(rescaled, monkeypatch):
    weights = []
    for together in (lobster._together, lambda parameters: [parameters]):
        monkeypatch.setattr(lobster, "_together", together)
        torch.manual_seed(0)
        model = neq.convert(Net())
        model.conv.set_active([0, 2])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        neq.LOBSTER(model, optimizer, 0.25, rescaled=rescaled)
        train(model, optimizer)
        weights.append([*model.parameters()])
    assert all(map(torch.equal, *weights))
