"""What bounds each weight gradient of the suite on known GPUs: modelled, never measured.

    python bench/roofline.py
    python bench/roofline.py --cards H200 --only llama --layers
    python bench/roofline.py --compare bench/results/nvidia-h200/gpu_check.json

Each backend's time follows from what it asks of tensor cores, schedulers, memory, the second-level
cache and the CPU: neq_kernels/wgrad/bounds.py, bench/lib/designs.py, and the cards' speeds in
bench/lib/cards.py. All is in bfloat16 and channels_last.

The first table says, for each card, what share of the suite's dense weight gradients is left if
each layer takes its best backend, with scattered neurons and with granules of 16; and the least
that any kernel could leave. The second says what designs would add that are not built. --layers
prints every layer. --compare puts the results of a run on a GPU beside the model, line by line.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, panels, results
from bench.lib.cards import CARDS, card_of
from bench.lib.designs import GRANULE, NOT_BUILT, floor, layer_of, plans
from bench.lib.environment import device_name, environment
from bench.lib.problems import Problem, problems
from bench.lib.results import Result
from neq_kernels.device.gpu import Gpu

GRANULES = (1, GRANULE)
GAIN = 0.05  # of dense, by which a backend counts as better than the next


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    here = environment(torch.device("cpu"))
    facts = {"what": "modelled, not measured", "time": here["time"], "revision": here["revision"]}
    results.show_environment(facts)
    if given.compare:
        results.show_table(compared(json.loads(given.compare.read_text())))
        return
    found = list(modelled(given.problems, given.active, given.cards))
    if given.layers:
        results.show_table(layers(found))
    results.show_table(summary(found))
    results.show_table(gained(found))
    results.save(found, facts | {"cards": {c: CARDS[c]._asdict() for c in given.cards}}, given.json)
    if given.plot:
        plot(found, given.cards[-1], given.plot)


def modelled(
    suite: Sequence[Problem], fractions: Sequence[float], cards: Sequence[str]
) -> Iterator[Result]:
    """A line for each card, layer, granule and active share."""
    for card, problem, granule, active in product(cards, suite, GRANULES, fractions):
        yield line(card, problem, granule, active)


def line(card: str, problem: Problem, granule: int, active: float) -> Result:
    """Modelled microseconds by backend, and what bounds each."""
    gpu: Gpu = CARDS[card]
    layer = layer_of(problem, active, granule)
    times = {name: plan.time(gpu) for name, plan in plans(problem, active, granule, gpu).items()}
    dense, _ = times["dense"]
    best = min((name for name in times if name not in ("dense", *NOT_BUILT)), key=times.get)
    # a vendor's grouped kernels are far from any bound, so there is nothing to compare with
    realised = (
        (1 - times[best][0] / dense) / (1 - layer.active) if layer.k < layer.neurons else None
    )
    return {
        "card": card,
        "name": problem.name,
        "count": problem.count,
        "granule": layer.granule,
        "asked_granule": granule,
        "active": layer.active,
        "asked_active": active,
        "best": best,
        "realised": None if problem.groups > 1 else realised,
        "us": {name: round(time, 2) for name, (time, _) in times.items()},
        "bound": {name: by for name, (_, by) in times.items()},
        "floor_us": round(floor(problem, active, granule, gpu), 2),
        "grouped": problem.groups > 1,
    }


def left(found: Sequence[Result], without: Sequence[str] = NOT_BUILT) -> float:
    """The share of the dense time that is left, if each layer takes the best backend."""
    dense = sum(r["count"] * r["us"]["dense"] for r in found)
    return sum(r["count"] * best_of(r, without) for r in found) / dense


def least(found: Sequence[Result]) -> float:
    """The share of the dense time that any kernel leaves."""
    dense = sum(r["count"] * r["us"]["dense"] for r in found)
    return sum(r["count"] * r["floor_us"] for r in found) / dense


def best_of(r: Result, without: Sequence[str] = NOT_BUILT) -> float:
    return min(us for name, us in r["us"].items() if name not in ("dense", *without))


def comparable(found: Sequence[Result]) -> dict[tuple[str, int, float], list[Result]]:
    """By card, granule and share: the layers whose dense gradient is modelled."""
    groups: dict[tuple[str, int, float], list[Result]] = defaultdict(list)
    for r in found:
        if not r["grouped"]:
            groups[r["card"], r["asked_granule"], r["asked_active"]].append(r)
    return groups


def summary(found: Sequence[Result]) -> Any:
    """For each card, granule and share: what is left of dense, and what is best how often."""
    figures = ("f", "left of dense", "no kernel beats", "realised, median")
    table = results.new_table(("card", "granule"), figures, ("best of how many layers",))
    for (card, granule, active), some in comparable(found).items():
        shares = [r["realised"] for r in some if r["realised"] is not None]
        cells = left(some), least(some), median(shares) if shares else None
        best = Counter(r["best"] for r in some).most_common()
        named = ", ".join(f"{name} {times}" for name, times in best)
        table.add_row(card, str(granule), f"{active:g}", *map(results.cell, cells), named)
    return table


def gained(found: Sequence[Result]) -> Any:
    """For each design that is not built: what it would add to those that are."""
    text = "design that is not built", "card", "granule"
    table = results.new_table(text, ("f", "less of dense", f"layers that gain {GAIN:.0%}", "of"))
    for design in NOT_BUILT:
        others = [name for name in NOT_BUILT if name != design]
        for (card, granule, active), some in comparable(found).items():
            if not any(design in r["us"] for r in some):
                continue
            less = left(some) - left(some, others)
            winners = sum(best_of(r) - best_of(r, others) >= GAIN * r["us"]["dense"] for r in some)
            cells = f"{active:g}", f"{less:.3f}", str(winners), str(len(some))
            table.add_row(design, card, str(granule), *cells)
    return table


def layers(found: Sequence[Result]) -> Any:
    names = [*dict.fromkeys(name for r in found for name in r["us"])]
    figures = ("f", "realised", *(f"{name} us" for name in names), "floor us")
    table = results.new_table(("card", "layer", "granule"), figures, ("best", "bound by"))
    for r in found:
        times = (results.cell(r["us"].get(name), ".1f") for name in names)
        figures = f"{r['active']:.3g}", results.cell(r["realised"]), *times, f"{r['floor_us']:.1f}"
        last = r["best"], r["bound"][r["best"]]
        table.add_row(r["card"], r["name"], str(r["granule"]), *figures, *last)
    return table


def compared(run: Result) -> Any:
    """Single gradients of a run on a GPU beside the model of the backend that ran."""
    card = card_of(device_name(run["environment"]))
    if card is None:
        sys.exit(f"no card of {', '.join(CARDS)} is {device_name(run['environment'])}")
    suite = {p.name: p for p in problems("full", "cuda")}
    figures = ("f", "dense ms", "modelled", "ratio", "neq ms", "modelled", "ratio")
    table = results.new_table(("layer", "granule", "backend"), figures, ("modelled bound",))
    for r in run["results"]:
        problem = suite.get(r["name"])
        if problem is None or r["dtype"] != "bfloat16" or not 0 < r["active"] < 1:
            continue
        if problem.kernel and r["layout"] != "channels_last":
            continue
        backend = "masked" if r["backend"] == "dense" else r["backend"]
        granule = r.get("granule", 1)  # older files have none
        known = line(card, problem, granule, r["active"])
        pairs = [(r["dense_ms"], known["us"]["dense"]), (r["neq_ms"], known["us"].get(backend))]
        cells = [f"{r['active']:.3g}"]
        for ms, us in pairs:
            there = ms is not None and us is not None
            cells.append(results.milliseconds(ms))
            cells.append(results.milliseconds(us / 1e3 if us is not None else None))
            cells.append(results.cell(1e3 * ms / us if there else None))
        table.add_row(
            r["name"], str(granule), r["backend"], *cells, known["bound"].get(backend, "-")
        )
    return table


def plot(found: Sequence[Result], card: str, file: Path) -> None:
    """A panel for each model."""
    models: dict[str, list[Result]] = defaultdict(list)
    for r in found:
        if r["card"] == card and not r["grouped"]:
            models[r["name"].partition("/")[0]].append(r)
    draw = [partial(_panel, model, its) for model, its in models.items()]
    title = f"{card}: weight gradients, modelled, not measured"
    panels.save(file, draw, 4, title=title, unit="the dense weight gradients, modelled")


def _panel(model: str, its: Sequence[Result], panel: Any) -> None:
    fractions = sorted({r["asked_active"] for r in its})
    for granule, style in zip(GRANULES, ("o-", "s-"), strict=True):
        some_by_f = [
            [r for r in its if (r["asked_granule"], r["asked_active"]) == (granule, f)]
            for f in fractions
        ]
        label = "scattered neurons" if granule == 1 else f"granules of {granule}"
        ours, bounds = ([share(some) for some in some_by_f] for share in (left, least))
        (curve,) = panel.plot(fractions, ours, style, label=label)
        label = f"{label}: no kernel beats"
        panel.plot(fractions, bounds, ":", color=curve.get_color(), label=label)
    panel.set_title(model, fontsize=9)
    panel.legend(**panels.LEGEND)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_active(parser, ".75,.5,.25,.1")
    cli.add_only(parser, "resnet50 or swin.*mlp")
    parser.add_argument("--cards", default=",".join(CARDS), metavar="CARD,CARD,...")
    parser.add_argument("--layers", action="store_true", help="print a line for each layer too")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="of backward_speed or gpu_check"
    )
    cli.add_json(parser)
    cli.add_plot(parser)
    given = parser.parse_args(arguments)
    given.cards = given.cards.split(",")
    if unknown := [card for card in given.cards if card not in CARDS]:
        parser.error(f"argument --cards: known are {', '.join(CARDS)}, got {', '.join(unknown)}")
    suite = {p.name: p for p in problems("full", "cuda")}
    given.problems = [*cli.chosen(parser, given, "problem of the full suite", suite).values()]
    return given


if __name__ == "__main__":
    main()
