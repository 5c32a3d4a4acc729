import pytest
import torch

from bench.lib.peak_memory import peak_bytes
from neq.prefix.marks import lengths, marks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_each_bit_counts(dtype):
    x = torch.randint(0, 100, (5, 3, 7)).to(dtype)
    before = marks(((x,), {}), 5)
    assert len(before.unique()) == 5
    for change in x.flip(2), x.flip(1), x.roll(1, 2):
        assert (marks(((change,), {}), 5) != before).all()
    as_bytes = x.view(torch.uint8)
    for place in 0, 1, -1:
        for bit in 1, 128:
            as_bytes[3, 1, place] ^= bit
            changed = marks(((x,), {}), 5) != before
            assert changed.tolist() == [False, False, False, True, False]
            as_bytes[3, 1, place] ^= bit


def test_a_sample_has_its_mark_in_any_batch(monkeypatch):
    x = torch.randn(6, 3, 4, 4)
    everything = marks(((x, {"y": x[:, 0]}), {}), 6)
    part = [4, 1, 4]
    y = x[part].to(memory_format=torch.channels_last)
    assert torch.equal(marks(((y, {"y": y[:, 0]}), {}), 3), everything[part])
    for words in 100, 7:  # a few samples at a time, and a few of their words
        monkeypatch.setattr("neq.prefix.marks._AT_ONCE", words)
        assert torch.equal(marks(((x, {"y": x[:, 0]}), {}), 6), everything)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("words", [1, 2, 5])
def test_pieces_of_any_size_give_the_same_marks(monkeypatch, dtype, words):
    x = torch.randint(0, 100, (3, 5, 3)).to(dtype)
    everything = marks(x, 3), marks(x[None], 1)
    monkeypatch.setattr("neq.prefix.marks._AT_ONCE", words)
    assert torch.equal(marks(x, 3), everything[0])
    assert torch.equal(marks(x[None], 1), everything[1])


def test_a_large_tensor_takes_little_memory():
    x = torch.zeros(1, 5_000_000)
    device = torch.device("cpu")
    assert peak_bytes(lambda: marks(x, 1), device) < x.nbytes


def test_what_is_not_by_sample_counts_for_all():
    x = torch.randn(3, 2)
    inputs = [
        ((x,), {}),
        ((x, 1), {}),
        ((x, 2), {}),
        ((x, True), {}),
        ((x, "a"), {}),
        ((x,), {"a": None}),
        ((x,), {"b": None}),
        ((x, torch.tensor(1)), {}),
        ((x, torch.arange(2)), {}),
        ((x, torch.zeros(3, 0)), {}),
        ((x, object()), {}),
        ((x, x), {}),
    ]
    found = torch.stack([marks(one, 3) for one in inputs])
    for column in found.T:
        assert len(column.unique()) == len(inputs)
    assert torch.equal(marks(((x, object()), {}), 3), found[-2])


def test_lengths():
    assert lengths(((torch.zeros(3, 2), [torch.zeros(4)]), {"a": torch.tensor(1), "b": 2})) == [
        3,
        4,
    ]
