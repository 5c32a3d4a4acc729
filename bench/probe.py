"""What measuring costs beside training, and how often a sketch picks the same neurons.

    python bench/probe.py                   # made-up images
    python bench/probe.py --data FOLDER     # images by class, FOLDER/<class>/*.jpg: CIFAR-10, say

A ResNet-32 trains on 32x32 images, everything, while one Controller per memory watches and says
whom it would freeze. Then outputs of larger layers are compared, and gradients of the same sizes
packed, samples by neurons, as ``pack`` does before a product: what else only moves bytes. Each is
timed in turns with a copy, which moves as many bytes as reading two outputs does:

    of copy    the bytes per second of ``neq::row_similarity``, or of packing active columns with
               their sums (all of dY read, the packed columns written), as a share of the copy's
"""

import argparse
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
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, wgrad_report
from bench.lib.timing import cache_bytes, environment, interleave
from neq_kernels import row_similarity
from neq_kernels.wgrad.columns import pack_columns

BATCH, SAMPLES, CLASSES, IMAGES = 100, 50, 10, 50_000
MEMORIES = ("device", "host", "sketch")
OUTPUTS = {  # of one sample, neurons first
    "resnet50/layer1": (256, 56, 56),
    "resnet50/layer4": (2048, 7, 7),
    "swin-b/stage1": (128, 56, 56),
    "gpt2/mlp": (3072, 256),
}
ACTIVE = (0.5, 0.25)  # below, packing no longer has to read all of dY


class Watching(neq.Equilibrium):
    """Keeps what it would choose to itself."""

    def choose(self, layers: Sequence[neq.Motion], epoch: int) -> list[None]:
        self.frozen = ~torch.cat([self._active(layer) for layer in layers])
        return [None] * len(layers)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)

    facts = environment(given.device)
    wgrad_report.show_environment(facts)
    rows = measure(given)
    wgrad_report.save(rows, facts, given.json)  # should what follows be cut off
    wgrad_report.show_table(table(rows))
    compared = compare(given.device, given.seconds)
    wgrad_report.show_table(beside_copy(compared, "compare"))
    packed = pack(given.device, given.seconds)
    wgrad_report.show_table(beside_copy(packed, "pack"))
    compares, packs = (median(float(row["of_copy"]) for row in some) for some in (compared, packed))
    worst = max(rows, key=lambda row: row["share_of_epoch"])
    print(
        f"measuring on {SAMPLES} samples takes at most {worst['share_of_epoch']:.2%} of "
        f"an epoch of {IMAGES} images; a sketch and all outputs agree on "
        f"{rows[-1]['agreement']:.2%} of those frozen; comparing outputs runs at "
        f"{compares:.0%} of a copy's bandwidth, packing at {packs:.0%}"
    )
    wgrad_report.save([*rows, *compared, *packed], facts, given.json)


def measure(given: argparse.Namespace) -> list[dict[str, float | str]]:
    torch.manual_seed(0)
    images, labels = made_up() if given.data is None else from_folder(given.data)
    images, labels = images.to(given.device), labels.to(given.device)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[5, 5, 5], layer_type="basic",
        num_labels=CLASSES,
    )  # fmt: skip
    model = ResNetForImageClassification(config).to(given.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    controllers = [
        neq.Controller(
            model,
            probe=images[:SAMPLES],
            policy=Watching(given.eps),
            optimizer=(),
            memory=memory,
        )
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
            start = time.perf_counter()
            chosen = torch.randint(len(training[0]), (BATCH,), device=given.device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(training[0][chosen]).logits, training[1][chosen])
            loss.backward()
            optimizer.step()
            loss.item()
            steps.append(time.perf_counter() - start)
        for memory, control in zip(MEMORIES, controllers, strict=True):
            probes[memory].append(control.step().probe_seconds)
            frozen[memory].append(control.policy.frozen)
    epoch_seconds = median(steps) * IMAGES / BATCH
    rows: list[dict[str, float | str]] = []
    for memory in MEMORIES:
        masks, all_outputs = torch.stack(frozen[memory]), torch.stack(frozen["device"])
        rows.append(
            {
                "memory": memory,
                "probe_ms": 1e3 * median(probes[memory]),
                "step_ms": 1e3 * median(steps),
                "share_of_epoch": median(probes[memory]) / epoch_seconds,
                "frozen": float(masks.double().mean()),
                "agreement": agreement(masks, all_outputs),
            }
        )
    return rows


def compare(device: torch.device, seconds: float) -> list[dict[str, float | str]]:
    return [
        compare_one(name, last, device, seconds) for name, last in product(OUTPUTS, (False, True))
    ]


def compare_one(
    name: str, neurons_last: bool, device: torch.device, seconds: float
) -> dict[str, float | str]:
    """``row_similarity`` of two outputs."""
    neurons, *positions = OUTPUTS[name]
    shape = (SAMPLES, *positions, neurons) if neurons_last else (SAMPLES, neurons, *positions)
    dim = len(positions) + 1 if neurons_last else 1
    y = beyond_caches(shape, device)
    times = in_turns_with_copy(
        "compare", lambda i: row_similarity(y[i], y[i - 1], dim, False), y, 2, seconds
    )
    return {"output": name, "neurons": "last" if neurons_last else "first", **times}


def pack(device: torch.device, seconds: float) -> list[dict[str, float | str]]:
    return [pack_one(name, share, device, seconds) for name, share in product(OUTPUTS, ACTIVE)]


def pack_one(
    name: str, share: float, device: torch.device, seconds: float
) -> dict[str, float | str]:
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
    """[others, *shape] in bfloat16, so many that one is out of all caches when its turn comes."""
    others = 2 + cache_bytes(device) // (2 * prod(shape))
    return torch.randn(others, *shape, device=device, dtype=torch.bfloat16)


def in_turns_with_copy(
    name: str, call: Callable[[int], object], y: Tensor, moved: float, seconds: float
) -> dict[str, float | str]:
    """``call``, told which of ``y`` [others, ...] is next, moves one of them ``moved`` times."""
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


def beside_copy(rows: list[dict[str, float | str]], name: str) -> Table:
    out = Table(*("output", "neurons", "MB", f"{name} ms", "copy ms", "GB/s", "of copy"))
    for row in rows:
        out.add_row(
            str(row["output"]),
            str(row["neurons"]),
            f"{row['megabytes']:.0f}",
            f"{row[f'{name}_ms']:.3f}",
            f"{row['copy_ms']:.3f}",
            f"{row['gigabytes_per_second']:.0f}",
            f"{row['of_copy']:.0%}",
        )
    return out


def agreement(frozen: Tensor, others: Tensor) -> float:
    """Of the neurons that either one freezes, the share that both do; 1 where there are none."""
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


def table(rows: list[dict[str, float | str]]) -> Table:
    out = Table(*("memory", "probe ms", "step ms", "of an epoch", "frozen", "same frozen"))
    for row in rows:
        out.add_row(
            str(row["memory"]),
            f"{row['probe_ms']:.1f}",
            f"{row['step_ms']:.1f}",
            f"{row['share_of_epoch']:.2%}",
            f"{row['frozen']:.1%}",
            f"{row['agreement']:.2%}",
        )
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--device", type=cli.usable_device, default="cpu")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="per epoch")
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--seconds", type=cli.positive, default=1.0, help="per kind of output")
    parser.add_argument("--json", type=cli.output, metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
