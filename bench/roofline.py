"""What bounds each weight gradient of the suite on known GPUs: modelled, never measured.

    python bench/roofline.py
    python bench/roofline.py --cards H200 --only llama --layers
    python bench/roofline.py --compare bench/results/nvidia-h200/gpu_check.json

Each backend's time follows from what it asks of tensor cores, schedulers, memory, the second-level
cache and the CPU: neq_kernels/wgrad/bounds.py, bench/lib/designs.py, and the cards' speeds in
bench/lib/cards.py. All is in bfloat16 and channels_last.

The first table says, for each card, what share of the suite's dense weight gradients is left if
each layer takes its best backend, with scattered neurons and with granules of 16; and the least
that any kernel could leave. The second says what designs would add that are not built. The third
has what each realises of wide linear layers: the median, and of how many layers at least .9. The
fourth and fifth are about the planner's choices where nothing was measured: how another model
judges them, and what they leave of each network's dense weight gradients, with the CPU's time and
without. --layers prints every layer. --compare puts the results of a run on a GPU beside the model,
line by line.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, panels, results
from bench.lib.cards import CARDS, card_of
from bench.lib.designs import (
    CLUSTER_COLUMNS,
    GRANULE,
    NOT_BUILT,
    floor,
    layer_of,
    planned,
    plans,
    posed,
)
from bench.lib.environment import device_name, environment
from bench.lib.problems import Problem, problems
from bench.lib.results import Result
from bench.lib.second_opinion import FLOPS_PER_BYTE, opinion
from neq_kernels.device.gpu import Gpu
from neq_kernels.wgrad.planner import GPU_MARGIN

GRANULES = (1, GRANULE)
WIDE = {1: CLUSTER_COLUMNS, GRANULE: 384}  # inputs, by granule: what was hoped for starts there
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
    results.show_table(realised(found))
    results.show_table(judged(found))
    results.show_table(networks(found))
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
    ways = plans(problem, active, granule, gpu)
    times = {name: plan.time(gpu) for name, plan in ways.items()}
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
        "planned": planned(problem, active, card),
        "us": {name: round(time, 2) for name, (time, _) in times.items()},
        "gpu_us": {
            name: round(plan._replace(host=0).time(gpu)[0], 2) for name, plan in ways.items()
        },
        "bound": {name: by for name, (_, by) in times.items()},
        "floor_us": round(floor(problem, active, granule, gpu), 2),
        "grouped": problem.groups > 1,
        "inputs": None if problem.kernel else problem.inputs,
        "bias": problem.bias,
    }


def left(found: Sequence[Result], without: Collection[str] = NOT_BUILT.keys()) -> float:
    """The share of the dense time that is left, if each layer takes the best backend."""
    dense = sum(r["count"] * r["us"]["dense"] for r in found)
    return sum(r["count"] * best_of(r, without) for r in found) / dense


def least(found: Sequence[Result]) -> float:
    """The share of the dense time that any kernel leaves."""
    dense = sum(r["count"] * r["us"]["dense"] for r in found)
    return sum(r["count"] * r["floor_us"] for r in found) / dense


def best_of(r: Result, without: Collection[str] = NOT_BUILT.keys()) -> float:
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


def realised(found: Sequence[Result]) -> Any:
    """What the floor and each design realise of linear layers that are at least ``WIDE``."""
    names = "floor", "pack", *NOT_BUILT
    table = results.new_table(("card", "granule", "bias"), ("f", "layers", *names))
    for (card, granule, active), some in comparable(found).items():
        for bias in False, True:
            wide = [
                r
                for r in some
                if r["bias"] == bias and (r["inputs"] or 0) >= WIDE[granule] and r["active"] < 1
            ]
            shares = [
                [
                    (1 - us / r["us"]["dense"]) / (1 - r["active"])
                    for r in wide
                    if (us := (r["us"] | {"floor": r["floor_us"]}).get(name)) is not None
                ]
                for name in names
            ]
            cells = (
                f"{median(s):.2f} ({sum(share >= 0.9 for share in s)})" if s else "-"
                for s in shares
            )
            words = card, str(granule), "yes" if bias else "no"
            table.add_row(*words, f"{active:g}", str(len(wide)), *cells)
    return table


def judged(found: Sequence[Result]) -> Any:
    """The planner's choices, as another model sees them. A winner gains the planner's margin."""
    figures = "f", "pack", "slower", "slower, unbound", "winners", "found", "found by GPU time"
    table = results.new_table(("card",), figures)
    suite = {p.name: p for p in problems("full", "cuda")}
    least_gain = 1 - GPU_MARGIN
    for (card, granule, active), some in comparable(found).items():
        if granule > 1 or card not in FLOPS_PER_BYTE:
            continue
        views = [(r, opinion(posed(suite[r["name"]], active), card)) for r in some]
        packed = [view for r, view in views if r["planned"] == "pack"]
        winners = [r for r, view in views if view.packed <= least_gain]
        by_gpu = [r for r in winners if r["gpu_us"]["pack"] <= least_gain * r["gpu_us"]["dense"]]
        counts = (
            len(packed),
            sum(view.packed > 1 for view in packed),
            sum(view.packed_unbound > 1 for view in packed),
            len(winners),
            sum(r["planned"] == "pack" for r in winners),
            len(by_gpu),
        )
        table.add_row(card, f"{active:g}", *map(str, counts))
    return table


def networks(found: Sequence[Result]) -> Any:
    """What the planner's choices leave of each network's dense gradients; by the GPU alone."""
    by_model: dict[tuple[str, str], dict[float, list[Result]]] = {}
    for (card, granule, active), some in comparable(found).items():
        for r in some if granule == 1 else ():
            model = r["name"].partition("/")[0]
            by_model.setdefault((card, model), {}).setdefault(active, []).append(r)
    shares = [*dict.fromkeys(r["asked_active"] for r in found)]
    figures = [f"f = {f:g}{of}" for f in shares for of in ("", ", GPU")]
    table = results.new_table(("card", "network"), figures)
    for words, by_share in by_model.items():
        cells = (
            f"{as_planned(by_share[f], times):.2f}" for f in shares for times in ("us", "gpu_us")
        )
        table.add_row(*words, *cells)
    return table


def as_planned(found: Sequence[Result], times: str) -> float:
    """The share of the dense time that the planner's choices leave: "us" or "gpu_us"."""
    dense = sum(r["count"] * r[times]["dense"] for r in found)
    choices = (
        r["planned"] if r["planned"] != "dense" or r["active"] == 1 else "masked" for r in found
    )
    return sum(r["count"] * r[times][way] for r, way in zip(found, choices, strict=True)) / dense


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
