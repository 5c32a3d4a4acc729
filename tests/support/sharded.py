"""What several processes do with parameters that are divided between them: see ``processes``.

Each trains a model that is fully sharded, and its twin in one piece on the whole batch.
"""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import GPT2Config, GPT2LMHeadModel

import neq
from neq import sharding
from tests.support.layers import Tiny, active_elements, layers_of
from tests.support.ranks import Words

Parameters = dict[str, Tensor]
BATCH = 4  # per process
STEPS = 6


class Perceptron(nn.Sequential):
    """Layers with 7, 3 and 1 neurons: shards are uneven, and some are empty."""

    def __init__(self) -> None:
        layers = nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1)
        super().__init__(*layers)


def tiny() -> nn.Module:
    model = Tiny()
    model.norm = nn.GroupNorm(2, 8)  # a batch norm would see another batch in each process
    return model


def even() -> nn.Module:
    """Torch's LBFGS knows no uneven shards."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def transposed() -> nn.Module:
    """Its neurons lie along two dimensions of the weight."""
    up = nn.ConvTranspose1d(4, 6, 2, groups=2)
    return nn.Sequential(up, nn.Flatten(), nn.Linear(6 * 4, 3))


def gpt2() -> nn.Module:
    """Its weights are stored by column, and the embedding is tied."""
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 6}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts))


MODELS = {
    "tiny": (tiny, lambda n: torch.randn(n, 3, 5, 5)),
    "perceptron": (Perceptron, lambda n: torch.randn(n, 6)),
    "even": (even, lambda n: torch.randn(n, 6)),
    "transposed": (transposed, lambda n: torch.randn(n, 4, 3)),
    "words": (Words, lambda n: torch.randint(9, (n, 4))),
    "gpt2": (gpt2, lambda n: torch.randint(11, (n, 6))),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "LBFGS": torch.optim.LBFGS,
    "Muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=0.01),  # communicates
    "neq SGD": partial(neq.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "neq AdamW": partial(neq.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y).square().flatten(1).sum(1).mean()


def rows_at(step: int, layer: int, neurons: int) -> list[int] | None:
    """All neurons, none, those of the first process, those of the last, or some of them."""
    choices = [None, [], [0], [neurons - 1], list(range(0, neurons, 2))]
    return choices[(step + layer) % len(choices)]


def set_rows(step: int, model: nn.Module) -> None:
    for index, layer in enumerate(layers_of(model)):
        layer.set_active(rows_at(step, index, layer.n_neurons))


def shard(model: nn.Module, **options: object) -> nn.Module:
    """Every second part is a unit of its own, and the rest is one."""
    tied = isinstance(model, Words)
    parts = model.transformer.h if hasattr(model, "transformer") else list(model.children())[::2]
    for part in [] if tied else parts:
        fully_shard(part, **options)
    return fully_shard(model, **options)


def follow(name: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[name](model.parameters())
    if name.startswith("neq"):
        optimizer.follow(model)
    else:
        neq.optim.Guard(optimizer, model)
    return optimizer


def again(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor) -> Tensor:
    """The closure of LBFGS. The loss is that of all processes, on which it decides."""
    optimizer.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    loss = loss.detach()
    if isinstance(model, FSDPModule):
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


def whole(model: nn.Module) -> Parameters:
    return {
        name.replace("_checkpoint_wrapped_module.", ""): sharding.whole(p.detach()).clone()
        for name, p in model.named_parameters()
    }


def compare(twin: nn.Module, before: Parameters, after: Parameters, **tolerances: float) -> None:
    """Parameters after a step are the twin's, and frozen ones keep their bits."""
    for name, theirs in twin.named_parameters():
        layer = twin.get_submodule(name.rpartition(".")[0])
        torch.testing.assert_close(after[name], theirs.detach(), **tolerances)
        if isinstance(layer, neq.NeuronLayer):
            frozen = ~active_elements(layer)[name.rpartition(".")[2]]
            assert torch.equal(after[name][frozen], before[name][frozen])


