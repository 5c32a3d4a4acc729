import pytest

from neq.prefix.paying import Costs


@pytest.fixture
def always_pays(monkeypatch):
    """On networks as small as these no time is saved."""
    monkeypatch.setattr(Costs, "refusal", lambda self: None)
