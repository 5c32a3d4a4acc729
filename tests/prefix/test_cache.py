"""A frozen prefix with a cache computes what it would have computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neq
from neq.measure.gradient_signal import HEAD
from tests.support.cached import BATCH, SAMPLES, frozen, images, loader_of, net, step, train
from tests.support.head_first import LABELS, SIGNALS, Told, X, build

pytestmark = pytest.mark.usefixtures("one_thread", "always_pays")


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_same_batches_give_the_same_bits(on_disk, tmp_path):
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix, tmp_path if on_disk else None)
    losses = train(model, cache.wrap(loader_of()))
    plain, _ = frozen()
    assert losses == train(plain, loader_of())
    assert same(model, plain)
    assert (cache.hits, cache.misses) == (6, 3)
    assert model.pair.runs == 3 + 1  # and once traced


@pytest.mark.parametrize("workers", [0, 2])
def test_other_batches_give_the_same_but_for_rounding(workers):
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix)
    options = {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
    losses = train(model, cache.wrap(loader_of(**options)))
    plain, _ = frozen()
    torch.testing.assert_close(losses, train(plain, loader_of(**options)), rtol=1e-4, atol=1e-5)
    assert cache.hits == 6


def test_the_loader_is_the_users_but_for_numbers():
    class Own(DataLoader):
        extra = 5

        def __iter__(self):
            yield from super().__iter__()

    loader = Own(images(), batch_size=BATCH, drop_last=True, collate_fn=lambda items: len(items))
    _, prefix = frozen()
    wrapped = neq.PrefixCache(prefix).wrap(loader)
    assert list(wrapped) == list(loader) == [8, 8]
    assert (len(wrapped), wrapped.batch_size, wrapped.extra) == (2, BATCH, 5)
    assert wrapped.dataset is loader.dataset


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_batch_of_which_a_part_is_there_is_computed(on_disk, tmp_path):
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix, tmp_path if on_disk else None)
    batches = [[0, 1], [0, 2], [3, 1], [2, 1], [3, 3], [4, 4], [4, 0]]
    plain = copy.deepcopy(model)
    for x, _ in cache.wrap(DataLoader(images(), batch_sampler=batches)):
        torch.testing.assert_close(model(x), plain(x))
    assert (cache.hits, cache.misses) == (3, 4)


def test_memory_formats_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 4))
    model = model.to(memory_format=torch.channels_last)
    prefix = neq.Prefix(model, torch.randn(2, 3, 6, 6), at=["0"])
    prefix.freeze(1)
    cache = neq.PrefixCache(prefix)
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(2):
        for x, _y in cache.wrap(loader_of()):
            model(x.to(memory_format=torch.channels_last)).sum().backward()
    assert cache.hits == 3
    for computed, read in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(computed, read)
        assert computed.stride() == read.stride()


def test_batches_that_come_of_no_wrapped_loader_run_everything():
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(loader_of())
    for epoch in range(2):
        for x, _ in loader:
            with torch.no_grad():
                model(x)  # validation does not take the batch's turn
            runs = model.pair.runs
            model(x).sum().backward()
            assert model.pair.runs == runs + (epoch == 0)
            model(x).sum().backward()  # a second forward
            assert model.pair.runs == runs + (epoch == 0) + 1
    assert (cache.hits, cache.misses) == (3, 3)
    runs = model.pair.runs
    model(torch.randn(BATCH, 3, 6, 6)).sum().backward()
    assert model.pair.runs == runs + 1


def test_gradients_can_be_accumulated():
    results = []
    for cached in False, True:
        model, prefix = frozen()
        loader = neq.PrefixCache(prefix).wrap(loader_of()) if cached else loader_of()
        for _ in range(2):
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 4  # of conv and head
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_exception_in_the_model_leaves_no_stand_in():
    model, prefix = frozen()
    loader = neq.PrefixCache(prefix).wrap(loader_of())
    for x, _ in loader:
        model(x)
    x, _ = next(iter(loader))
    model.breaks = True
    with pytest.raises(TypeError):
        model(x)
    model.breaks = False
    assert "forward" not in {*vars(model.pair), *vars(model.stem), *vars(model.drop)}
    assert torch.is_grad_enabled()
    x, _ = next(iter(loader))
    model(x).sum().backward()


def test_a_forward_of_its_own_comes_back():
    model, prefix = frozen()
    calls = []
    plain = model.stem.forward
    model.stem.forward = lambda x: (calls.append(1), plain(x))[1]
    own = model.stem.forward
    loader = neq.PrefixCache(prefix).wrap(loader_of())
    for _ in range(2):
        for x, _y in loader:
            model(x)
            assert model.stem.forward is own
    assert len(calls) == 3


def test_another_depth_drops_the_outputs():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    data = DataLoader([(torch.randn(6), 0) for _ in range(SAMPLES)], batch_size=BATCH)
    prefix = neq.Prefix(model, torch.randn(2, 6))
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(data)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    counts = []
    for depth in 0, 1, 1, 2, 2, 0, 1, 1:
        prefix.freeze(depth)
        for x, _ in loader:
            frozen_output = model[:depth](x)
            optimizer.zero_grad()
            y = model(x)
            assert torch.equal(y, model[depth:](frozen_output))
            y.square().mean().backward()
            optimizer.step()
        counts.append((cache.hits, cache.misses))
    assert counts == [(0, 0), (0, 3), (3, 3), (3, 6), (6, 6), (6, 6), (6, 9), (9, 9)]


def test_a_prefix_that_has_changed_is_computed_again():
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(loader_of())
    train(model, loader, epochs=1)
    with torch.no_grad():
        model.stem[1].running_mean[0] += 1  # a checkpoint that was loaded, say
    with pytest.warns(UserWarning, match="prefix has changed: stem.1.running_mean"):
        x, _ = next(iter(loader))
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    assert torch.equal(model(x), twin(x))
    assert cache.hits == 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_copy_of_the_model_has_no_cache(on_disk, tmp_path):
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix, tmp_path if on_disk else None)
    loader = cache.wrap(loader_of())
    train(model, loader, epochs=1)
    twin = copy.deepcopy(model)  # an average of weights, say
    for x, _ in loader:
        runs = twin.pair.runs
        assert torch.equal(twin(x), model(x))
        assert twin.pair.runs == runs + 1
    assert cache.hits == 3


def test_a_controller_that_is_resumed_reads_the_file(tmp_path):
    """With the same bits as a training that was not interrupted."""

    def start():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        control = neq.Controller(
            model,
            optimizer=optimizer,
            policy=neq.BottomUp.scheduled([0.2], epochs=5),
            example_inputs=torch.randn(2, 3, 6, 6),
            leave_alone=["head"],
        )
        cache = neq.PrefixCache(control, tmp_path)
        return model, optimizer, control, cache, cache.wrap(loader_of())

    def run(model, optimizer, control, cache, loader, epochs):
        for _ in range(epochs):
            torch.manual_seed(control.epoch)  # of the dropout above the prefix
            for x, y in loader:
                step(model, optimizer, x, y)
            control.step()
        return model, optimizer, control, cache

    whole, _, _, cache = run(*start(), epochs=5)
    assert (cache.hits, cache.misses) == (9, 3)
    cache.clear()
    *parts, cache = run(*start(), epochs=3)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    model, optimizer, control, cache, loader = start()
    for part, state in zip((model, optimizer, control), states, strict=True):
        part.load_state_dict(state)
    run(model, optimizer, control, cache, loader, epochs=2)
    assert (cache.hits, cache.misses) == (4, 2)  # two sizes of batches are looked at
    assert same(model, whole)


def test_head_first_is_served_before_its_look_and_after():
    """While the head trains alone, all blocks are a prefix; after the look, the lowest is."""

    def run(cached):
        found = [{HEAD: 9.0}] * 2 + [SIGNALS] * 4
        model, optimizer, control = build(Told(*found, longest=2))
        cache = neq.PrefixCache(control)
        loader = loader_of(TensorDataset(X, LABELS))  # one batch
        loader = cache.wrap(loader) if cached else loader
        served = []
        for _ in range(6):
            before = cache.hits
            for x, y in loader:
                step(model, optimizer, x, y)
            served.append((control.policy.phase, control.prefix.depth, cache.hits - before))
            control.step()
        return model, served

    model, served = run(cached=True)
    head, look, chosen = [("head", 3, 0), ("head", 3, 1)], ("look", 0, 0), ("chosen", 1, 1)
    assert served == [*head, look, ("chosen", 1, 0), chosen, chosen]
    assert same(model, run(cached=False)[0])


def test_clear_and_remove():
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(loader_of())
    train(model, loader, epochs=1)
    cache.clear()
    train(model, loader, epochs=1)
    assert (cache.hits, cache.misses) == (0, 6)
    with pytest.raises(ValueError, match="has a cache"):
        neq.PrefixCache(prefix)
    cache.remove()
    train(model, loader, epochs=1)
    assert (cache.hits, cache.misses) == (0, 6)
    neq.PrefixCache(prefix)


def test_precision_is_part_of_an_output():
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(loader_of())
    with torch.autocast("cpu", torch.bfloat16):
        losses = [train(model, loader, epochs=1) for _ in range(2)]
    assert cache.hits == 3
    assert cache._reuse._store.fields[0].dtype == "bfloat16"
    plain, _ = frozen()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses == [train(plain, loader_of(), epochs=1) for _ in range(2)]
    x, _ = next(iter(loader))
    with pytest.raises(ValueError, match=r"computed with autocast to bfloat16, .* no autocast"):
        model(x)


def test_compiled_code_skips_too():
    losses, compiles = [], []

    def backend(graph, inputs):
        compiles.append(1)
        return graph

    for cached in False, True:
        model, prefix = frozen()
        cache = neq.PrefixCache(prefix)
        loader = cache.wrap(loader_of()) if cached else loader_of()
        torch.compiler.reset()
        losses.append(train(torch.compile(model, backend=backend), loader, epochs=2))
    assert (cache.hits, cache.misses) == (3, 3)
    assert losses[0] == losses[1]
    before = len(compiles)
    train(torch.compile(model, backend=backend), loader, epochs=3)
    assert len(compiles) == before
