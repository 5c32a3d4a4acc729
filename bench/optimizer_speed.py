"""The time of an optimizer's step with part of the neurons active: torch's, guarded, and neq's.

    python bench/optimizer_speed.py
    python bench/optimizer_speed.py --only adamw --active .5,.1 --json out.json
    python bench/optimizer_speed.py --only gpt2 --granule 16

The parameters are those of ResNet-50, ViT-B/16 and GPT-2's layers, of which the last are
column-major. Their gradients are random. A fraction f of each layer's neurons is active: random
ones, or random aligned groups of --granule in layers that have whole ones. These are timed in
turns, on the same parameters:

    default    torch's optimizer without flags
    foreach    torch's with foreach=True
    fused      torch's with fused=True
    guarded    the fused one under neq.optim.Guard, which keeps frozen neurons and their state
    neq        neq.optim's, of the same name
    realised   (fused - neq) / ((1 - f) fused): the share of the saving that is wall-clock
    of copy    the bytes per second that neq's step moves, as a share of a plain copy's
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, optimizers, results
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import interleave
from bench.lib.wgrad_contenders import active_count, granule_in, random_mask

FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
TIMES = (*FLAGS, "guarded", "neq")
MOVED = {"SGD": 5, "AdamW": 7}  # values read or written per active one: parameter, gradient, state
BACKLOG = 4_000_000  # GPU cycles, some 2 ms: longer than Python takes for a step


def resnet50() -> Iterator[nn.Module]:
    def conv(inputs: int, outputs: int, size: int) -> Iterator[nn.Module]:
        yield nn.Conv2d(inputs, outputs, size, bias=False)
        yield nn.BatchNorm2d(outputs)

    yield from conv(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                yield from conv(inputs, 4 * width, 1)
            yield from conv(inputs, width, 1)
            yield from conv(width, width, 3)
            yield from conv(width, 4 * width, 1)
            inputs = 4 * width
    yield nn.Linear(inputs, 1000)


def vit_b16() -> Iterator[nn.Module]:
    width = 768
    yield nn.Conv2d(3, width, 16, 16)
    for _ in range(12):
        yield nn.LayerNorm(width)
        yield nn.Linear(width, 3 * width)
        yield nn.Linear(width, width)
        yield nn.LayerNorm(width)
        yield nn.Linear(width, 4 * width)
        yield nn.Linear(4 * width, width)
    yield nn.LayerNorm(width)
    yield nn.Linear(width, 1000)


def gpt2() -> Iterator[nn.Module]:
    """Its layers, without the embeddings."""
    from transformers.pytorch_utils import Conv1D

    width = 768
    for _ in range(12):
        yield nn.LayerNorm(width)
        yield Conv1D(3 * width, width)
        yield Conv1D(width, width)
        yield nn.LayerNorm(width)
        yield Conv1D(4 * width, width)
        yield Conv1D(width, 4 * width)
    yield nn.LayerNorm(width)


MODELS: dict[str, Callable[[], Iterator[nn.Module]]] = {
    "resnet50": resnet50,
    "vit_b16": vit_b16,
    "gpt2": gpt2,
}


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = environment(given.device)
    results.show_environment(facts)
    found: list[Result] = []
    for model, optimizer in tqdm(given.pairs, unit="optimizer", disable=None, leave=False):
        timed = given.active, given.granule, given.device, given.seconds
        for result in measure(model, optimizer, *timed):
            found.append(result)
            results.save(found, facts, given.json)  # the next fraction may be cut off
    results.show_table(table(found))
    for r in found:
        if r["active"] == 0.5:
            print(
                f"{r['model']} {r['optimizer']}, half of the neurons active: neq takes "
                f"{r['neq_p50'] / r['fused_p50']:.2f} of torch's fused step and "
                f"{r['neq_p50'] / r['default_p50']:.2f} of its default one, at "
                f"{r['of_copy']:.0%} of a copy's bandwidth"
            )


def measure(
    name: str,
    optimizer: str,
    fractions: list[float],
    granule: int,
    device: torch.device,
    seconds: float,
) -> Iterator[Result]:
    torch.manual_seed(0)
    model = neq.convert(nn.Sequential(*MODELS[name]()).to(device))
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    theirs, ours = optimizers.both(optimizer)

    def make(kind: Callable[..., Optimizer], **flags: Any) -> Optimizer:
        return kind(model.parameters(), **optimizers.OPTIONS[optimizer], **flags)

    contenders = {key: make(theirs, **flags) for key, flags in FLAGS.items()}
    contenders["guarded"] = make(theirs, fused=True)
    neq.optim.Guard(contenders["guarded"], model)
    contenders["neq"] = make(ours, fused=True, layers=model)
    calls = {key: (lambda turn, o=o: o.step()) for key, o in contenders.items()}
    source = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)
    target = torch.empty_like(source)
    calls["copy"] = lambda turn: target.copy_(source)

    for fraction in fractions:
        for seed, layer in enumerate(model):
            own = granule_in(layer.n_neurons, granule)
            k = active_count(fraction, layer.n_neurons, own)
            layer.set_active(random_mask(layer.n_neurons, k, own, seed))
        times = interleave(calls, device, seconds, backlog=BACKLOG)
        fused, mine = times["fused"].p50, times["neq"].p50
        active = sum(
            p.numel() // layer.n_neurons * len(layer.active_rows)
            for layer in model
            for p in layer.parameters()
        )
        moved = MOVED[optimizer] * active / (2 * source.numel())  # by neq's step, in copies
        yield {
            "model": name,
            "optimizer": optimizer,
            "parameters": sum(p.numel() for p in model.parameters()),
            "active": fraction,
            "granule": granule,
            **{f"{k}_{at}": v for k, t in times.items() for at, v in t._asdict().items()},
            "ratio": mine / fused,
            "of_copy": moved * times["copy"].p50 / mine,
            "realised": (fused - mine) / ((1 - fraction) * fused) if fraction < 1 else None,
        }


def table(found: list[Result]) -> Table:
    ratios = "neq/fused", "realised", "of copy"
    figures = "active", *(f"{name} ms" for name in TIMES), "p20", "p80", *ratios
    out = results.new_table(("model", "optimizer"), figures)
    for r in found:
        times = [r[f"{name}_p50"] for name in TIMES] + [r["neq_p20"], r["neq_p80"]]
        shares = f"{r['ratio']:.2f}", results.cell(r["realised"]), f"{r['of_copy']:.0%}"
        cells = f"{r['active']:.3g}", *(f"{t:.2f}" for t in times), *shares
        out.add_row(r["model"], r["optimizer"], *cells)
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_device(parser)
    cli.add_active(parser, "1,.5,.25,.1")
    cli.add_granule(parser)
    cli.add_seconds(parser, 2, "model, optimizer and fraction")
    cli.add_only(parser, "resnet50 or 'vit_b16 adamw'")
    cli.add_json(parser)
    given = parser.parse_args(arguments)
    pairs = {f"{m} {o}".lower(): (m, o) for m in MODELS for o in optimizers.OPTIONS}
    given.pairs = [*cli.chosen(parser, given, "optimizer of this benchmark", pairs).values()]
    return given


if __name__ == "__main__":
    main()
