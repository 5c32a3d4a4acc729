"""A cache in a file: it is read again, or an error; never wrong data."""

import os
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import neq
from neq.prefix.store import Field, Identity, create, locked_folder, open_, size

SAMPLES, BATCH = 12, 4
DATA = torch.arange(SAMPLES * 4.0).view(SAMPLES, 4)

pytestmark = pytest.mark.usefixtures("one_thread", "always_pays")


def frozen(seed=0, depth=1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    prefix = neq.Prefix(model, torch.randn(2, 4))
    prefix.freeze(depth)
    return model, prefix


def run(prefix, folder, data=DATA, **options):
    """One epoch: the model's outputs, and the cache."""
    cache = neq.PrefixCache(prefix, folder, **options)
    return torch.cat([prefix.model(x) for x in cache.wrap(DataLoader(data, BATCH))]), cache


def test_a_file_is_read_by_another_process(tmp_path):
    expected, cache = run(frozen()[1], tmp_path / "new" / "folder")
    assert (cache.hits, cache.misses) == (0, 3)
    again, cache = run(frozen()[1], tmp_path / "new" / "folder")
    assert torch.equal(again, expected)
    assert (cache.hits, cache.misses) == (2, 1)  # the first shows what the modules return
    assert os.listdir(tmp_path / "new" / "folder") == ["prefix.neq"]


def run_twice(prefix, folder):
    """The first time shows what the modules return, so only the second one reads all batches."""
    for _ in range(2):
        run(prefix, folder)
        prefix.source = None


@pytest.mark.parametrize("place", ["header", "magic", "cut", "longer", "row", "seal", "mark"])
def test_damage_is_an_error(tmp_path, place):
    run(frozen()[1], tmp_path)
    file = tmp_path / "prefix.neq"
    content = bytearray(file.read_bytes())
    slots = 4096
    at = {"header": 60, "magic": 3, "seal": slots, "mark": slots + 8 * SAMPLES}
    at["row"] = slots + 16 * SAMPLES + 5
    if place == "cut":
        del content[-1:]
    elif place == "longer":
        content += b"\0"
    else:
        content[at[place]] ^= 2
    file.write_bytes(content)
    _, prefix = frozen()
    told = "input for sample 0" if place == "mark" else r"prefix.neq is .*: remove it"
    with pytest.raises(ValueError, match=told):
        run_twice(prefix, tmp_path)
    assert torch.is_grad_enabled()


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "prefix.neq").touch()
    with pytest.raises(ValueError, match=r"prefix.neq is no cache of a prefix: remove it"):
        run(frozen()[1], tmp_path)


@pytest.mark.parametrize("other", ["weights", "depth", "samples", "views", "precision"])
def test_a_file_of_something_else_is_an_error(tmp_path, other):
    run(frozen()[1], tmp_path)
    _, prefix = frozen(seed=other == "weights", depth=1 + (other == "depth"))
    data = DATA[:8] if other == "samples" else DATA
    name = "fingerprint" if other in ("weights", "depth") else other
    with (
        pytest.raises(ValueError, match=rf"prefix.neq holds .*{name} is .*here;"),
        torch.autocast("cpu", enabled=other == "precision"),
    ):
        run(prefix, tmp_path, data, views=2 if other == "views" else None)


def test_other_data_are_an_error(tmp_path):
    run(frozen()[1], tmp_path)
    with pytest.raises(ValueError, match=r"input for sample 0 .*data are others"):
        run(frozen()[1], tmp_path, DATA + 1)


def test_another_depth_replaces_the_file(tmp_path):
    _, prefix = frozen()
    cache = neq.PrefixCache(prefix, tmp_path)
    loader = cache.wrap(DataLoader(DATA, BATCH))
    for depth in 1, 2:
        prefix.freeze(depth)
        for x in loader:
            prefix.model(x)
        assert (tmp_path / "prefix.neq").exists()
    prefix.freeze(0)
    assert not any(tmp_path.iterdir())


def test_a_file_that_another_process_has_replaced_stays(tmp_path):
    _, cache = run(frozen()[1], tmp_path)
    (tmp_path / "prefix.neq").unlink()
    (tmp_path / "prefix.neq").write_text("another")
    cache.clear()
    assert (tmp_path / "prefix.neq").read_text() == "another"


