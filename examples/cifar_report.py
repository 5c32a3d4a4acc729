"""The summary of the runs of examples/cifar10.py: a table and a plot."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from bench.lib.results import Result, cell, new_table

Run = Sequence[Result]  # one result for each epoch
Runs = Mapping[str, Mapping[int, Run]]  # by policy and seed

STOPPED = "equilibrium, stopped"
TIMES = ("forward", "backward", "optimizer", "probe")


def with_stopped(runs: Runs, share: float) -> Runs:
    """The runs, and those at equilibrium cut off where this share of the neurons is first frozen.

    Such a run needs no training of its own: until then it is the same run.
    """
    stopped = {
        seed: run[: 1 + next(i for i, result in enumerate(run) if result["frozen"] >= share)]
        for seed, run in runs.get("equilibrium", {}).items()
        if any(result["frozen"] >= share for result in run)
    }
    return {**runs, STOPPED: stopped} if stopped else runs


def target(runs: Runs) -> float | None:
    """The accuracy to reach: a point less than dense has in the end."""
    dense = runs.get("dense", {})
    return mean(run[-1]["accuracy"] for run in dense.values()) - 0.01 if dense else None


def summary(runs: Runs, epochs: int) -> list[Result]:
    """One result for each policy. Savings are shares of the whole schedule of ``epochs``, dense."""
    aim, dense = target(runs), runs.get("dense", {})
    return [
        {"policy": name, "seeds": list(seeds)}
        | _averages([*seeds.values()], epochs)
        | _against_dense(seeds, dense)
        | _time_to_aim([*seeds.values()], aim)
        for name, seeds in runs.items()
    ]


def _averages(runs: Sequence[Run], epochs: int) -> Result:
    accuracies = [run[-1]["accuracy"] for run in runs]
    costs = {
        key: mean(_sum(run, key) for run in runs) / epochs
        for key in ("wgrad", "flops", "published_mflops")
    }
    seconds = {
        f"{phase}_s": mean(sum(result["seconds"][phase] for result in run) for run in runs)
        for phase in runs[0][0]["seconds"]
    }
    return {
        "epochs": mean(map(len, runs)),
        "accuracy": mean(accuracies),
        "accuracy_sd": _deviation(accuracies),
        "wgrad_saved": 1 - costs["wgrad"],
        "flops_saved": 1 - costs["flops"],
        "published_mflops": costs["published_mflops"],
        **seconds,
        "total_s": mean(sum(map(_seconds, run)) for run in runs),
    }


def _against_dense(seeds: Mapping[int, Run], dense: Mapping[int, Run]) -> Result:
    # a seed gives all policies the same start and the same order of images: compare one by one
    against = [
        run[-1]["accuracy"] - dense[seed][-1]["accuracy"]
        for seed, run in seeds.items()
        if seed in dense
    ]
    return {
        "against_dense": mean(against) if against else None,
        "against_dense_sd": _deviation(against),
    }


def _time_to_aim(runs: Sequence[Run], aim: float | None) -> Result:
    reached = [_time_to(run, aim) for run in runs] if aim is not None else []
    return {"aim": aim, "to_aim_s": mean(reached) if reached and None not in reached else None}


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _sum(run: Run, key: str) -> float:
    return float(sum(result[key] for result in run))


def _seconds(result: Result) -> float:
    return float(sum(result["seconds"].values()))


def _time_to(run: Run, accuracy: float) -> float | None:
    spent = 0.0
    for result in run:
        spent += _seconds(result)
        if result["accuracy"] >= accuracy:
            return spent
    return None


def table(policies: Sequence[Result]) -> Table:
    policy, *figures = _cells(policies[0])
    out = new_table((policy,), figures)
    for result in policies:
        out.add_row(*_cells(result).values())
    return out


def _cells(result: Result) -> dict[str, str]:
    return {
        "policy": result["policy"],
        "runs": str(len(result["seeds"])),
        "epochs": f"{result['epochs']:.3g}",
        "test accuracy": _percent(result["accuracy"], result["accuracy_sd"]),
        "against dense": _percent(result["against_dense"], result["against_dense_sd"], "+"),
        "wgrad saved": f"{result['wgrad_saved']:.1%}",
        "FLOPs saved": f"{result['flops_saved']:.1%}",
        "published MFLOPs": f"{result['published_mflops']:.1f}",
        **{f"{phase} s": f"{result[f'{phase}_s']:.1f}" for phase in TIMES},
        "all s": f"{result['total_s']:.1f}",
        f"s to {cell(result['aim'], '.1%')}": cell(result["to_aim_s"], ".1f"),
    }


def _percent(value: float | None, deviation: float | None, sign: str = "") -> str:
    return cell(value, f"{sign}.2%") + ("" if deviation is None else f" ± {deviation:.2%}")


def plot(runs: Runs, title: str, file: Path) -> None:
    """Accuracy by epoch and by the cost of weight gradients; bars: a deviation over seeds."""
    from matplotlib.figure import Figure  # takes a second, and only this function needs it

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    by_epoch, by_cost = figure.subplots(1, 2, sharey=True)
    for name, seeds in runs.items():
        if name == STOPPED:  # a cross on the curve of the run that it cuts off
            for run in seeds.values():
                label = name if run is next(iter(seeds.values())) else None
                cost = _sum(run, "wgrad")
                for axes, x in ((by_epoch, len(run)), (by_cost, cost)):
                    axes.plot(x, run[-1]["accuracy"], "kx", label=label, zorder=3)
            continue
        epochs = [*zip(*seeds.values(), strict=False)]  # as many as the shortest run has
        accuracy = [mean(result["accuracy"] for result in epoch) for epoch in epochs]
        bars = None
        if len(seeds) > 1:
            bars = [stdev(result["accuracy"] for result in epoch) for epoch in epochs]
        spent = [*accumulate(mean(result["wgrad"] for result in epoch) for epoch in epochs)]
        style = {"yerr": bars, "capsize": 2, "marker": ".", "label": name}
        by_epoch.errorbar([epoch[0]["epoch"] for epoch in epochs], accuracy, **style)
        by_cost.errorbar(spent, accuracy, **style)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy")
    by_cost.set(xlabel="weight gradients computed, in dense epochs")
    by_epoch.legend(fontsize=8)
    for axes in (by_epoch, by_cost):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file)
