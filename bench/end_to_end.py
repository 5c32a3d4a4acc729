"""How much of the theoretical saving is wall-clock time: whole training steps.

    python bench/end_to_end.py
    python bench/end_to_end.py --only resnet --active .5,.1 --json out.json --plot out.png

For every network, with a share f of the neurons active, these steps are timed in turns:

    dense      the plain model, in the layout in which it is fastest
    none       no weight gradient in any converted layer, and every input gradient
    neq        a random share f of each layer's neurons is active; at 0, autograd also prunes
    realised   (dense - neq) / ((1 - f) (dense - none)): the share of the saving that is wall-clock

and for comparison, at the f nearest to a half:

    masked     dense, then zeros for the frozen neurons: the published way, the same at any f
    gather     as neq, but by a naive gather around the vendor's calls
    layers     requires_grad=False on random layers

and, not compiled and not in graphs, with each share f that is neither 0 nor 1:

    compact    as neq, but active rows are the parameters: see neq.compact

and with a share of the blocks frozen as a prefix (--prefix):

    by hand    requires_grad=False on its parameters, its modules in eval mode
    prefix     a neq.Prefix; f is the share of the weight gradients' FLOPs above it
    cached     with a neq.PrefixCache that has the batch's outputs
    rest       the rest of the network alone

and for a share of the dense step's time (--budget):

    budget     what neq.Budget(unit="step_ms") freezes to have such a step

With --granule 16, aligned granules of 16 neurons are active or frozen as one, in layers that have
whole ones.

bench/lib/step_contenders.py, compact_contenders.py and prefix_contenders.py define the contenders.
Each runs in its fastest layout. A step is forward, backward and the optimizer's update; the update
is also timed apart. Peak memory is that of the tensors which a step takes beyond parameters, batch
and the optimizer's state. Two ceilings say how many times faster a step could be without a prefix:
one by the FLOPs of the network's layers, the other, 3 / (2 + f), as if weight gradients were a
third of the step.

The loss and the gradients of each step are first compared with the dense step's, those of a prefix
with the step by hand, where norms are in eval mode too. If they differ, the step is named instead
of timed, and the run fails in the end.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, compact_contenders, prefix_contenders, results, step_report
from bench.lib.environment import environment
from bench.lib.networks import Network, networks
from bench.lib.peak_memory import peak_bytes
from bench.lib.results import Result
from bench.lib.step_contenders import Backends, Bench, Gate, SettledStep, Step
from bench.lib.timing import FEWEST, Times, each_round
from bench.lib.wgrad_contenders import WrongResultError

DTYPES = ("float32", "bfloat16")
PERCENTILES = ("p20", "ms", "p80")
MEASURED = (
    *(f"{part}_{at}" for part in ("step", "gradients", "update") for at in PERCENTILES),
    *("peak_mib", "ratio", "realised", "realised_gradients"),
)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if given.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for the fastest dense step
    facts = environment(given.device)
    results.show_environment(facts)
    found: list[Result] = []
    bar = tqdm(given.networks.items(), unit="network", disable=None, leave=False)
    with cli.tuned(given):
        for name, network in bar:
            so_far: list[Result] = []
            for so_far in fitted(name, network, given, bar):
                results.save(found + so_far, facts, given.json)  # the next round may be cut off
            found += so_far
    if not found:
        sys.exit("error: no network fits into the memory of this device")
    step_report.show(found, facts)
    if given.plot:
        step_report.plot(found, facts, given.plot)
    results.refuse_wrong(found)


def fitted(
    name: str, network: Network, given: argparse.Namespace, bar: tqdm
) -> Iterator[list[Result]]:
    """``measure`` on as many samples as fit; nothing if a single sample does not fit."""
    samples = network.gpu if given.device.type == "cuda" else network.cpu
    while samples:
        try:
            yield from measure(name, network, samples, given, bar)
            return
        except RuntimeError as error:
            if not _ran_out(error):
                raise
            samples //= 2
        gc.collect()
        torch.cuda.empty_cache()
    bar.write(f"{name} is left out: not one sample fits into memory", file=sys.stderr)


def _ran_out(error: BaseException | None) -> bool:
    """Did memory run out? In a capture, torch raises another error on the way out."""
    return error is not None and (
        isinstance(error, torch.OutOfMemoryError) or _ran_out(error.__context__)
    )


def measure(
    name: str, network: Network, samples: int, given: argparse.Namespace, bar: tqdm
) -> Iterator[list[Result]]:
    """Check every contender, find its fastest layout, then time all of them in turns.

    Yields the results of all rounds so far, after each round.
    """

    def stage(text: str) -> None:
        bar.set_postfix_str(f"{name}: {text}")

    stage("building")
    device, dtype = given.device, getattr(torch, given.dtype)
    torch.manual_seed(0)
    with device:
        model = network.build().train()
    options = {"granule": given.granule, "graphs": given.graphs}
    benches = [
        Bench(name, network, model, layout, samples, device, dtype, **options)
        for layout in network.layouts
    ]
    shares = Shares.of(benches[0])

    steps: Steps = {}
    facts: dict[Entry, Result] = {}
    for bench in benches:
        for entry, step, known in checked(bench, shares, given, stage):
            facts[entry] = {"network": name, "samples": samples} | known
            if not known["wrong"]:
                steps[entry] = step
    rejected = [r | dict.fromkeys(MEASURED) for r in facts.values() if r["wrong"]]

    stage("finding layouts")
    steps = in_best_layout(steps, device)
    stage("measuring memory")
    peaks = measure_memory(steps)
    if given.graphs:
        pool = torch.cuda.graph_pool_handle()
        for step in steps.values():
            step.capture(pool)
    stage("timing")
    for times in time_parts(steps, device, given.seconds):
        timed = [facts[e] | measured(e, times) | {"peak_mib": peaks[e]} for e in steps]
        yield timed + rejected


def checked(
    bench: Bench,
    shares: "Shares",
    given: argparse.Namespace,
    stage: Callable[[str], None],
) -> Iterator[tuple["Entry", Step, Result]]:
    """Each contender's step on one network, and what is known of it before it is timed."""
    if given.compile:
        bench.compile()
    batch, running = (
        Gate(bench, kind(bench, "dense", 1, shares.wgrads)) for kind in (Step, SettledStep)
    )
    steps = {
        Step(bench, *one, shares.wgrads): running if one == ("neq", 0) else batch
        for one in contenders(given)
    }
    if not given.compile and not given.graphs:
        compact = compact_contenders.steps(bench, given.active, shares.wgrads)
        steps |= dict.fromkeys(compact, batch)
        steps |= prefix_contenders.steps(bench, given.prefix, given.budget, shares.wgrads)
    for step, gate in steps.items():
        entry = Entry(step.name, step.active, bench.layout, step.requested)
        stage(f"checking {entry.name}")
        with nullcontext("") if given.compile else Backends(step) as asked:
            wrong = fault(gate, step)
        known = {
            "parameters": sum(p.numel() for p in bench.parameters.values()),
            "contender": entry.name,
            "active": entry.active,
            "requested": entry.requested,
            "granule": given.granule,
            "dtype": given.dtype,
            "layout": entry.layout,
            "mode": given.mode,
            "optimizer": step.optimizer,
            "backends": str(asked),
            "ceiling": 1 / (1 - (1 - entry.active) * shares.of_step),
            "ceiling_of_thirds": 3 / (2 + entry.active),
            "wrong": wrong,
        }
        yield entry, step, known


