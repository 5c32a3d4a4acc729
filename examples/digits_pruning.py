"""Pruning on digits: do the claims of SeReNe, LOBSTER and PSP-entropy hold?

    python examples/digits_pruning.py --output FOLDER
    python examples/digits_pruning.py --network resnet20 --output FOLDER

Each seed trains with the same gradual pruning by magnitude: plain, with LOBSTER, with SeReNe. Then
"one-shot" trains as long, and is pruned once, half-way, as much as "magnitude" is in the end.
All of it by neuron and once more by element. At the end ``neq.prune.shrink`` removes what is gone:
how many parameters are left then, and how much of the time of a forward? The folder gets
results.json and accuracy.png; a stopped command goes on.

The recipe is the published one, scaled down: SGD without momentum, learning rate 0.1, batches of
100, and a larger λ for fewer steps. For the ResNet-20 λ and pwe were chosen after a first look:
with 1e-3 SeReNe prunes little, and with 4e-3, which LOBSTER has, its network no longer learns.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib.timing import Times, each_round
from examples.digits import Data, load
from examples.kept import Kept, Result
from examples.resnet import resnet

BATCH, RATE, TWT = 100, 0.1, 0.05
SECONDS = 1.0  # to time the shrunk network
REGULARISERS: dict[str, Callable[..., Any] | None] = {
    "magnitude": None,
    "LOBSTER": neq.LOBSTER,
    "SeReNe": neq.SeReNe,
}
METHODS = (*REGULARISERS, "one-shot")
FIGURES = "accuracy", "zero", "gone", "bits", "parameters", "time"


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an image
    epochs: int
    pwe: int  # epochs without improvement before it is pruned
    lam: dict[str, float]


def lenet300() -> nn.Sequential:
    sizes = (64, 300, 100, 10)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


NETWORKS = {
    "lenet300": Network(lenet300, (64,), 600, 5, {"LOBSTER": 1e-3, "SeReNe": 1e-3}),
    "resnet20": Network(
        partial(resnet, 20, 1, 10), (1, 8, 8), 150, 1, {"LOBSTER": 4e-3, "SeReNe": 2e-3}
    ),
}


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    torch.set_num_threads(1)
    names = "network", "epochs", "lam", "pwe"
    recipe = {"twt": TWT, **{name: getattr(given, name) for name in names}}
    kept = Kept(given.output, recipe)
    cases = [
        {"per": per, "seed": seed, "method": method}
        for per in given.per
        for seed in range(given.seeds)
        for method in METHODS
    ]
    with tqdm(total=len(cases) * given.epochs, unit="epoch", disable=None) as bar:
        for number, case in enumerate(cases, 1):
            tqdm.write(line(kept.of(case, partial(run, case, kept, given, bar))))
            bar.update(number * given.epochs - bar.n)
    print("\n".join(summary(kept.results)))
    draw(kept.results, given.output / "accuracy.png")


def data(seed: int, shape: tuple[int, ...]) -> Data:
    """60 % to train, 20 % to decide by, 20 % to test."""
    parts = load(seed, train=0.6, valid=0.8, test=1)
    return {name: (x.view(-1, *shape), y) for name, (x, y) in parts.items()}


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


def run(case: Result, kept: Kept, given: argparse.Namespace, bar: "tqdm[Any]") -> Result:
    """Train with pruning, gradual or half-way at once."""
    per, seed, method = case["per"], case["seed"], case["method"]
    bar.set_description(f"seed {seed}, {per}, {method}")
    network = NETWORKS[given.network]
    parts = data(seed, network.shape)
    torch.manual_seed(seed)
    model = network.make()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    make = REGULARISERS.get(method)
    regulariser = make(model, optimizer, given.lam[method]) if make else None
    pruning = None
    if method != "one-shot":
        evaluate = partial(loss_on, parts)
        options: Any = {"optimizer": optimizer, "twt": TWT, "pwe": given.pwe, "per": per}
        pruning = neq.prune.Gradual(model, evaluate, **options)
    for number in range(given.epochs):
        if pruning is None and number == given.epochs // 2:
            like = next(
                r for r in kept.results if {**case, "method": "magnitude"}.items() <= r.items()
            )
            share = like["zero" if per == "element" else "gone"]
            neq.prune.one_shot(model, optimizer, share, per=per, example=parts["train"][0][:2])
        epoch(model, optimizer, regulariser, parts)
        if pruning is not None:
            pruning.step()
        bar.update()
    return facts_of(model.eval(), parts)


def facts_of(model: nn.Module, parts: Data) -> Result:
    x, y = parts["valid"]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers.popitem()  # all others are hidden
    # the sign that counts is that behind a batch norm
    potentials = {name: name.replace("conv", "bn") for name in layers}
    entropy = neq.psp_entropy(model, [(x, y)], layers=[*potentials.values()])
    alive = torch.cat([layer.weight.flatten(1).any(1) for layer in layers.values()])
    bits = torch.cat([entropy[name] for name in potentials.values()])
    return {
        "zero": zero_share(model),
        "gone": 1 - float(alive.double().mean()),  # of hidden neurons
        "accuracy": accuracy(model, parts),
        "bits": float(bits[alive].mean()),  # of hidden neurons that are there
        **shrunk(model, x),
    }


def zero_share(model: nn.Module) -> float:
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
    return float((weights == 0).double().mean())


@torch.no_grad()
def accuracy(model: nn.Module, parts: Data) -> float:
    x, y = parts["test"]
    return float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def shrunk(model: nn.Module, x: Tensor) -> Result:
    """The share of parameters, and of the time of a forward, that is left without what is gone."""
    plain = neq.revert(copy.deepcopy(model))
    small = neq.prune.shrink(copy.deepcopy(model), x[:2])
    calls = {"plain": lambda turn: plain(x), "small": lambda turn: small(x)}
    *_, taken = each_round(calls, torch.device("cpu"), SECONDS, clock=time.thread_time)
    ratios = [new / old for new, old in zip(taken["small"], taken["plain"], strict=True)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, plain)]
    return {"parameters": sizes[0] / sizes[1], "time": Times.of(ratios).p50}


def line(r: Result) -> str:
    figures = f"{r['zero']:.1%} of weights, {r['gone']:.1%} of hidden neurons gone"
    left = f"{r['parameters']:.0%} of parameters, {r['time']:.0%} of the time left"
    name = f"seed {r['seed']}, {r['per']}, {r['method']}"
    return f"{name}: {r['accuracy']:.1%} right, {figures}, {r['bits']:.2f} bits, {left}"


def summary(found: list[Result]) -> list[str]:
    """Mean ± standard deviation over the seeds; behind it, to magnitude ± the standard error."""
    lines = []
    for per, method in dict.fromkeys((r["per"], r["method"]) for r in found):
        runs, others = (
            {r["seed"]: r for r in found if (r["per"], r["method"]) == (per, m)}
            for m in (method, "magnitude")
        )
        for key in FIGURES:
            values = [r[key] for r in runs.values()]
            more = [r[key] - others[seed][key] for seed, r in runs.items()]
            error = _spread(more) / len(more) ** 0.5
            figures = f"{mean(values):.4f} ± {_spread(values):.4f}, {mean(more):+.4f} ± {error:.4f}"
            lines.append(f"{per:8} {method:10} {key:10} {figures}")
    return lines


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def draw(found: list[Result], file: Path) -> None:
    from matplotlib.figure import Figure

    kinds = [*dict.fromkeys(r["per"] for r in found)]
    figure = Figure(figsize=(5 * len(kinds), 4), layout="constrained")
    columns = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, per in zip(columns, kinds, strict=True):
        for number, method in enumerate(METHODS):
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
    parser.add_argument("--network", choices=NETWORKS, default="lenet300")
    parser.add_argument("--per", nargs="+", choices=("neuron", "element"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="by default as many as the network needs")
    parser.add_argument("--lam", type=float, help="λ of both; by default each network has its own")
    given = parser.parse_args(arguments)
    given.per = given.per or ["neuron", "element"]
    given.epochs = given.epochs or NETWORKS[given.network].epochs
    given.pwe = NETWORKS[given.network].pwe
    own = NETWORKS[given.network].lam
    given.lam = own if given.lam is None else dict.fromkeys(own, given.lam)
    return given


if __name__ == "__main__":
    main()
