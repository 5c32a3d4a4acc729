"""What two processes do under DDP: see ``processes``."""

import copy
import os
import tempfile
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import neq
from neq.prefix.paying import Costs
from neq_kernels.wgrad import planner
from tests.support import cached
from tests.support.layers import Tiny, active_elements, layers_of

WORLD = 2
BATCH = 4  # per process


def model_and_twin() -> tuple[nn.Module, nn.Module]:
    """A model to be trained by all processes, and the plain one that each trains by itself."""
    torch.manual_seed(0)
    plain = Tiny()
    plain.norm = nn.GroupNorm(2, 8)  # a batch norm would see another batch in each process
    return neq.convert(copy.deepcopy(plain)), plain


def schedule(step: int, layer: int, neurons: int) -> list[int] | None:
    """Some of the neurons, all, none; every layer at another time."""
    phase = (step + layer) % 4
    if phase == 0:
        return None
    if phase == 1:
        return []
    generator = torch.Generator().manual_seed(step * 100 + layer)
    return torch.randperm(neurons, generator=generator)[: neurons // 2].tolist()


def train(rank: int, compiled: bool = False, **options: object) -> None:
    """Every step's gradients equal those of a plain model on the whole batch, frozen rows zero."""
    model, plain = model_and_twin()
    parallel = DistributedDataParallel(model, **options)
    call = torch.compile(parallel, backend="aot_eager") if compiled else parallel
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain)]
    for step in range(6):
        for index, layer in enumerate(layers_of(model)):
            none = step == 3 and layer is not model.head
            layer.set_active([] if none else schedule(step, index, layer.n_neurons))
        torch.manual_seed(step)
        x = torch.randn(WORLD * BATCH, 3, 5, 5)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        call(x[rank * BATCH : (rank + 1) * BATCH]).square().sum(1).mean().backward()
        plain(x).square().sum(1).mean().backward()
        for name, layer in model.named_modules():
            if not isinstance(layer, neq.NeuronLayer):
                continue
            for key, active in active_elements(layer).items():
                mine, twin = getattr(layer, key), getattr(plain.get_submodule(name), key)
                twin.grad *= active
                grad = torch.zeros_like(mine) if mine.grad is None else mine.grad
                torch.testing.assert_close(grad, twin.grad, msg=f"{name}.{key} at step {step}")
                assert not grad[~active].any()
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def train_by_rows(rank: int) -> None:
    """For layers as small as these the planner would take the joint backward throughout."""

    with planner.only("pack"):
        train(rank)
        assert "pack" in planner._choices.values()


class Words(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 6, sparse=sparse), nn.Embedding(4, 6)
        self.head = nn.Linear(6, 9, bias=False)
        if not sparse:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))


def look_up(rank: int, sparse: bool = False, **options: object) -> None:
    """Embeddings, of which some, all or no entries train; one is tied, or its gradient sparse."""
    torch.manual_seed(0)
    plain = Words(sparse)
    model = neq.convert(copy.deepcopy(plain))
    parallel = DistributedDataParallel(model, **options)
    tokens = torch.randint(9, (WORLD * BATCH, 4))
    for rows in [0, 2, 5], [], None, [1]:
        for m in model, plain:
            m.zero_grad()
        model.words.set_active(rows)
        model.places.set_active(rows and rows[:1])
        parallel(tokens[rank * BATCH : (rank + 1) * BATCH]).square().sum((1, 2)).mean().backward()
        plain(tokens).square().sum((1, 2)).mean().backward()
        for name in "words", "places":
            layer, theirs = model.get_submodule(name), plain.get_submodule(name).weight.grad
            mine = layer.weight.grad.to_dense()
            torch.testing.assert_close(mine, theirs.to_dense() * layer.active_mask[:, None])


def accumulate(rank: int) -> None:
    """no_sync: two backward passes, of which the second is reduced."""
    model, plain = model_and_twin()
    parallel = DistributedDataParallel(model)
    for layer in layers_of(model):
        layer.set_active([0])
    model.conv.set_active([])
    x = torch.randn(2, WORLD * BATCH, 3, 5, 5)
    for part in 0, 1:
        with parallel.no_sync() if part == 0 else nullcontext():
            parallel(x[part, rank * BATCH : (rank + 1) * BATCH]).square().sum(1).mean().backward()
        plain(x[part]).square().sum(1).mean().backward()
    for name in "up", "head":
        mine, theirs = model.get_submodule(name).bias.grad, plain.get_submodule(name).bias.grad
        torch.testing.assert_close(mine[0], theirs[0])
        assert not mine[1:].any()