def test_processes_share_a_file(tmp_path):
    caches, outputs = [], []
    for half in (0, 2, 4), (1, 3, 5):  # what the ranks of a DistributedSampler get
        _, prefix = frozen()
        cache = neq.PrefixCache(prefix, tmp_path)
        batches = [[2 * i, 2 * i + 1] for i in half]
        outputs += [prefix.model(x) for x in cache.wrap(DataLoader(DATA, batch_sampler=batches))]
        caches.append((cache, prefix))
    cache, prefix = caches[0]
    loader = cache.wrap(DataLoader(DATA, batch_size=2))
    again = torch.cat([prefix.model(x) for x in loader])
    assert (cache.hits, cache.misses) == (6, 3)
    first, second = torch.cat(outputs[:3]), torch.cat(outputs[3:])
    assert torch.equal(again.view(3, 2, 2, 2)[:, 0].flatten(0, 1), first)
    assert torch.equal(again.view(3, 2, 2, 2)[:, 1].flatten(0, 1), second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("on_disk", [False, True])
def test_tensors_come_back_with_the_same_bits(tmp_path, dtype, on_disk):
    t = torch.randint(0, 2, (5, 3, 2, 7)).to(dtype).to(memory_format=torch.channels_last)
    tensors = [t, torch.randn(5), torch.randn(5, 3).t().contiguous().t(), torch.randn(5, 0)]
    fields = [Field.of(x) for x in tensors]
    identity = Identity("fingerprint", "no autocast", 3, 2)
    if on_disk:
        with locked_folder(tmp_path):
            store = create(tmp_path / "file", identity, fields)
    else:
        store = neq.prefix.store.Store(identity, fields)
    slots = torch.tensor([4, 0, 4, 5, 2])  # 4 twice
    tensors = [x[[0, 1, 0, 3, 4]] for x in tensors]
    store.write(slots, torch.arange(5), tensors)
    if on_disk:
        store = open_(tmp_path / "file", identity)
        assert os.stat(tmp_path / "file").st_size == 4096 + size(identity, fields)
    assert store.has(torch.arange(6)).tolist() == [True, False, True, False, True, True]
    assert store.marks(slots)[1:2].tolist() == [1]
    for read, written, field in zip(store.read(slots), tensors, fields, strict=True):
        assert read.dtype == written.dtype
        assert torch.equal(read, written)
        assert Field.of(read) == field


def test_an_output_is_written_once(tmp_path):
    identity, fields = Identity("", "", 4, 1), [Field((2,), "float32", (0,))]
    with locked_folder(tmp_path):
        store = create(tmp_path / "file", identity, fields)
    store.write(torch.tensor([1, 2]), torch.tensor([5, 6]), [torch.ones(2, 2)])
    store.write(torch.tensor([2, 3]), torch.tensor([7, 8]), [torch.zeros(2, 2)])
    (read,) = store.read(torch.tensor([1, 2, 3]))
    assert read.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert store.marks(torch.tensor([1, 2, 3])).tolist() == [5, 6, 8]


def test_a_locked_folder_waits(tmp_path):
    order = []

    def second():
        with locked_folder(tmp_path):
            order.append("second")

    with locked_folder(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_without_room_nothing_is_kept_and_numbers_say_why(tmp_path, on_disk):
    model, prefix = frozen()
    cache = neq.PrefixCache(prefix, tmp_path if on_disk else None, limit=479)
    loader = cache.wrap(DataLoader(DATA, BATCH))
    told = r"12 samples in 1 views take 4.8e-07 GB, limit is 4.79e-07 GB; give a higher limit"
    with pytest.warns(UserWarning, match=told):
        model(next(iter(loader)))
    assert "no room" in cache.refusal
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in loader:
            model(x).sum().backward()
    assert (cache.hits, cache.misses) == (0, 1)
    assert not any(tmp_path.iterdir())
    prefix.freeze(2)
    with pytest.warns(UserWarning, match="no room"):  # at another depth it is asked again
        model(next(iter(loader)))
