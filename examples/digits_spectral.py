"""Spectral layers on digits: do the claims about two sets of eigenvalues hold?

    python examples/digits_spectral.py --output FOLDER

A network of two hidden layers is trained dense, by one set of eigenvalues, by two, with singular
values, and with a triangle. Then the dense network, two sets and the triangle are trained so that
a share of their weights is zero: in each forward the smallest. The folder gets results.json and
accuracy.png; a stopped command goes on.

The recipe is the published one, scaled down: Adamax, ReLU, batches of 100, and the published
learning rates of each kind. Nothing was tuned.
"""

import argparse
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from examples.digits import Data, load
from examples.kept import Kept, Result

RATES = {"dense": 0.002, "one": 0.015, "two": 0.015, "svd": 0.015, "qr": 0.003}
SPARSE = "dense", "two", "qr"
SHARES = 0.5, 0.8, 0.9, 0.95, 0.98


class SparseLinear(nn.Linear):
    """A linear layer whose smallest weights are zero in each forward."""

    sparsity = 0.0

    def forward(self, input: Tensor) -> Tensor:
        magnitude = self.weight.detach().abs()
        gone = round(self.sparsity * magnitude.numel())
        weight = self.weight
        if gone:
            weight = weight * (magnitude > magnitude.flatten().kthvalue(gone).values)
        return F.linear(input, weight, self.bias)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    cases = [(kind, 0.0) for kind in RATES]
    cases += [(kind, share) for share in SHARES for kind in SPARSE]
    kept = Kept(given.output, {"epochs": given.epochs, "width": given.width, "rates": RATES})
    total = given.seeds * len(cases) * given.epochs
    with tqdm(total=total, unit="epoch", disable=None) as bar:
        for seed in range(given.seeds):
            for kind, share in cases:
                case = {"kind": kind, "sparsity": share, "seed": seed}
                tqdm.write(line(kept.of(case, partial(run, kind, share, seed, given))))
                bar.update(given.epochs)
    print("\n".join(summary(kept.results)))
    draw(kept.results, given.output / "accuracy.png")


def network(kind: Any, sparsity: float, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((64, width, width, 10)):
        if kind == "dense":
            dense = SparseLinear(inputs, outputs)
            dense.sparsity = sparsity
            layers += [dense, nn.ReLU()]
        else:
            spectral = neq.SpectralLinear(inputs, outputs, kind=kind, sparsity=sparsity)
            layers += [spectral, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(kind: str, sparsity: float, seed: int, given: argparse.Namespace) -> Result:
    parts = load(seed, train=0.8, test=1)  # 80 % to train
    torch.manual_seed(seed)
    model = network(kind, sparsity, given.width)
    optimizer = torch.optim.Adamax(model.parameters(), RATES[kind])
    x, y = parts["train"]
    for _ in range(given.epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "accuracy": accuracy(model, parts)}


@torch.no_grad()
def accuracy(model: nn.Module, parts: Data) -> float:
    x, y = parts["test"]
    return float((model(x).argmax(1) == y).double().mean())


def line(r: Result) -> str:
    sparse = f", {r['sparsity']:.0%} zero" if r["sparsity"] else ""
    return f"seed {r['seed']}, {r['kind']}{sparse}: {r['accuracy']:.2%} right"


def summary(found: list[Result]) -> list[str]:
    """Mean and standard deviation over the seeds, and the difference to dense of the same seeds."""
    lines = []
    for sparsity, kind in dict.fromkeys((r["sparsity"], r["kind"]) for r in found):
        of = {k: [r for r in found if (r["sparsity"], r["kind"]) == (sparsity, k)] for k in RATES}
        values = [r["accuracy"] for r in of[kind]]
        less = [a["accuracy"] - b["accuracy"] for a, b in zip(of[kind], of["dense"], strict=True)]
        error = _spread(less) / len(less) ** 0.5
        lines.append(
            f"{kind:5} {sparsity:4.0%} zero {of[kind][0]['parameters']:6} parameters "
            f"{mean(values):.4f} ± {_spread(values):.4f}, {mean(less):+.4f} ± {error:.4f} to dense"
        )
    return lines


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def draw(found: list[Result], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(RATES):
        runs = [r for r in found if r["kind"] == kind]
        zero = [100 * r["sparsity"] + (number - 2) * 0.4 for r in runs]
        axes.plot(zero, [r["accuracy"] for r in runs], "o", color=f"C{number}", label=kind)
    axes.set_xlabel("% of weights zero")
    axes.set_ylabel("test accuracy, a dot for each seed")
    axes.legend()
    figure.savefig(file, dpi=110)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--width", type=int, default=200)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