def fault(gate: Gate, step: Step) -> dict[str, str]:
    """The step's fault by the step's name; empty if the step is right."""
    try:
        gate.admit(step)
    except WrongResultError as error:
        return {step.name: str(error)}
    return {}


class Entry(NamedTuple):
    name: str
    active: float
    layout: str
    requested: float | None = None  # the share of the dense step's time


Steps = dict[Entry, Step]


class Shares(NamedTuple):
    wgrads: dict[str, int]  # FLOPs of the weight gradient of each converted layer
    of_step: float  # the share that these make up of all FLOPs of all layers

    @classmethod
    def of(cls, bench: Bench) -> "Shares":
        account = bench.account()
        wgrads = {name: account.layers[name].dense.wgrad.flops for name in bench.layers}
        dense = account.dense
        everything = dense.forward.flops + dense.dgrad.flops + dense.wgrad.flops
        return cls(wgrads, sum(wgrads.values()) / everything)


def contenders(given: argparse.Namespace) -> Iterator[tuple[str, float]]:
    yield "dense", 1
    yield "none", 0
    yield from (("neq", f) for f in given.active)
    if half := sorted((f for f in given.active if 0 < f < 1), key=lambda f: abs(f - 0.5))[:1]:
        yield "masked", *half
        yield "gather", *half
        if not given.compile:  # the choice of layers would be a graph of its own
            yield "layers", *half


