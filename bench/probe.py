"""The cost of measuring the neurons beside training, and how often a sketch picks the same ones.

    python bench/probe.py                   # made-up images
    python bench/probe.py --data FOLDER     # images by class, FOLDER/<class>/*.jpg: CIFAR-10, say

A ResNet-32 trains on 32x32 images with all neurons active. One Controller per memory watches a
copy of it, and notes which neurons it would freeze.

Then two policies that freeze a prefix decide for a network that trains: how long measuring,
deciding and freezing take. The first time is apart: ``Budget(unit="step_ms")`` then measures steps.

Then two operations that only move bytes are timed in turns with a copy: ``neq::row_similarity`` of
two outputs of a larger layer, and ``pack_columns`` of gradients of the same sizes, samples by
neurons, with their sums. The first reads two outputs, as many bytes as a copy moves. The second
reads all of dY and writes the packed columns.

    of copy    the bytes per second of either operation, as a share of the copy's
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import cache_bytes, interleave
from neq_kernels import row_similarity
from neq_kernels.wgrad.columns import pack_columns

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
BATCH, SAMPLES, CLASSES, IMAGES = 100, 50, 10, 50_000
MEMORIES = ("device", "host", "sketch")
OUTPUTS = {  # of one sample, neurons first
    "resnet50/layer1": (256, 56, 56),
    "resnet50/layer4": (2048, 7, 7),
    "swin-b/stage1": (128, 56, 56),
    "gpt2/mlp": (3072, 256),
}
DECIDING: dict[str, Callable[[], neq.Policy]] = {
    "BottomUp": neq.BottomUp,
    "Budget of step_ms": lambda: neq.Budget(share=0.75, unit="step_ms"),
}
ACTIVE = (0.5, 0.25)  # below, packing no longer has to read all of dY


class Watching(neq.Equilibrium):
    """Freezes no neuron; ``frozen`` are those that it would freeze."""

    def choose(self, layers: Sequence[neq.Motion], epoch: int) -> list[None]:
        self.frozen = ~torch.cat(
            [self._active(layer.velocity.abs(), layer.active) for layer in layers]
        )
        return [None] * len(layers)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = environment(given.device)
    results.show_environment(facts)
    measured = measure(given)
    results.save(measured, facts, given.json)  # the next part may be cut off
    results.show_table(table(measured))
    decided = [decide(name, given) for name in DECIDING]
    results.save(measured + decided, facts, given.json)
    results.show_table(beside_step(decided))
    compared = compare(given.device, given.seconds)
    results.show_table(beside_copy(compared, "compare"))
    packed = pack(given.device, given.seconds)
    results.show_table(beside_copy(packed, "pack"))
    compares, packs = (median(r["of_copy"] for r in some) for some in (compared, packed))
    slowest = max(decided, key=lambda r: r["share_of_epoch"])
    worst = max(measured, key=lambda r: r["share_of_epoch"])
    print(
        f"measuring on {SAMPLES} samples takes at most {worst['share_of_epoch']:.2%} of "
        f"an epoch of {IMAGES} images; a sketch and all outputs agree on "
        f"{measured[-1]['agreement']:.2%} of those frozen; "
        f"measuring, deciding and freezing by {slowest['policy']} takes "
        f"{slowest['share_of_epoch']:.2%}; comparing outputs runs at "
        f"{compares:.0%} of a copy's bandwidth, packing at {packs:.0%}"
    )
    results.save([*measured, *decided, *compared, *packed], facts, given.json)


def start(given: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A ResNet-32, images and labels."""
    torch.manual_seed(0)
    images, labels = made_up() if given.data is None else from_folder(given.data)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [5, 5, 5]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=CLASSES)
    model = ResNetForImageClassification(config).to(given.device)
    return model, images.to(given.device), labels.to(given.device)


def step_seconds(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    """What a step on a random batch takes."""
    began = time.perf_counter()
    chosen = torch.randint(len(images), (BATCH,), device=images.device)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[chosen]).logits, labels[chosen])
    loss.backward()
    optimizer.step()
    loss.item()
    return time.perf_counter() - began