def tune(rank: int) -> None:
    """Ranks that time for themselves would come to differ, so none of them may."""
    model, _ = model_and_twin()
    model.hidden.set_active([0])
    in_ranks = rf"tuning\(\) in one of {WORLD} ranks.*planner.save\(path\).*planner.load\(path\)"
    with pytest.raises(RuntimeError, match=in_ranks), planner.tuning():
        pass
    planner._choices.clear()
    with mock.patch.object(planner, "_tuning", True):  # since before there were ranks
        loss = model(torch.randn(BATCH, 3, 5, 5)).square().mean()
        with pytest.raises(RuntimeError, match=in_ranks):
            loss.backward()


def pays(costs: Costs) -> None:
    """Not true of a network as small as this."""


@mock.patch.object(Costs, "refusal", new=pays)
def share_a_cache(rank: int) -> None:
    """Each rank reads what the others have computed, though samples are dealt out anew."""
    data, folder = cached.images(24), [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    losses = []
    for with_cache in False, True:
        model, prefix = cached.frozen()
        sampler = DistributedSampler(data, WORLD, rank)
        loader = cached.loader_of(data, sampler=sampler)
        if with_cache:
            cache = neq.PrefixCache(prefix, folder[0])
            loader = cache.wrap(loader)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            dist.barrier()  # for the other rank to have written what this one reads
            losses += [cached.step(parallel, optimizer, x, y) for x, y in loader]
    torch.testing.assert_close(losses[:8], losses[8:])
    assert (cache.hits, cache.misses) == (6, 2)
    dist.barrier()
    prefix.freeze(0)
    dist.barrier()
    assert not os.listdir(folder[0])


def regularise(rank: int) -> None:
    """Every rank decays by the sensitivities on the samples of all."""
    for kind, *options in (
        (neq.LOBSTER,),
        (neq.NeuronLOBSTER,),
        *((neq.SeReNe, kind) for kind in ("lower-bound", "full", "local")),
    ):
        models = model_and_twin()
        for model in models:
            parallel = model is models[0]
            call = DistributedDataParallel(model) if parallel else model
            optimizer = torch.optim.SGD(call.parameters(), lr=0.05)
            alone = {"process_group": dist.new_group([rank], use_local_synchronization=True)}
            group = alone if kind is neq.SeReNe and not parallel else {}
            regulariser = kind(call, optimizer, 0.25, *options, **group)
            for step in range(2):
                torch.manual_seed(step)
                x = torch.randn(WORLD * BATCH, 3, 5, 5)
                output = call(x[rank * BATCH : (rank + 1) * BATCH] if parallel else x)
                if kind is neq.SeReNe:
                    regulariser.observe(output)
                optimizer.zero_grad()
                output.square().sum(1).mean().backward()
                optimizer.step()
        for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(mine, theirs, msg=f"{kind.__name__} {options}")


def entropy(rank: int) -> None:
    """The counts of all ranks, also of a class that only one of them has seen."""
    model, _ = model_and_twin()
    torch.manual_seed(0)
    x, labels = torch.randn(6, 3, 5, 5), torch.tensor([0, 0, 1, 0, 1, 2])
    mine = slice(3 * rank, 3 * rank + 3)
    found = neq.psp_entropy(model, [(x[mine], labels[mine])])
    alone = dist.new_group([rank], use_local_synchronization=True)
    whole = neq.psp_entropy(model, [(x, labels)], process_group=alone)
    assert all(torch.equal(found[name], bits) for name, bits in whole.items())


def train_spectral(rank: int) -> None:
    """Eigenvalues, and what neurons share, get the gradients of the whole batch."""
    for kind in "two", "one", "svd", "qr":
        _, plain = model_and_twin()
        plain = neq.spectral.convert(plain, kind=kind)
        model = copy.deepcopy(plain)
        spectral = [
            [m for m in some.modules() if isinstance(m, neq.spectral.layers.SpectralLayer)]
            for some in (model, plain)
        ]
        parallel = DistributedDataParallel(model)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, plain)]
        for step in range(5):
            for index, twins in enumerate(zip(*spectral, strict=True)):
                for layer in twins:
                    layer.set_active(schedule(step, index, layer.n_neurons))
            torch.manual_seed(step)
            x = torch.randn(WORLD * BATCH, 3, 5, 5)
            for optimizer in optimizers:
                optimizer.zero_grad()
            parallel(x[rank * BATCH : (rank + 1) * BATCH]).square().sum(1).mean().backward()
            plain(x).square().sum(1).mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            for (name, mine), theirs in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                torch.testing.assert_close(mine, theirs, msg=f"{kind}, {name} at step {step}")


