"""Whether a cache pays, by its arithmetic."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import neq
from neq.prefix import paying
from neq.prefix.paying import Costs, too_large


def measured(views, epochs, passes, prefix, write, read):
    costs = Costs(views, epochs)
    costs.passes = passes
    for slow in 3, 1, 2, 1:
        assert costs.refusal() is None  # nothing is known yet
        costs.add(slow * prefix, slow * write, slow * read)
    assert not costs.open
    return costs.refusal()


@pytest.mark.parametrize(
    ("views", "epochs", "passes", "write", "read", "pays"),
    [
        (1, None, 1, 100.0, 0.9, True),  # for ever
        (1, None, 1, 0.0, 1.0, False),
        (1, 3, 1, 1.0, 0.4, True),  # 2 · 0.6 > 1
        (1, 3, 1, 1.3, 0.4, False),
        (1, 3, 2, 1.0, 0.4, False),  # 1 · 0.6 < 1
        (1, 3, 3, 0.0, 0.0, False),  # the last epoch: nothing is read
        (2, 3, 1, 0.4, 0.4, True),  # written 1.75 times: 1.25 · 0.6 > 1.75 · 0.4
        (2, 3, 1, 0.5, 0.4, False),
    ],
)
def test_time_saved_against_time_spent(views, epochs, passes, write, read, pays):
    assert (measured(views, epochs, passes, 1.0, write, read) is None) == pays


def test_a_refusal_says_its_numbers():
    said = measured(2, 3, 1, 1e-3, 5e-4, 4e-4)
    assert "forward takes 1 ms, to write its output 0.5 ms, to find and read it 0.4 ms" in said
    assert "in the 3 epochs left it is written 1.8 times and read 1.2 times" in said
    assert "saves 0.75 ms and costs 0.875 ms" in said


def test_room(monkeypatch, tmp_path):
    monkeypatch.setattr(paying, "free_memory", lambda: 2000)
    assert too_large(1000, "all", None, None) is None
    assert "all take 1e-06 GB, half of the free memory is 1e-06" in too_large(
        1001, "all", None, None
    )
    assert too_large(1001, "all", 1001, None) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert too_large(50, "all", None, tmp_path) is None
    assert f"half of the free space in {tmp_path}" in too_large(51, "all", None, tmp_path)


def test_free_memory_is_a_plausible_number():
    assert 2**20 < paying.free_memory() < 2**50


def epoch(model, loader):
    for x in loader:
        model(x)


def test_a_cache_that_does_not_pay_is_turned_off(monkeypatch):
    monkeypatch.setattr(Costs, "refusal", lambda self: None if self.open else "2 < 3")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prefix = neq.Prefix(model, torch.randn(2, 4))
    prefix.freeze(1)
    cache = neq.PrefixCache(prefix, epochs=5)
    loader = cache.wrap(DataLoader(torch.randn(20, 4), 2))
    with pytest.warns(UserWarning, match="2 < 3"):
        epoch(model, loader)
    assert (cache.hits, cache.misses, cache.refusal) == (0, 4, "2 < 3")
    epoch(model, loader)
    assert (cache.hits, cache.misses) == (0, 4)
