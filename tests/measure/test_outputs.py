"""Memories of outputs, and the similarity to them."""

import pytest
import torch

import neq
from neq.measure.outputs import POSITIONS, KeptOutputs


def remember(where="device", per_sample=False, keeps_precision=False, neurons=(3,)):
    devices = [torch.device("cpu")] * len(neurons)
    return KeptOutputs(list(neurons), devices, where, per_sample, keeps_precision)


def compare(kept, passes):
    """φ after the last of several passes, each a list of (group, output, channel_dim)."""
    for outputs in passes:
        kept.start()
        for output in outputs:
            kept.observe(*output)
    return kept.phi(kept.sums())


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_memory_gives_the_similarity_of_all_calls_and_batches_together(where, per_sample):
    generator = torch.Generator().manual_seed(0)
    # two calls of different size, as of a loader whose last batch is smaller
    now = [torch.randint(-9, 9, s, generator=generator).float() for s in ((4, 3, 5), (2, 3, 5))]
    before = [torch.randint(-9, 9, y.shape, generator=generator).float() for y in now]
    kept = remember(where, per_sample)
    phi = compare(kept, [[(0, y, 1) for y in before], [(0, y, 1) for y in now]])
    expected = neq.similarity(torch.cat(now), torch.cat(before), 1, per_sample)
    assert torch.allclose(phi, expected, rtol=0, atol=1e-15)


def test_memory_without_a_pass_before_measures_nothing():
    assert compare(remember(), [[(0, torch.ones(2, 3), 1)]]).isnan().all()


def test_memory_of_outputs_that_come_and_go():
    y, other = torch.ones(2, 3), torch.ones(4, 3)
    kept = remember(neurons=(3, 3, 3, 3, 3))
    empty = torch.ones(0, 3)
    before = [(0, y, 1), (1, y, 1), (1, other, 1), (2, y, 1), (4, empty, 1)]
    after = [(0, other, 1), (1, y, 1), (3, y, 1), (4, empty, 1)]
    phi = compare(kept, [before, after]).view(5, 3)
    # 0: another size; 1: its first call; 2: not used now; 3: not used before; 4: no tokens
    assert phi[1].tolist() == [1, 1, 1]
    assert phi[[0, 2, 3, 4]].isnan().all()


@pytest.mark.parametrize("where", ["device", "host", "sketch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_holds_copies_in_16_bits(where, dtype):
    y = torch.randn(2, 3, 4000 if where == "sketch" else 4).to(dtype)
    kept = remember(where)
    kept.start()
    kept.observe(0, y, 1)
    (copied,) = kept.outputs[0]
    held = copied.clone()
    y.zero_()  # as an activation does that works in place
    assert torch.equal(copied, held)
    assert copied.dtype.itemsize == 2
    assert remember(keeps_precision=True)._keep(torch.ones(2, 3), 1)[0].dtype == torch.float32


def test_unchanged_outputs_are_exactly_alike_in_any_memory():
    y = torch.randn(5, 3, 700)
    for where in ("device", "host", "sketch"):
        assert compare(remember(where), [[(0, y, 1)], [(0, y.clone(), 1)]]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("shape", "dim"), [((10, 3, 40, 50), 1), ((10, 40, 50, 3), 3)])
def test_a_sketch_is_bounded_and_close(shape, dim):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(shape, generator=generator)
    now = before + 0.3 * torch.randn(shape, generator=generator)
    whole, sketch = remember(), remember("sketch")
    passes = [[(0, before, dim)], [(0, now, dim)]]
    exact, close = compare(whole, passes), compare(sketch, passes)
    assert sketch.outputs[0][0].numel() <= 3 * POSITIONS
    assert torch.allclose(exact, close, atol=0.02)
    assert not torch.equal(exact, close)
    small = torch.randn(4, 3, 5)  # nothing to choose from: kept whole
    assert sketch._keep(small, 1)[0].shape == small.shape


def test_a_sketch_takes_the_same_positions_of_every_neuron_and_in_every_pass():
    position = torch.arange(4000.0).expand(2, 3, 4000)
    first, second = (remember("sketch", keeps_precision=True)._keep(position, 1)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first[0], first[1])  # but others in each sample
    last = remember("sketch", keeps_precision=True)._keep(position.transpose(1, 2), 2)[0]
    assert torch.equal(last.transpose(1, 2), first)


def test_memory_refuses():
    with pytest.raises(ValueError, match="'device', 'host' or 'sketch', got 'disk'"):
        remember("disk")
