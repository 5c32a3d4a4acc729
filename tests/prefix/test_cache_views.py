"""Augmented data behind a cache: views that come again."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import neq
from neq.prefix.views import Key, Views

pytestmark = pytest.mark.usefixtures("one_thread", "always_pays")

SAMPLES, BATCH = 12, 4


class Random(Dataset):
    """Items that are random by all three states, or by a generator of their own."""

    def __init__(self, own=False):
        self.generator = torch.Generator() if own else None

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        drawn = torch.randn(3, generator=self.generator)
        if self.generator is None:
            drawn += random.random() + np.random.rand()  # noqa: NPY002
        return torch.cat([torch.tensor([float(i)]), drawn])


class Same(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return {"x": torch.full((4,), float(i)), "text": "a", "nan": float("nan")}["x"]


def flip(x):
    return -x


def frozen(depth=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    prefix = neq.Prefix(model, torch.randn(2, 4))
    prefix.freeze(depth)
    return model, prefix


def loader_of(data, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, BATCH, shuffle=True, generator=generator, **options)


def epochs(model, loader, count):
    """The items of some epochs, each sorted by sample."""
    result = []
    for _ in range(count):
        batches = []
        for x in loader:
            batches.append(x)
            model(x).sum().backward()
        items = torch.cat(batches)
        result.append(items[items[:, 0].abs().argsort()])
    return result


def test_random_items_are_an_error_without_views():
    _, prefix = frozen()
    with pytest.raises(ValueError, match=r"sample 0 is another one each time.*give views=4"):
        neq.PrefixCache(prefix).wrap(loader_of(Random()))
    neq.PrefixCache(frozen()[1]).wrap(loader_of(Same()))


def test_checking_items_leaves_random_states_alone():
    _, prefix = frozen()
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    neq.PrefixCache(prefix, views=2).wrap(loader_of(Random()))
    after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert before[2][1].tolist() == after[2][1].tolist()


def test_a_generator_of_its_own_is_an_error():
    with pytest.raises(ValueError, match="draws from a generator of its own"):
        neq.PrefixCache(frozen()[1], views=2).wrap(loader_of(Random(own=True)))


def test_views_that_are_random_are_an_error():
    views = [None, lambda x: x + torch.randn(4)]
    with pytest.raises(ValueError, match="one of views, is random"):
        neq.PrefixCache(frozen()[1], views=views).wrap(loader_of(Same()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bank_of_draws(workers):
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix, views=2)
    seen = epochs(model, cache.wrap(loader_of(Random(), num_workers=workers)), 8)
    different = {tuple(items.flatten().tolist()) for items in seen}
    assert len(different) == 2
    assert (cache.hits, cache.misses) == (18, 6)
    a, b = (torch.tensor(items).view(SAMPLES, 4) for items in different)
    assert (a != b)[:, 1:].all()
    assert len(a[:, 1].unique()) == SAMPLES


def test_a_bank_is_drawn_from_only_while_a_prefix_is_frozen():
    model, prefix = frozen(0)
    cache = neq.PrefixCache(prefix, views=2)
    loader = cache.wrap(loader_of(Random()))
    seen = epochs(model, loader, 4)
    assert len({items[0, 1].item() for items in seen}) == 4
    batches = iter(loader)
    next(batches)
    prefix.freeze(1)
    model(next(batches)).sum().backward()  # fetched when anything could come
    assert (cache.hits, cache.misses) == (0, 0)
    assert len({items[0, 1].item() for items in epochs(model, loader, 8)}) == 2


def test_views_that_are_given():
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix, views=[None, flip])
    seen = epochs(model, cache.wrap(loader_of(Same())), 8)
    signs = torch.stack([items.sign()[1:, 0] for items in seen])  # sample 0 has none
    assert (signs.abs() == 1).all()
    assert ((signs == 1).any(0) & (signs == -1).any(0)).all()
    assert ((signs == 1).any(1) & (signs == -1).any(1)).all()  # both in each epoch
    assert (cache.hits, cache.misses) == (18, 6)


def test_views_are_reproducible_and_resumable():
    def items(skip):
        model, prefix = frozen()
        loader = loader_of(Random())
        wrapped = neq.PrefixCache(prefix, views=3).wrap(loader)
        if skip:
            loader.generator.set_state(state)
        return epochs(model, wrapped, 4 - skip), loader.generator

    first, generator = items(0)
    generator.manual_seed(0)
    again = loader_of(Random())
    model, prefix = frozen()
    epochs(model, neq.PrefixCache(prefix, views=3).wrap(again), 2)
    state = again.generator.get_state()
    assert torch.equal(torch.stack(first)[2:], torch.stack(items(2)[0]))


def test_without_views_the_order_is_that_of_the_loader():
    _, prefix = frozen()
    wrapped = neq.PrefixCache(prefix).wrap(loader_of(Same()))
    for x, y in zip(wrapped, loader_of(Same()), strict=True):
        assert torch.equal(x, y)


def test_datasets_that_fetch_many_items_at_once():
    class Many(Same):
        def __getitems__(self, indices):
            return [torch.full((4,), float(i)) for i in indices]

        def __getitem__(self, i):
            assert i in (0, 1, 3, 4, 6, 7, 9, 10)  # those that are checked
            return super().__getitem__(i)

    _, prefix = frozen()
    assert len(list(neq.PrefixCache(prefix).wrap(loader_of(Many())))) == 3


def test_ranks_that_keep_for_themselves_are_warned():
    _, prefix = frozen()
    sampler = DistributedSampler(Same(), num_replicas=2, rank=0)
    cache = neq.PrefixCache(prefix)
    with pytest.warns(UserWarning, match="give the PrefixCache a directory, which all ranks"):
        cache.wrap(DataLoader(Same(), BATCH, sampler=sampler))


def test_a_slot_is_a_sample_in_a_view():
    views = Views(3)
    assert [views.slot(Key(i, v)) for i in range(2) for v in range(3)] == list(range(6))
    assert views.slot(Key(4, None)) == -1