def measure(given: argparse.Namespace) -> list[Result]:
    model, images, labels = start(given)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    probe = images[:SAMPLES]
    watching = {"probe": probe, "optimizer": ()}
    controllers = [  # each of a copy, since a model's layers have one Controller
        neq.Controller(copy.deepcopy(model), policy=Watching(given.eps), memory=memory, **watching)
        for memory in MEMORIES
    ]
    training = images[SAMPLES:], labels[SAMPLES:]
    steps: list[float] = []
    probes: dict[str, list[float]] = {memory: [] for memory in MEMORIES}
    frozen: dict[str, list[Tensor]] = {memory: [] for memory in MEMORIES}
    for epoch in range(given.epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if epoch < given.epochs // 2 else 0.01
        for _ in range(given.steps):
            steps.append(step_seconds(model, optimizer, *training))
        for memory, control in zip(MEMORIES, controllers, strict=True):
            control.model.load_state_dict(model.state_dict())
            probes[memory].append(control.step().probe_seconds)
            frozen[memory].append(control.policy.frozen)
    epoch_seconds = median(steps) * IMAGES / BATCH
    masks = {memory: torch.stack(frozen[memory]) for memory in MEMORIES}
    return [
        {
            "memory": memory,
            "probe_ms": 1e3 * median(probes[memory]),
            "step_ms": 1e3 * median(steps),
            "share_of_epoch": median(probes[memory]) / epoch_seconds,
            "frozen": float(masks[memory].double().mean()),
            "agreement": agreement(masks[memory], masks["device"]),
        }
        for memory in MEMORIES
    ]


def decide(name: str, given: argparse.Namespace) -> Result:
    """What a policy takes for one decision, beside a step in which everything trains."""
    model, images, labels = start(given)
    optimizer = neq.optim.SGD(model.parameters(), **SGD)
    control = neq.Controller(
        model,
        optimizer=optimizer,
        probe=images[:SAMPLES],
        example_inputs=images[:BATCH],
        policy=DECIDING[name](),
    )
    steps: list[float] = []
    for epoch in range(given.epochs):
        for _ in range(given.steps):
            seconds = step_seconds(model, optimizer, images[SAMPLES:], labels[SAMPLES:])
            steps += [seconds] * (epoch == 0)  # before anything is frozen
        control.step()
    taken = [record.probe_seconds for record in control.history.records]
    return {
        "policy": name,
        "first_ms": 1e3 * taken[0],
        "decision_ms": 1e3 * median(taken[1:]),
        "step_ms": 1e3 * median(steps),
        "share_of_epoch": median(taken[1:]) / (median(steps) * IMAGES / BATCH),
        "frozen_blocks": control.prefix.depth,
        "blocks": len(control.prefix.blocks),
    }


def beside_step(decided: list[Result]) -> Table:
    figures = "first ms", "then ms", "step ms", "of an epoch", "frozen blocks"
    out = results.new_table(("policy",), figures)
    for r in decided:
        times = (f"{r[key]:.1f}" for key in ("first_ms", "decision_ms", "step_ms"))
        blocks = f"{r['frozen_blocks']} of {r['blocks']}"
        out.add_row(r["policy"], *times, f"{r['share_of_epoch']:.2%}", blocks)
    return out


def compare(device: torch.device, seconds: float) -> list[Result]:
    return [
        compare_one(name, last, device, seconds) for name, last in product(OUTPUTS, (False, True))
    ]


def compare_one(name: str, neurons_last: bool, device: torch.device, seconds: float) -> Result:
    """``row_similarity`` of two outputs."""
    neurons, *positions = OUTPUTS[name]
    shape = (SAMPLES, *positions, neurons) if neurons_last else (SAMPLES, neurons, *positions)
    dim = len(positions) + 1 if neurons_last else 1
    y = beyond_caches(shape, device)
    times = in_turns_with_copy(
        "compare", lambda i: row_similarity(y[i], y[i - 1], dim, False), y, 2, seconds
    )
    return {"output": name, "neurons": "last" if neurons_last else "first", **times}


def pack(device: torch.device, seconds: float) -> list[Result]:
    return [pack_one(name, share, device, seconds) for name, share in product(OUTPUTS, ACTIVE)]


def pack_one(name: str, share: float, device: torch.device, seconds: float) -> Result:
    """``pack_columns``, with the sums for a bias, of a share of random neurons."""
    neurons, *positions = OUTPUTS[name]
    dy = beyond_caches((SAMPLES * prod(positions), neurons), device)
    rows = torch.randperm(neurons)[: round(share * neurons)].sort().values.to(device)
    moved = 1 + len(rows) / neurons
    times = in_turns_with_copy(
        "pack", lambda i: pack_columns(dy[i], rows, True), dy, moved, seconds
    )
    return {"output": name, "neurons": f"{share:.3g} active", **times}


def beyond_caches(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[sets, *shape] in bfloat16, so many sets that no cache holds one when its turn comes."""
    sets = 2 + cache_bytes(device) // (2 * prod(shape))
    return torch.randn(sets, *shape, device=device, dtype=torch.bfloat16)


def in_turns_with_copy(
    name: str, call: Callable[[int], object], y: Tensor, moved: float, seconds: float
) -> Result:
    """``call`` gets an index into ``y`` [sets, ...] and moves ``moved`` times that set's bytes."""
    copy = torch.empty_like(y[0])
    calls = {"call": lambda i: call(i % len(y)), "copy": lambda i: copy.copy_(y[i % len(y)])}
    times = interleave(calls, y.device, seconds)
    taken, copied = times["call"].p50, times["copy"].p50
    megabytes = 1e-6 * moved * copy.nbytes
    return {
        "megabytes": megabytes,
        f"{name}_ms": taken,
        "copy_ms": copied,
        "gigabytes_per_second": megabytes / taken,
        "of_copy": moved / 2 * copied / taken,
    }


def beside_copy(found: list[Result], name: str) -> Table:
    figures = "MB", f"{name} ms", "copy ms", "GB/s", "of copy"
    out = results.new_table(("output", "neurons"), figures)
    for r in found:
        times = (f"{r[key]:.3f}" for key in (f"{name}_ms", "copy_ms"))
        speeds = f"{r['gigabytes_per_second']:.0f}", f"{r['of_copy']:.0%}"
        out.add_row(r["output"], r["neurons"], f"{r['megabytes']:.0f}", *times, *speeds)
    return out


def agreement(frozen: Tensor, others: Tensor) -> float:
    """The share of the neurons frozen by either that both freeze; 1 if neither freezes any."""
    either = int((frozen | others).sum())
    return int((frozen & others).sum()) / either if either else 1.0


def made_up() -> tuple[Tensor, Tensor]:
    """Noisy copies of one smooth pattern per class."""
    labels = torch.arange(2000) % CLASSES
    patterns = F.interpolate(torch.randn(CLASSES, 3, 4, 4), size=32, mode="bilinear")
    return patterns[labels] + torch.randn(len(labels), 3, 32, 32), labels


def from_folder(folder: Path, per_class: int = 500) -> tuple[Tensor, Tensor]:
    from PIL import Image

    classes = sorted(path for path in folder.iterdir() if path.is_dir())[:CLASSES]
    files = [sorted(path.iterdir())[:per_class] for path in classes]
    pairs = [
        (file, label) for group in zip(*files, strict=False) for label, file in enumerate(group)
    ]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in pairs])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    images = (images - images.mean()) / images.std()
    return images.contiguous(), torch.tensor([label for _, label in pairs])


def table(measured: list[Result]) -> Table:
    figures = "probe ms", "step ms", "of an epoch", "frozen", "same frozen"
    out = results.new_table(("memory",), figures)
    for r in measured:
        times = f"{r['probe_ms']:.1f}", f"{r['step_ms']:.1f}"
        shares = f"{r['share_of_epoch']:.2%}", f"{r['frozen']:.1%}", f"{r['agreement']:.2%}"
        out.add_row(r["memory"], *times, *shares)
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of images by class")
    cli.add_device(parser, "cpu")
    parser.add_argument("--epochs", type=int, default=10, help="at least 2")
    parser.add_argument("--steps", type=int, default=10, help="per epoch")
    parser.add_argument("--eps", type=float, default=1e-2)
    cli.add_seconds(parser, 1, "kind of output")
    cli.add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
