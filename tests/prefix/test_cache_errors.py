"""What a cache refuses, and what it says."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import neq
from tests.support.cached import BATCH, frozen, images, loader_of

pytestmark = pytest.mark.usefixtures("one_thread", "always_pays")


def test_augmentation_of_the_batch_is_an_error():
    model, prefix = frozen()
    loader = neq.PrefixCache(prefix).wrap(loader_of())
    for x, _ in loader:
        model(x).sum().backward()
    x, _ = next(iter(loader))
    with pytest.raises(ValueError, match=r"input for sample 0 is not what it was .*in the loop"):
        model(x.flip(3))
    assert torch.is_grad_enabled()
    runs = model.pair.runs
    model(x).sum().backward()
    assert model.pair.runs == runs + 1


def test_what_else_the_model_gets_counts():
    model, prefix = frozen()
    loader = neq.PrefixCache(prefix).wrap(loader_of())
    for x, _ in loader:
        model(x, scale=1.0)
    x, _ = next(iter(loader))
    with pytest.raises(ValueError, match="input for sample 0"):
        model(x, scale=2.0)


def test_a_batch_fetched_ahead_is_found_out():
    model, prefix = frozen()
    loader = neq.PrefixCache(prefix).wrap(loader_of(shuffle=True))

    def train_on_the_first_after_the_second_has_come():
        for _ in range(3):
            batches = iter(loader)
            x, _ = next(batches)
            next(batches)
            model(x).sum().backward()

    with pytest.raises(ValueError, match="another batch than the loader's latest"):
        train_on_the_first_after_the_second_has_come()


def test_parts_of_a_batch_are_an_error():
    model, prefix = frozen()
    x, _ = next(iter(neq.PrefixCache(prefix).wrap(loader_of())))
    with pytest.raises(ValueError, match=r"handed out 8 samples, .* tensors of \[4\].*batch_size"):
        model(x[:4])
    assert torch.is_grad_enabled()


def test_samples_need_one_shape():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    texts = [torch.randint(9, (4 if i < BATCH else 5,)) for i in range(2 * BATCH)]
    prefix = neq.Prefix(model, torch.randint(9, (2, 4)))
    prefix.freeze(1)
    batches = iter(neq.PrefixCache(prefix).wrap(DataLoader(texts, batch_size=BATCH)))
    model(next(batches)).sum().backward()
    x = next(batches)
    with pytest.raises(ValueError, match=r"\[5, 6\] for a sample, and was .*\[4, 6\].*pad texts"):
        model(x)
    assert torch.is_grad_enabled()


def test_samples_come_first():
    class Turned(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1)

    model = nn.Sequential(nn.Linear(6, 6), Turned(), nn.Linear(6, 2))
    texts = [torch.randn(4, 6) for i in range(BATCH)]
    prefix = neq.Prefix(model, torch.randn(2, 4, 6))
    prefix.freeze(1)
    loader = neq.PrefixCache(prefix).wrap(DataLoader(texts, batch_size=BATCH))
    with pytest.raises(ValueError, match=r"'1'.* is \[4, 8, 6\] for 8 samples"):
        model(next(iter(loader)))


@pytest.mark.parametrize("kind", [torch.Tensor.sum, lambda x: {x}])
def test_only_tensors_of_an_output_can_be_kept(kind):
    class Extra(nn.Module):
        def forward(self, x):
            extra = kind(x.detach())
            return x, extra if isinstance(extra, set) else extra.item()

    class First(nn.Module):
        def forward(self, pair):
            return pair[0] * 1

    model = nn.Sequential(nn.Linear(6, 6), Extra(), First(), nn.Linear(6, 2))
    prefix = neq.Prefix(model, torch.randn(2, 6), at=["1"])
    prefix.freeze(1)
    loader = iter(neq.PrefixCache(prefix).wrap(DataLoader(torch.randn(8, 6), batch_size=4)))
    told = r"'1', .*: there is a set in it|'1', .*, has \[.*\] in it, and had \[.*\] before"
    with pytest.raises((TypeError, ValueError), match=told):
        model(next(loader)), model(next(loader))
    assert torch.is_grad_enabled()


def test_random_numbers_in_the_prefix_are_an_error():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(6, 6), Noise(), nn.Linear(6, 6), nn.Linear(6, 2))
    prefix = neq.Prefix(model, torch.randn(2, 6))
    prefix.freeze(1)
    loader = neq.PrefixCache(prefix).wrap(DataLoader(torch.randn(8, 6), batch_size=4))
    with pytest.raises(ValueError, match="draws random numbers, though it is in eval mode"):
        model(next(iter(loader)))


def test_loaders_without_numbers_are_errors():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(5))

    class Endless(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return i

    _, prefix = frozen()
    cache = neq.PrefixCache(prefix)
    with pytest.raises(TypeError, match=r"wrap takes a .*DataLoader, got list"):
        cache.wrap([1, 2])
    with pytest.raises(TypeError, match=r"Stream is an IterableDataset.*__getitem__"):
        cache.wrap(DataLoader(Stream(), batch_size=2))
    with pytest.raises(TypeError, match="Endless has no __len__"):
        cache.wrap(DataLoader(Endless(), batch_size=2, sampler=range(5)))
    with pytest.raises(ValueError, match="batch_size=None: TensorDataset"):
        cache.wrap(DataLoader(images(), batch_size=None))
    with pytest.raises(ValueError, match=r"gave 'a', not a number from 0 to 19"):
        next(iter(cache.wrap(loader_of(sampler=["a"]))))
    with pytest.raises(ValueError, match="20 samples, the loader has 21"):
        cache.wrap(loader_of(images(21)))


def test_bad_arguments():
    model, prefix = frozen()
    with pytest.raises(ValueError, match="Linear freezes no prefix"):
        neq.PrefixCache(model.head)
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        neq.PrefixCache(prefix, limit=-1)
    for views in 0, [], True:
        with pytest.raises(ValueError, match="views must be None, a number above 0"):
            neq.PrefixCache(prefix, views=views)