def train(
    rank: int,
    name: str,
    optimizer: str = "AdamW",
    mesh: tuple[int, ...] = (2,),
    checkpoint: bool = False,
    parts: int = 1,
    compiled: bool = False,
    tolerances: dict[str, float] | None = None,
    **options: object,
) -> None:
    """The same parameters as the twin's, and frozen ones keep their bits.

    Args:
        rank: This process.
        name: Of the model.
        optimizer: Its name.
        mesh: The device mesh; two dimensions replicate and shard.
        checkpoint: Compute the first part again in backward.
        parts: In how many backward passes gradients are accumulated, of which the last is reduced.
        compiled: Compile the model.
        tolerances: Of the comparison with the twin.
        **options: For ``fully_shard``.
    """
    world = dist.get_world_size()
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    twin = neq.convert(make())
    model = copy.deepcopy(twin)
    if checkpoint:
        first, part = next(iter(model.named_children()))
        model.register_module(first, checkpoint_wrapper(part))
    names = [("replicas", "shards"), ("shards",)][len(mesh) == 1]
    shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names), **options)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    optimizers = [follow(optimizer, m) for m in (model, twin)]
    for step in range(STEPS):
        for m in model, twin:
            set_rows(step, m)
        before = whole(model)
        for part in range(parts):
            torch.manual_seed(step * parts + part)
            x = inputs(world * BATCH)
            model.set_requires_gradient_sync(part == parts - 1)
            loss_of(call, x[rank * BATCH : (rank + 1) * BATCH]).backward()
            loss_of(twin, x).backward()
        for one, m in zip(optimizers, (model, twin), strict=True):
            if optimizer == "LBFGS":
                own = x if m is twin else x[rank * BATCH : (rank + 1) * BATCH]
                one.step(partial(again, one, m, own))
            else:
                one.step()
            one.zero_grad()
        compare(twin, before, whole(model), **(tolerances or {}))


def measure(rank: int) -> None:
    """The choice is that of a single process, which has all samples, and holds on every rank."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    twin = tiny()
    model = shard(neq.convert(copy.deepcopy(twin)), mesh=init_device_mesh("cpu", (world,)))
    x = torch.randn(world * BATCH, 3, 5, 5)
    controls = []
    for m, own in (model, x[rank * BATCH : (rank + 1) * BATCH]), (twin, x):
        optimizer = OPTIMIZERS["neq SGD"](m.parameters())
        options = {"optimizer": optimizer, "policy": neq.Equilibrium(share=0.5)}
        if m is twin:  # a single process, as far as it knows
            options["process_group"] = dist.new_group([rank], use_local_synchronization=True)
        control = neq.Controller(m, probe=own, **options)
        for _ in range(3):
            loss_of(m, own).backward()
            optimizer.step()
            optimizer.zero_grad()
            control.step()
        controls.append(control)
    mine, theirs = controls
    for name, group in theirs.layers.items():
        assert torch.equal(mine.layers[name].mask, group.mask), name
    velocities = mine.scores["velocity"], theirs.scores["velocity"]
    torch.testing.assert_close(*velocities, rtol=1e-3, atol=1e-6)  # outputs are kept in bfloat16
    assert 0 < mine.record.frozen_share < 1


def find_what_learns(rank: int, optimizer: str) -> None:
    """The signals of gradients are those of a single process, and what is looked at stays."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    twin = tiny()
    model = shard(neq.convert(copy.deepcopy(twin)), mesh=init_device_mesh("cpu", (world,)))
    batches = torch.randn(4, world * BATCH, 3, 5, 5)
    found, trained = [], []
    for m, part in (model, slice(rank * BATCH, (rank + 1) * BATCH)), (twin, slice(None)):
        stepping = OPTIMIZERS[optimizer](m.parameters())
        policy = neq.HeadFirst(longest=1)
        options = {"optimizer": stepping, "policy": policy, "example_inputs": batches[0]}
        if m is twin:  # a single process, as far as it knows
            options["process_group"] = dist.new_group([rank], use_local_synchronization=True)
        control = neq.Controller(m, **options)
        for phase in ("head", "look", "chosen"):
            assert policy.phase == phase
            before = whole(m)
            for x in batches[:, part]:
                loss_of(m, x).backward()
                stepping.step()
                stepping.zero_grad()
            moved = {name for name, p in whole(m).items() if not torch.equal(p, before[name])}
            if phase != "chosen":
                assert moved == {"head.weight", "head.bias"}
            control.step()
        found.append(torch.tensor([*policy.signals.values()]))
        trained.append(policy._trained)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert trained[0] == trained[1]


def measure_rows(rank: int) -> None:
    """A row is measured whole, though it lies in one process."""
    torch.manual_seed(0)
    model = shard(neq.convert(Words(sparse=True)), mesh=init_device_mesh("cpu", (2,)))
    policy = neq.Equilibrium()
    control = neq.Controller(model, optimizer=(), probe=torch.arange(4).view(1, 4), policy=policy)
    with torch.no_grad():
        own = model.words.weight.to_local()  # [5, 6] or [4, 6]
        if rank == 0:
            own[3] *= -1
    control.step()
    assert model.words.active_rows.tolist() == [3]