def in_best_layout(steps: Steps, device: torch.device) -> Steps:
    """Each contender's steps in its fastest layout; dense in every layout."""
    typical: dict[tuple[str, str], Entry] = {}  # the one with nearly half of the neurons active
    for entry in sorted(steps, key=lambda e: abs(e.active - 0.5)):
        typical.setdefault((entry.name, entry.layout), entry)
    if len({layout for _, layout in typical}) == 1:
        return steps
    tried = {entry: steps[entry] for entry in typical.values()}
    *_, trial = time_parts(tried, device, 0, fewest=3)
    best: dict[str, Entry] = {}
    for entry in sorted(trial, key=lambda e: trial[e]["step"].p50):
        best.setdefault(entry.name, entry)
    rank = [*dict.fromkeys(entry[:2] for entry in steps)]
    return {
        entry: steps[entry]
        for entry in sorted(steps, key=lambda e: rank.index(e[:2]))
        if entry.name == "dense" or entry.layout == best[entry.name].layout
    }


def measure_memory(steps: Steps) -> dict[Entry, float]:
    """The peak of each step, in MiB."""
    first: dict[tuple[int, str], Step] = {}
    for entry, step in steps.items():
        if entry.active:
            first.setdefault((id(step.model), step.optimizer), step)
    for step in first.values():  # makes the optimizer's state, which remains
        step.prepare()
        step.whole()
    peaks = {}
    for entry, step in steps.items():
        step.prepare()
        peaks[entry] = peak_bytes(step.whole, step.bench.device) / 2**20
    return peaks


def time_parts(
    steps: Steps, device: torch.device, seconds: float, fewest: int = FEWEST
) -> Iterator[dict[Entry, dict[str, Times]]]:
    """Times of each step's gradients, of its update and of both, after each round but the first."""
    names = ("lead", "gradients", "update")
    calls = {(entry, name): getattr(step, name) for entry, step in steps.items() for name in names}
    rounds = each_round(calls, device, seconds, fewest=fewest, together=len(names))
    for taken in islice(rounds, 1, None):
        times = {}
        for entry in steps:
            gradients, update = taken[entry, "gradients"], taken[entry, "update"]
            both = [g + u for g, u in zip(gradients, update, strict=True)]
            parts = {"step": both, "gradients": gradients, "update": update}
            times[entry] = {part: Times.of(values) for part, values in parts.items()}
        yield times


def measured(entry: Entry, times: dict[Entry, dict[str, Times]]) -> Result:
    """One step's times, and what follows from them."""
    dense = min((t for e, t in times.items() if e.name == "dense"), key=lambda t: t["step"].p50)
    none = next((t for e, t in times.items() if e.name == "none"), None)
    spans = {
        f"{part}_{at}": value
        for part, t in times[entry].items()
        for at, value in zip(PERCENTILES, t, strict=True)
    }
    return spans | compare(entry, dense, none, times[entry])


def compare(
    entry: Entry, dense: dict[str, Times], none: dict[str, Times] | None, own: dict[str, Times]
) -> dict[str, float | None]:
    """Compare with dense and with what could be saved: the step, and forward and backward alone."""
    out: dict[str, float | None] = {"ratio": own["step"].p50 / dense["step"].p50}
    for name, part in (("realised", "step"), ("realised_gradients", "gradients")):
        saving = (1 - entry.active) * (dense[part].p50 - none[part].p50) if none else 0
        judged = entry.name not in ("dense", "none") and saving != 0
        out[name] = (dense[part].p50 - own[part].p50) / saving if judged else None
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    add = parser.add_argument
    cli.add_suite(parser, "full")
    cli.add_device(parser)
    add("--dtype", choices=DTYPES, help="of autocast (default: bfloat16 on a GPU, else float32)")
    cli.add_active(parser, ".75,.5,.25,.1,0")
    cli.add_granule(parser)
    cli.add_only(parser, "resnet50 or swin")
    add("--prefix", type=cli.share, default=0.5, metavar="S", help="share of the blocks frozen")
    add(
        "--budget",
        type=cli.fractions,
        default=".75,.5",
        metavar="S,S,...",
        help="shares of the dense step's time that a budget asks for",
    )
    add("--compile", action="store_true", help="compile every model with torch.compile")
    add("--graphs", action="store_true", help="replay each step as CUDA graphs")
    cli.add_table(parser)
    cli.add_seconds(parser, 30, "network")
    cli.add_json(parser)
    cli.add_plot(parser)
    given = parser.parse_args(arguments)

    cli.load_table(parser, given)
    given.active = list(dict.fromkeys(given.active))
    modes = {"compiled": given.compile, "graphs": given.graphs}
    given.mode = ", ".join(mode for mode, on in modes.items() if on) or "eager"
    given.dtype = given.dtype or ("bfloat16" if given.device.type == "cuda" else "float32")
    if given.graphs and given.device.type != "cuda":
        parser.error(f"argument --graphs: CUDA graphs need a GPU, the device is {given.device}")
    suite = networks(given.suite, given.device.type)
    given.networks = cli.chosen(parser, given, f"network of the {given.suite} suite", suite)
    return given


if __name__ == "__main__":
    main()
