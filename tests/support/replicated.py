"""Several processes with copies of a model, or with columns of its layers: see ``processes``.

Each trains a model and its twin, which a single process would train on the whole batch.
"""

import copy
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import neq
from tests.support.sharded import BATCH, MODELS, STEPS, compare, follow, loss_of, set_rows, whole


def llama() -> nn.Module:
    """All of its matrices are Linear."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 11}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def uneven() -> nn.Module:
    """Of four processes some have fewer neurons of a layer than others, or none."""
    layers = nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 4)
    return nn.Sequential(*layers)


def convolution() -> nn.Module:
    """Its channels are whole, and the neurons of what follows are divided."""
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(6, 4))


def normalised() -> nn.Module:
    """Each process sees the whole batch."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def copies(model: nn.Module, sends: bool) -> nn.Module:
    """Under DDP, which sends the gradients of all rows, or of active ones only."""
    ddp = DistributedDataParallel(model)
    if sends:
        neq.distributed.send_active_rows(ddp)
    return ddp


def columns(model: nn.Module) -> nn.Module:
    """Under tensor parallelism: the neurons of each Linear are divided."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in linear}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


WAYS = {
    "copies": partial(copies, sends=False),
    "copies, active rows sent": partial(copies, sends=True),
    "columns": columns,
}
COLUMNS = {  # with a neuron for each process: else torch itself can't step
    "llama": (llama, lambda n: torch.randint(11, (n, 6))),
    "uneven": (uneven, lambda n: torch.randn(n, 6)),
    "convolution": (convolution, lambda n: torch.randn(n, 3, 5, 5)),
    "normalised": (normalised, lambda n: torch.randn(n, 6)),
    "embedded": (embedded, lambda n: torch.randint(9, (n, 4))),
}


def train(rank: int, way: str, name: str, optimizer: str = "AdamW") -> None:
    """The same parameters as the twin's, and frozen ones keep their bits.

    Args:
        rank: This process.
        way: To train on several processes.
        name: Of the model.
        optimizer: Its name.
    """
    torch.manual_seed(0)
    make, inputs = {**MODELS, **COLUMNS}[name]
    twin = neq.convert(make())
    model = copy.deepcopy(twin)
    parallel = WAYS[way](model)
    optimizers = [follow(optimizer, m) for m in (model, twin)]
    for step in range(STEPS):
        for m in model, twin:
            set_rows(step, m)
        before = whole(model)
        x = inputs(dist.get_world_size() * BATCH)
        own = x if way == "columns" else x[rank * BATCH : (rank + 1) * BATCH]
        loss_of(parallel, own).backward()
        loss_of(twin, x).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
        compare(twin, before, whole(model))


EVERY = {
    f"{way}, {name}": partial(train, way=way, name=name)
    for way in WAYS
    for name in (COLUMNS if way == "columns" else MODELS)
}
BY_ROWS = {
    f"{way}, by rows": partial(train, way=way, name="uneven", optimizer="neq SGD") for way in WAYS
}
SCENARIOS = dict.fromkeys((2, 4), EVERY | BY_ROWS)