def train_columns(rank: int, optimizer: str) -> None:
    """Tensor parallelism: of the first layer the neurons are divided, of the last their inputs."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 4), nn.Linear(4, 2)
    twin = neq.convert(nn.Sequential(*layers))
    model = copy.deepcopy(twin)
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "3": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    optimizers = [follow(optimizer, m) for m in (model, twin)]
    for step in range(STEPS):
        before = whole(model)
        x = torch.randn(BATCH, 6)
        for m, one in zip((model, twin), optimizers, strict=True):
            set_rows(step, m)
            loss_of(m, x).backward()
            one.step()
            one.zero_grad()
        compare(twin, before, whole(model))


def measure_columns(rank: int) -> None:
    """Each process has the outputs of half of the neurons."""
    torch.manual_seed(0)
    twin = neq.convert(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
    model = copy.deepcopy(twin)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(BATCH, 6)
    masks = []
    for m in model, twin:
        optimizer = OPTIMIZERS["neq SGD"](m.parameters())
        control = neq.Controller(m, optimizer=optimizer, probe=x, policy=neq.LowestVelocity(0.5))
        for _ in range(3):
            loss_of(m, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            control.step()
        masks.append(control.layers["0"].mask)
    assert masks[0].sum() == 4
    assert torch.equal(*masks)


def refuse(rank: int) -> None:
    """What can't be done says why."""
    mesh = init_device_mesh("cpu", (2,))
    words = neq.convert(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)))
    parallelize_module(words, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    words[0].set_active([1])
    with pytest.raises(TypeError, match=r"NEqEmbedding '0': .* no process knows which entries"):
        words(torch.arange(4))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "columns"))
    model = neq.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    parallelize_module(model, both["columns"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=both["data"])
    optimizer = follow("SGD", model)
    model[0].set_active([1])
    with pytest.raises(ValueError, match=r"layer '0': its weight is divided .* one kind of para"):
        optimizer.step()
    model = shard(neq.convert(Perceptron()), mesh=mesh)
    options = {"optimizer": (), "probe": torch.randn(4, 6)}
    with pytest.raises(ValueError, match="no place to cut: its parameters are divided"):
        neq.Controller(model, policy=neq.BottomUp(), **options)
    for unit in "ms", "step_ms":
        policy = neq.Budget(share=0.5, unit=unit)
        with pytest.raises(ValueError, match=f'costs in {unit} can.t be timed.*count "flops"'):
            neq.Controller(model, policy=policy, **options).step()
    late = fully_shard(nn.Linear(6, 2), mesh=mesh)
    neq.convert(late)
    assert "convert it before fully_shard" in str(neq.summary(nn.Sequential(late)))


ROUGH = {"rtol": 0.05, "atol": 0.02}
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
HOST = CPUOffloadPolicy(pin_memory=False)  # only a GPU pins
EXACT = "SGD", "AdamW", "neq SGD", "neq AdamW"
SCENARIOS = {
    2: {
        **{f"{model}": partial(train, name=model) for model in MODELS},
        **{f"tiny, {one}": partial(train, name="tiny", optimizer=one) for one in EXACT},
        **{f"perceptron, {one}": partial(train, name="perceptron", optimizer=one) for one in EXACT},
        "tiny, Muon": partial(train, name="tiny", optimizer="Muon", tolerances=ROUGH),
        "even, LBFGS": partial(train, name="even", optimizer="LBFGS", tolerances=ROUGH),
        "kept whole after forward": partial(train, name="tiny", reshard_after_forward=False),
        "divided after forward": partial(train, name="gpt2", reshard_after_forward=True),
        "mixed precision": partial(train, name="tiny", mp_policy=HALF, tolerances=ROUGH),
        **{
            f"offloaded, {one}": partial(train, name="tiny", optimizer=one, offload_policy=HOST)
            for one in EXACT
        },
        "checkpoint": partial(train, name="tiny", checkpoint=True),
        "gradient accumulation": partial(train, name="tiny", parts=2),
        "compiled": partial(train, name="tiny", compiled=True),
        **{f"columns, {one}": partial(train_columns, optimizer=one) for one in EXACT},
        "columns measured": measure_columns,
        "refused": refuse,
        "measured": measure,
        **{f"{one}, head first": partial(find_what_learns, optimizer=one) for one in EXACT},
        "rows measured": measure_rows,
    },
    4: {
        **{f"four, {model}": partial(train, name=model, mesh=(4,)) for model in MODELS},
        "four, by rows": partial(train, name="perceptron", optimizer="neq AdamW", mesh=(4,)),
        **{f"replicas, {model}": partial(train, name=model, mesh=(2, 2)) for model in MODELS},
        "replicas, by rows": partial(train, name="gpt2", optimizer="neq AdamW", mesh=(2, 2)),
        "measured": measure,
    },
}