def prune(rank: int) -> None:
    """Ranks prune alike, by the mean of their losses, as a single process does by all samples."""
    models = model_and_twin()
    alone = dist.new_group([rank], use_local_synchronization=True)
    torch.manual_seed(0)
    x = torch.randn(WORLD * BATCH, 3, 5, 5)
    for model, part, group in (
        (models[0], x[rank * BATCH : (rank + 1) * BATCH], None),
        (models[1], x, alone),
    ):
        call = model if group else DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def loss(m: nn.Module, part: Tensor = part) -> Tensor:
            return m(part).square().sum(1).mean()

        pruning = neq.prune.Gradual(call, loss, optimizer=optimizer, twt=0.2, process_group=group)
        for _ in range(2):
            optimizer.zero_grad()
            loss(call).backward()
            optimizer.step()
            assert pruning.step().plateau
    assert pruning.zeros.sparsity > 0.1
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert torch.equal(mine == 0, theirs == 0)


def train_compact(rank: int, **options: object) -> None:
    """The weights of a masked model that a single process trains on the whole batch."""
    model, plain = model_and_twin()
    masked = neq.convert(plain)
    rows = [range(layer.n_neurons // 2) for layer in layers_of(model)]
    for layer, active in zip(layers_of(model), rows, strict=True):
        layer.set_active(active)
    neq.compact(model, capacity=0.5, leave_alone=())
    parallel = DistributedDataParallel(model, **options)
    traffic = sum(p.numel() for p in model.parameters())
    assert traffic < 0.6 * sum(p.numel() for p in masked.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, masked)]
    neq.optim.Guard(optimizers[1], masked, on_thaw="reset")
    for step in range(5):
        for index, pair in enumerate(zip(layers_of(model), layers_of(masked), strict=True)):
            n = pair[0].n_neurons
            generator = torch.Generator().manual_seed(step // 2 * 100 + index)
            few = torch.randperm(n, generator=generator)[: 0 if index == step else n // 2]
            for layer in pair:
                layer.set_active(few)
        torch.manual_seed(step)
        x = torch.randn(WORLD * BATCH, 3, 5, 5)
        for optimizer in optimizers:
            optimizer.zero_grad()
        parallel(x[rank * BATCH : (rank + 1) * BATCH]).square().sum(1).mean().backward()
        masked(x).square().sum(1).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    state = masked.state_dict()
    for name, values in model.state_dict().items():
        torch.testing.assert_close(values, state[name], msg=name)
    with pytest.raises(ValueError, match="'hidden': 16 active neurons need leaves of 16 rows, and"):
        model.hidden.set_active(None)


def shard_compact(rank: int) -> None:
    """What exchanges parameters is refused, before the model is compact and after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, other = model_and_twin()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(TypeError, match=r"layer 'conv': its weight is split between processes"):
        neq.compact(model)
    for layer in layers_of(neq.convert(other)):
        layer.set_active([0, 1])
    fully_shard(neq.compact(other), mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(TypeError, match=r"exchange or flatten .*fully_shard takes the masked form"):
        other(torch.randn(BATCH, 3, 5, 5))
    with pytest.raises(TypeError, match=r"exchange or flatten .*fully_shard takes the masked form"):
        neq.Controller(other, optimizer=(), policy=neq.Random(0.1))


def flatten_compact(rank: int, use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, _ = model_and_twin()
    for layer in layers_of(neq.convert(model)):
        layer.set_active([0, 1])
    parallel = FullyShardedDataParallel(
        neq.compact(model), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    with pytest.raises(TypeError, match="no wrapper may exchange or flatten parameters"):
        parallel(torch.randn(BATCH, 3, 5, 5))


SCENARIOS = {
    2: {
        "plain": train,
        "by rows": train_by_rows,
        "static_graph": partial(train, static_graph=True),
        "gradient_as_bucket_view": partial(train, gradient_as_bucket_view=True),
        "many buckets": partial(train, bucket_cap_mb=0.0001),
        "compiled": partial(train, compiled=True),
        "embeddings": look_up,
        "embeddings, static_graph": partial(look_up, static_graph=True),
        "sparse embeddings": partial(look_up, sparse=True),
        "gradient accumulation": accumulate,
        "regularisers": regularise,
        "entropy": entropy,
        "spectral": train_spectral,
        "pruning": prune,
        "tuning": tune,
        "cache of a prefix": share_a_cache,
        "compact": train_compact,
        "compact, static_graph": partial(train_compact, static_graph=True),
        "compact, fully_shard": shard_compact,
        "compact, FSDP1": partial(flatten_compact, use_orig_params=False),
        "compact, FSDP1, use_orig_params": partial(flatten_compact, use_orig_params=True),
    }
}
