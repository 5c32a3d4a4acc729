"""Every behaviour is tested with the vendor's joint backward, and with one by rows."""

import copy

import pytest

import neq
from neq_kernels.wgrad import planner
from tests.support.layers import Tiny, mask_randomly


@pytest.fixture(autouse=True, params=["dense", None], ids=["joint", "by rows"])
def path(request, monkeypatch):
    """Tiny layers alone would all take the vendor's joint backward."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: request.param)
    monkeypatch.setattr(planner, "_measure", lambda *tensors: "dense")
    return request.param


@pytest.fixture
def plain():
    return Tiny()


@pytest.fixture
def model(plain):
    """The same model, converted, with random rows."""
    model = neq.convert(copy.deepcopy(plain))
    mask_randomly(model)
    return model
