"""How the speed of neurons grows with the optimizer steps between two measurements.

    python bench/speeds.py                   # made-up images
    python bench/speeds.py --data FOLDER     # images by class, FOLDER/<class>/*.jpg: CIFAR-10, say

A small convolutional network trains with all neurons active. Its outputs on 50 images are measured
every 5, 10, ..., 500 steps, each interval for itself. The second half of the training has a tenth
of the learning rate.

    1 - phi     the median over neurons and measurements of 1 - φ
    speed       the same of |v|, with μ = 0.5
    exponent    e of |v| ∝ stepsᵉ between this interval and the one before
"""

import argparse
import sys
from math import log
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.probe import from_folder, made_up

INTERVALS = (5, 10, 20, 50, 100, 200, 500)
BATCH, SAMPLES = 64, 50
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}


class Watch:
    """Compares outputs with those of the measurement before, ``interval`` steps ago."""

    def __init__(self, interval: int) -> None:
        self.interval, self.before = interval, None
        self.velocity = neq.Velocity()
        self.seen: list[tuple[int, float, float]] = []  # step, median 1 - φ, median |v|

    def measure(self, step: int, outputs: list[Tensor]) -> None:
        if self.before is not None:
            pairs = zip(outputs, self.before, strict=True)
            phi = torch.cat([neq.similarity(now, then, 1) for now, then in pairs])
            v = self.velocity.update(phi)
            self.seen.append((step, float((1 - phi).median()), float(v.abs().median())))
        self.before = outputs

    def medians(self, start: int, end: int) -> tuple[float, float]:
        # the first two measurements of a phase compare with the one before it
        seen = [s[1:] for s in self.seen if start + 2 * self.interval < s[0] <= end]
        one, speed = torch.tensor(seen).median(0).values.tolist()
        return one, speed


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = environment(torch.device("cpu"))
    results.show_environment(facts)
    torch.manual_seed(0)
    images, labels = made_up() if given.data is None else from_folder(given.data)
    rows = [
        row
        for name, make in OPTIMIZERS.items()
        for row in train(name, make, images, labels, given.steps)
    ]
    results.save(rows, facts, given.json)
    results.show_table(table(rows))


def network() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    blocks = [*block(3, 16), *block(16, 32), *block(32, 64)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(name: str, make: object, images: Tensor, labels: Tensor, steps: int) -> list[Result]:
    torch.manual_seed(0)
    model = network()
    optimizer: Optimizer = make(model.parameters())  # type: ignore[operator]
    probe, images, labels = images[:SAMPLES], images[SAMPLES:], labels[SAMPLES:]
    watches = [Watch(interval) for interval in INTERVALS]
    half = steps // 2
    for step in range(1, steps + 1):
        if step == half + 1:
            optimizer.param_groups[0]["lr"] /= 10
        drawn = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[drawn]), labels[drawn]).backward()
        optimizer.step()
        due = [watch for watch in watches if step % watch.interval == 0]
        if due:
            outputs = outputs_of(model, probe)
            for watch in due:
                watch.measure(step, outputs)
    phases = {"lr": (half // 5, half), "lr / 10": (half, steps)}
    return [row for phase, span in phases.items() for row in summed(name, phase, span, watches)]


@torch.no_grad()
def outputs_of(model: nn.Module, probe: Tensor) -> list[Tensor]:
    """The outputs of convolutions and norms, without any rounding."""
    model.eval()
    outputs, x = [], probe
    for layer in model:  # type: ignore[attr-defined]
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            outputs.append(x)
    model.train()
    return outputs


def summed(name: str, phase: str, span: tuple[int, int], watches: list[Watch]) -> list[Result]:
    rows: list[Result] = []
    for watch in watches:
        one, speed = watch.medians(*span)
        row = {"optimizer": name, "phase": phase, "interval": watch.interval}
        row |= {"one_minus_phi": one, "speed": speed}
        if rows:
            grown = log(speed / rows[-1]["speed"])
            row["exponent"] = grown / log(watch.interval / rows[-1]["interval"])
        rows.append(row)
    return rows


def table(rows: list[Result]) -> Table:
    out = results.new_table(("optimizer", "phase"), ("steps", "1 - phi", "speed", "exponent"))
    for r in rows:
        figures = f"{r['one_minus_phi']:.2e}", f"{r['speed']:.2e}", results.cell(r.get("exponent"))
        out.add_row(r["optimizer"], r["phase"], str(r["interval"]), *figures)
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of images by class")
    parser.add_argument("--steps", type=int, default=6000, help="of training (default: 6000)")
    cli.add_json(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
