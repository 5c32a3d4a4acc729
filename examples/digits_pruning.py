"""Pruning of a LeNet-300 on digits: do the claims of SeReNe, LOBSTER and PSP-entropy hold?

    python examples/digits_pruning.py --output FOLDER

Each seed trains with the same gradual pruning by magnitude: plain, with LOBSTER, with SeReNe. Then
"one-shot" trains as long, and is pruned once, half-way, as much as "magnitude" is in the end.
All of it once more by neuron. The folder gets results.json and accuracy.png.

The recipe is the published one, scaled down: SGD without momentum, learning rate 0.1, batches of
100, λ ten times as large for a hundredth of the steps.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from examples.digits import Data, load

BATCH, RATE, TWT, PWE = 100, 0.1, 0.05, 5
Result = dict[str, Any]
REGULARISERS: dict[str, Callable[..., Any] | None] = {
    "magnitude": None,
    "LOBSTER": neq.LOBSTER,
    "SeReNe": neq.SeReNe,
}


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    found: list[Result] = []
    for seed in range(given.seeds):
        for per in ("element", "neuron"):
            for name in REGULARISERS:
                found.append(run(name, per, seed, given))
                print(line(found[-1]), flush=True)
            found.append(one_shot(found[-len(REGULARISERS)], seed, given))
            print(line(found[-1]), flush=True)
    print("\n".join(summary(found)))
    given.output.mkdir(parents=True, exist_ok=True)
    facts = {"epochs": given.epochs, "lam": given.lam, "twt": TWT, "pwe": PWE}
    text = json.dumps({"recipe": facts, "results": found}, indent=1) + "\n"
    (given.output / "results.json").write_text(text)
    draw(found, given.output / "accuracy.png")


def data(seed: int) -> Data:
    """60 % to train, 20 % to decide by, 20 % to test."""
    return load(seed, train=0.6, valid=0.8, test=1)


def lenet300() -> nn.Sequential:
    sizes = (64, 300, 100, 10)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, other: Any, parts: Data) -> None:
    x, y = parts["train"]
    for batch in torch.randperm(len(x)).split(BATCH):
        output = model(x[batch])
        if isinstance(other, neq.SeReNe):
            other.observe(output)
        optimizer.zero_grad()
        F.cross_entropy(output, y[batch]).backward()
        optimizer.step()


def loss_on(parts: Data, model: nn.Module) -> Tensor:
    x, y = parts["valid"]
    return F.cross_entropy(model(x), y)


def run(name: str, per: Any, seed: int, given: argparse.Namespace) -> Result:
    """Train with gradual pruning."""
    parts = data(seed)
    torch.manual_seed(seed)
    model = lenet300()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    make = REGULARISERS[name]
    regulariser = make(model, optimizer, given.lam) if make else None
    evaluate = partial(loss_on, parts)
    pruning = neq.prune.Gradual(model, evaluate, optimizer=optimizer, twt=TWT, pwe=PWE, per=per)
    for _ in range(given.epochs):
        epoch(model, optimizer, regulariser, parts)
        pruning.step()
    return {"method": name, "per": per, "seed": seed, **facts_of(model, parts)}


def one_shot(gradual: Result, seed: int, given: argparse.Namespace) -> Result:
    """Train as long, but prune once, half-way, as much as ``gradual`` has."""
    parts, per = data(seed), gradual["per"]
    torch.manual_seed(seed)
    model = lenet300()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for number in range(given.epochs):
        if number == given.epochs // 2:
            share = gradual["zero" if per == "element" else "gone"]
            neq.prune.one_shot(model, optimizer, share, per=per)
        epoch(model, optimizer, None, parts)
    return {"method": "one-shot", "per": per, "seed": seed, **facts_of(model, parts)}


def facts_of(model: nn.Module, parts: Data) -> Result:
    x, y = parts["valid"]
    hidden = neq.psp_entropy(model, [(x, y)], layers=["0", "2"])
    alive = torch.cat([layer.weight.any(1) for layer in (model[0], model[2])])  # type: ignore[index]
    bits = torch.cat([hidden["0"], hidden["2"]])
    return {
        "zero": zero_share(model),
        "gone": 1 - float(alive.double().mean()),  # of hidden neurons
        "accuracy": accuracy(model, parts),
        "bits": float(bits[alive].mean()),  # of hidden neurons that are there
    }


def zero_share(model: nn.Module) -> float:
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() == 2])
    return float((weights == 0).double().mean())


@torch.no_grad()
def accuracy(model: nn.Module, parts: Data) -> float:
    x, y = parts["test"]
    return float((model(x).argmax(1) == y).double().mean())


def line(r: Result) -> str:
    figures = f"{r['zero']:.1%} of weights, {r['gone']:.1%} of hidden neurons gone"
    name = f"seed {r['seed']}, {r['per']}, {r['method']}"
    return f"{name}: {r['accuracy']:.1%} right, {figures}, {r['bits']:.2f} bits"


def summary(found: list[Result]) -> list[str]:
    """Mean and standard deviation over the seeds."""
    lines = []
    for per, method in dict.fromkeys((r["per"], r["method"]) for r in found):
        runs = [r for r in found if (r["per"], r["method"]) == (per, method)]
        figures = []
        for key in ("accuracy", "zero", "gone", "bits"):
            values = [r[key] for r in runs]
            spread = stdev(values) if len(values) > 1 else 0.0
            figures.append(f"{key} {mean(values):.4f} ± {spread:.4f}")
        lines.append(f"{per:8} {method:10} {', '.join(figures)}")
    return lines


def draw(found: list[Result], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, per in zip(figure.subplots(1, 2, sharey=True), ("element", "neuron"), strict=True):
        for number, method in enumerate((*REGULARISERS, "one-shot")):
            runs = [r for r in found if (r["per"], r["method"]) == (per, method)]
            zero = [100 * r["zero"] for r in runs]
            axes.plot(zero, [r["accuracy"] for r in runs], "o", color=f"C{number}", label=method)
        axes.set_title(f"pruned by {per}")
        axes.set_xlabel("% of weights zero, at the end")
    axes.legend()
    figure.axes[0].set_ylabel("test accuracy, a dot for each seed")
    figure.savefig(file, dpi=110)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--lam", type=float, default=1e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
