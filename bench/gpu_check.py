"""Everything that only a GPU can tell, in one command, a few minutes, and without a network.

    python bench/gpu_check.py
    python bench/gpu_check.py --out /tmp/h200 --minutes 5

The tests that need a GPU, compute-sanitizer on the project's own kernels, the weight gradients of
real models while the planner times its backends, whole training steps, and the other tests. Every
part is a process with a time limit and a log of its own: what one loses, the others keep, and a
benchmark that is stopped keeps what it has measured. In the folder of results, bench/results/<GPU>
by default:

    gpu_check.json      the machine, how each part ended, every row of the benchmarks
    backward_speed.png  the weight gradients as a figure
    end_to_end.png      the steps as a figure
    planner.json        the choices that were measured: as neq_kernels/tables/<GPU>.json they are
                        everybody's on such a GPU
    optimizer_speed.json, probe.json    what those benchmarks measured
    *.log               what each part printed
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import options, report, step_report
from bench.timing import device_name, environment
from neq_kernels import machine

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
# what comes first is timed, should time run out
MODELS = ["resnet50|resnet32", "vit|gpt2", "llama", "swin", "resnet18|convnext"]
NETWORKS = ["resnet50", "gpt2-medium", "swin-b", "llama-1b"]
KERNELS = [  # a small problem of each
    "tests/test_fused.py::test_same_bits_however_often",
    "tests/test_grouped.py::test_same_bits_however_often",
    "tests/test_narrow.py::test_same_bits_however_often",
    "tests/test_pack_columns.py::test_same_bits_twice",
    "tests/test_triton_similarity.py::test_same_bits_however_often",
    "tests/test_triton_step.py::test_sgd_of_any_share",
    "tests/test_triton_step.py::test_what_is_not_finite_stays_in_its_element",
]
FRACTIONS = (0.5, 0.25, 0.1)
GRACE = 5  # seconds in which a part whose time is over may say what it knows


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    until: float  # of all the time, the share that is over when it has to end


@dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    ended: str
    last_line: str


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    facts = environment(torch.device("cuda"))
    report.show_environment(facts)
    name = machine.slug(device_name(facts))
    out = given.out or ROOT / "bench/results" / name
    out.mkdir(parents=True, exist_ok=True)

    start, seconds = time.monotonic(), 60 * given.minutes - GRACE
    outcomes = [run(part, out, start + part.until * seconds) for part in parts(out, seconds)]
    rows, steps = results(out, "speed"), results(out, "steps")
    summary = {"environment": facts, "parts": [asdict(o) for o in outcomes]}
    summary |= {"results": rows, "steps": steps}
    (out / "gpu_check.json").write_text(json.dumps(summary, indent=1) + "\n")

    console = Console(width=report.WIDTH, highlight=False)
    console.print(ending(outcomes))
    if rows:
        console.print(by_model(rows))
        print(report.verdict(rows, device_name(facts)))
        report.plot(rows, facts, out / "backward_speed.png")
    if steps:
        step_report.show(steps, facts)
        step_report.plot(steps, facts, out / "end_to_end.png")
    print(f"more in {out}; {out / 'planner.json'} is to be neq_kernels/tables/{name}.json")
    return int(any(outcome.ended != "passed" for outcome in outcomes))


def parts(out: Path, seconds: float) -> Iterator[Part]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    workers = ["-n", "8"] if find_spec("xdist") else []
    yield Part("gpu tests", [*pytest, *workers, "-m", "gpu"], until=0.25)
    for tool, until in (("memcheck", 0.35), ("racecheck", 0.45)):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        yield Part(tool, [*sanitizer, *pytest, "-m", "gpu", *KERNELS], until)
    for models in MODELS:
        name = f"speed {models.replace('|', ' ')}"
        (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
        speed = [sys.executable, "bench/backward_speed.py", "--device", "cuda"]
        speed += ["--dtype", "bfloat16", "--suite", "full", "--only", models]
        speed += ["--active", "1,.5,.25,.1", "--seconds", str(seconds / 1000)]
        speed += ["--tune", "--table", str(out / "planner.json")]
        yield Part(name, [*speed, "--json", str(out / f"{name}.json")], until=0.6)
    for i, network in enumerate(NETWORKS, 1):
        name = f"steps {network}"
        (out / f"{name}.json").unlink(missing_ok=True)
        steps = [sys.executable, "bench/end_to_end.py", "--device", "cuda", "--active", ".5,.25,.1"]
        steps += ["--only", f"^{network}$", "--seconds", str(seconds / 100)]
        steps += ["--tune", "--table", str(out / "planner.json")]
        until = 0.6 + 0.3 * i / len(NETWORKS)
        yield Part(name, [*steps, "--json", str(out / f"{name}.json")], until)
    for name, flags in (
        ("optimizer_speed", ["--active", ".5,.1", "--seconds", str(seconds / 1000)]),
        ("probe", ["--epochs", "3", "--steps", "5", "--seconds", str(seconds / 2000)]),
    ):
        script = [sys.executable, f"bench/{name}.py", "--device", "cuda", *flags]
        yield Part(name, [*script, "--json", str(out / f"{name}.json")], until=0.94)
    yield Part("other tests", [*pytest, *workers, "-m", "not gpu"], until=1)


def run(part: Part, out: Path, end: float) -> Outcome:
    """How the part ended, which is at ``end`` at the latest; its output goes to its log."""
    started = time.monotonic()
    log = out / f"{part.name}.log"
    log.unlink(missing_ok=True)
    ended = _run(part.command, log, end - started)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    outcome = Outcome(part.name, round(time.monotonic() - started, 1), ended, last_line)
    print(f"{outcome.seconds:6.0f} s  {part.name}: {ended}", flush=True)
    return outcome


def _run(command: list[str], log: Path, seconds: float) -> str:
    if shutil.which(command[0]) is None:
        return f"left out: no {command[0]} on the PATH"
    if seconds <= 0:
        return "left out: no time was left"
    # the sanitizer sees what lies beyond a tensor only if its memory is its own
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--tool" in command else None
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=_listen,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"stopped after {seconds:.0f} s"
    return "passed" if code == 0 else f"failed with exit status {code}"


def _listen() -> None:
    """What a shell runs in the background ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """Interrupted, tests still say which failed, and the planner's choices are saved."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def results(out: Path, kind: str) -> list[Row]:
    """The rows of all parts of a kind, as far as those came."""
    files = sorted(out.glob(f"{kind} *.json"))
    return [row for file in files for row in json.loads(file.read_text())["results"]]


def ending(outcomes: list[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("part", "seconds", "ended", "last line"):
        table.add_column(heading)
    for outcome in outcomes:
        cells = outcome.name, f"{outcome.seconds:.0f}", outcome.ended, outcome.last_line[:120]
        table.add_row(*cells)
    return table


def by_model(rows: list[Row]) -> Table:
    """Medians over a model's layers, each in the layout in which its dense gradient is fastest."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("realised at f =")
    for fraction in FRACTIONS:
        table.add_column(str(fraction), justify="right")
    table.add_column("backends")
    models: dict[str, list[Row]] = {}
    for row in rows:
        if row["layout"] == row["dense_layout"] and 0 < row["active"] < 1:
            models.setdefault(row["name"].partition("/")[0], []).append(row)
    for model, its_rows in models.items():
        medians = []
        for fraction in FRACTIONS:
            near = [r["realised"] for r in its_rows if abs(r["active"] - fraction) < 0.04]
            medians.append(f"{median(near):.2f}" if near else "-")
        backends = Counter(r["backend"] for r in its_rows).most_common()
        table.add_row(model, *medians, ", ".join(f"{name} {times}" for name, times in backends))
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go")
    parser.add_argument("--minutes", type=options.positive, default=8.0, help="at most, altogether")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"needs a GPU: torch {torch.__version__} sees no CUDA device")
    return given


if __name__ == "__main__":
    sys.exit(main())
