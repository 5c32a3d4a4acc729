"""All checks that need a GPU: one command, no network, in one call or in several.

    python bench/gpu_check.py --list
    python bench/gpu_check.py --parts tests
    python bench/gpu_check.py --parts "speed|steps" --out /tmp/h200 --minutes 9

It runs the tests that need a GPU and those of the Triton kernels' machine code; compute-sanitizer,
if it is installed, on the project's own kernels; the weight gradients of real models, while the
planner times its backends; and whole training steps. What a first run has to tell comes first: are
kernels right, is the model of the roofline, and do layers gain where it says so.

Every part is a process with a time limit and a log of its own. If one part fails, the results of
the others remain, and a benchmark that is stopped keeps what it has measured. The exit status is 1
if a part failed or a result was wrong, otherwise 0. A table names the parts that were stopped or
left out, and says how many tests ran of how many. Calls with the same folder add to one another.
The folder of results, bench/results/<GPU> by default, then holds

    gpu_check.json      the machine, how each part ended, every result of the benchmarks
    backward_speed.png  the weight gradients as a figure
    end_to_end.png      the steps as a figure
    planner.json        the measured choices: copied to
                        neq_kernels/wgrad/tables/<GPU>.json they hold on every such GPU
    constants.json, optimizer_speed.json, probe.json    the results of those benchmarks
    *.log               the output of each part
"""

import argparse
import json
import os
import re
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

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, results, step_report, wgrad_report
from bench.lib.environment import device_name, environment
from bench.lib.results import Result
from neq_kernels.device import names

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--hypothesis-profile", "few"]
EXACT = "bfloat16 and (exact or bits or tile)"  # the tests that say the most
SOAK = "ten_thousand"  # the same call, over and over
# models and networks by what they tell, and the seconds that they may take
SPEED = {
    "convnext-t|resnet50|resnet32": 80,  # grouped 7x7, narrow 3x3
    "llama-8b": 60,
    "swin-b|vit-l|gpt2|gpt2-medium": 60,
}
GRANULAR = "llama-8b|vit-l|gpt2-medium"  # where neurons that are active together can gain most
OTHERS = "resnet18|swin-t|vit-s|vit-b|llama-1b"
STEPS = {"resnet50": 45, "gpt2-medium": 45, "swin-b": 45, "llama-1b": 45}
KERNELS = [  # a small problem of each
    "tests/kernels/wgrad/test_grouped.py::test_same_bits_however_often",
    "tests/kernels/wgrad/test_narrow.py::test_same_bits_however_often",
    "tests/kernels/wgrad/test_pack_columns.py::test_same_bits_twice",
    "tests/kernels/similarity/test_fused.py::test_same_bits_however_often",
    "tests/kernels/step/test_fused.py::test_sgd_of_any_share",
    "tests/kernels/step/test_fused.py::test_what_is_not_finite_stays_in_its_element",
]
COMPILED = [  # looked at as machine code
    "tests/kernels/wgrad/test_grouped_compile.py",
    "tests/kernels/similarity/test_fused_compile.py",
    "tests/kernels/step/test_fused_compile.py",
]
FRACTIONS = (0.75, 0.5, 0.25, 0.1)
UNSUPPORTED = "Device not supported"  # compute-sanitizer, in some virtual machines
SUMMARY = "gpu_check.json"
GRACE = 10  # seconds for a part whose time is over to print what it knows


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    seconds: float  # its limit
    written: Path | None = None  # the results that it writes


@dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    ended: str
    tests: str  # "so many of so many" where it is a part of tests
    last_line: str
    revision: str

    @property
    def failed(self) -> bool:
        return self.ended.startswith("failed")


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    facts = environment(torch.device("cuda"))
    results.show_environment(facts)
    name = names.slug(device_name(facts))
    out = given.out or ROOT / "bench/results" / name
    out.mkdir(parents=True, exist_ok=True)
    known = earlier(out, facts)

    # two more are left to stop the last part, and to draw the figures
    end = time.monotonic() + 60 * given.minutes - 2 * GRACE
    every = list(parts(out))
    outcomes = [
        run(part, out, end, facts["revision"]) for part in every if given.parts.search(part.name)
    ]
    known |= {outcome.name: outcome for outcome in outcomes}
    wgrads, granular, steps = (read(out, kind) for kind in ("speed", "granules", "steps"))
    ended = [known[part.name] for part in every if part.name in known]
    summary = {"environment": facts, "parts": [asdict(outcome) for outcome in ended]}
    summary |= {"results": wgrads + granular, "steps": steps}
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")

    results.show_table(endings(ended))
    if wrong := results.faults(wgrads + granular + steps):
        print(*wrong, sep="\n")
    if wgrads:
        results.show_table(medians(wgrads))
        print(wgrad_report.verdict(wgrads, device_name(facts)))
        wgrad_report.plot(wgrads, facts, out / "backward_speed.png")
    if granular:
        results.show_table(medians(granular, "in granules: "))
    if steps:
        step_report.show(steps, facts)
        step_report.plot(steps, facts, out / "end_to_end.png")
    print(f"more in {out}; copy {out / 'planner.json'} to neq_kernels/wgrad/tables/{name}.json")
    return int(bool(wrong) or any(outcome.failed for outcome in outcomes))


def earlier(out: Path, facts: dict[str, str]) -> dict[str, Outcome]:
    """How the parts of earlier calls into this folder ended, by name."""
    file = out / SUMMARY
    if not file.exists():
        return {}
    summary = json.loads(file.read_text())
    there, here = device_name(summary["environment"]), device_name(facts)
    if there != here:
        sys.exit(f"{out} holds results of {there}, this is {here}: give another folder, --out")
    return {part["name"]: Outcome(**part) for part in summary["parts"]}


def parts(out: Path) -> Iterator[Part]:
    """All of them, in the order in which a first run on a machine wants them."""
    # each worker takes one test at a time, so that the first tests come first
    workers = ["-n", "8", "--maxschedchunk", "1"] if find_spec("xdist") else []
    on_gpu = [*PYTEST, *workers, "-m", "gpu"]
    of_kernels = [*dict.fromkeys(kernel.partition("::")[0] for kernel in KERNELS)]
    others = [f"--ignore={file}" for file in of_kernels]
    exact, rest = f"({EXACT}) and not {SOAK}", f"not ({EXACT}) and not {SOAK}"
    yield Part("exact tests of kernels", [*on_gpu, "-k", exact, *of_kernels], 90)
    yield Part("soak", [*PYTEST, "-m", "gpu", "-k", SOAK, *of_kernels], 60)  # one at a time

    def benchmark(name: str, script: str, seconds: float, *flags: object) -> Part:
        file = out / f"{name}.json"
        command = [sys.executable, f"bench/{script}.py", "--device", "cuda", "--json", file, *flags]
        return Part(name, [*map(str, command)], seconds, file)

    yield benchmark("constants", "constants", 30)
    yield Part("other tests of kernels", [*on_gpu, "-k", rest, *of_kernels], 120)
    # a file that lacks a package must not keep the others from running
    yield Part("other gpu tests", [*on_gpu, "--continue-on-collection-errors", *others], 150)
    tuned = "--tune", "--table", out / "planner.json"

    def speed(models: str, seconds: float, kind: str = "speed", *more: object) -> Part:
        flags = "--dtype", "bfloat16", "--suite", "full", "--only", f"^({models})/"
        flags += "--active", "1,.75,.5,.25,.1", "--seconds", 0.5, *tuned, *more
        return benchmark(f"{kind} {models.replace('|', ' ')}", "backward_speed", seconds, *flags)

    def steps(network: str, seconds: float, *mode: str) -> Part:
        flags = "--only", f"^{network}$", "--active", ".5" if mode else ".5,.25,.1"
        name = " ".join(["steps", network, *mode]).replace("--", "")
        return benchmark(name, "end_to_end", seconds, *flags, "--seconds", 5, *mode, *tuned)

    for models, limit in SPEED.items():
        yield speed(models, limit)
    yield speed(GRANULAR, 60, "granules", "--layout", "channels_last", "--granule", 16)
    for network, limit in STEPS.items():
        yield steps(network, limit)
    yield steps("llama-1b", STEPS["llama-1b"], "--granule", "16")
    yield benchmark("optimizer_speed", "optimizer_speed", 30, "--active", ".5,.1", "--seconds", 0.5)
    flags = "--epochs", 3, "--steps", 5, "--seconds", 0.25
    yield benchmark("probe", "probe", 40, *flags)
    yield steps("resnet50", 45, "--graphs")
    yield steps("gpt2", 180, "--compile")
    yield steps("resnet50", 240, "--compile")
    yield speed(OTHERS, 150)
    for tool in ("memcheck", "racecheck"):
        sanitizer = [find("compute-sanitizer"), "--tool", tool, "--error-exitcode", "1"]
        yield Part(tool, [*sanitizer, *PYTEST, "-m", "gpu", *KERNELS], 150)
    yield Part("machine code", [*PYTEST, *workers, *COMPILED], 90)


def find(tool: str) -> str:
    """The path of a tool; its name alone if it is not installed."""
    # unlike setup.py, which must not take an old compiler unasked, it only runs what it finds
    homes = os.environ.get("CUDA_HOME"), "/usr/local/cuda"
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(tool, path=os.pathsep.join(folders)) or tool


def run(part: Part, out: Path, end: float, revision: str) -> Outcome:
    """Run the part within its limit, until ``end`` at the latest; its output goes to its log."""
    started = time.monotonic()
    log = out / f"{part.name}.log"
    for old in filter(None, (log, part.written)):
        old.unlink(missing_ok=True)
    ended = _run(part.command, log, min(part.seconds, end - started))
    text = log.read_text(errors="replace") if log.exists() else ""
    last_line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    if UNSUPPORTED in text:
        ended = f"left out: {UNSUPPORTED}"
    if ended.startswith("stopped"):
        ended = _stopped(ended, last_line)
    seconds = round(time.monotonic() - started, 1)
    outcome = Outcome(part.name, seconds, ended, tests_in(text), last_line, revision)
    print(f"{outcome.seconds:6.0f} s  {part.name}: {ended}", flush=True)
    return outcome


def tests_in(log: str) -> str:
    """How many tests of how many ran, by a log of pytest's; empty if it is no such log."""
    planned = re.search(r"(?:workers \[|collected )(\d+) items?(?: / (\d+) deselected)?", log)
    if planned is None:
        return ""
    last = next((line for line in reversed(log.splitlines()) if " in " in line), "")
    ran = sum(int(n) for n in re.findall(r"(\d+) (?:passed|failed|errors?)\b", last))
    return f"{ran} of {int(planned[1]) - int(planned[2] or 0)}"


def _stopped(ended: str, last_line: str) -> str:
    """The ending of a stopped part, with the counts if it ran tests."""
    counts = re.findall(r"([1-9]\d*) (passed|failed|error)", last_line)
    failed = {"failed", "error"} & {what for _, what in counts}
    told = ", ".join(f"{n} {what}" for n, what in counts)
    return f"{'failed, ' if failed else ''}{ended}{': ' if told else ''}{told}"


def _run(command: list[str], log: Path, seconds: float) -> str:
    if shutil.which(command[0]) is None:
        return f"left out: no {command[0]} here"
    if seconds <= 0:
        return "left out: no time was left"
    # the sanitizer sees the end of a tensor only if the tensor has an allocation of its own
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
    """Heed interrupts: a shell's background process ignores them, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> None:
    """Interrupt first: tests then print which failed, and benchmarks save the planner's choices."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(out: Path, kind: str) -> list[Result]:
    """The results of all parts of a kind, as far as they were written."""
    files = sorted(out.glob(f"{kind} *.json"))
    return [result for file in files for result in json.loads(file.read_text())["results"]]


def endings(outcomes: list[Outcome]) -> Table:
    table = results.new_table(("part",), ("seconds",), ("tests", "ended", "last line"))
    for outcome in outcomes:
        ended = outcome.tests, outcome.ended, outcome.last_line[:120]
        table.add_row(outcome.name, f"{outcome.seconds:.0f}", *ended)
    return table


def medians(wgrads: list[Result], kind: str = "") -> Table:
    """Medians over a model's layers, each in the layout in which its dense gradient is fastest."""
    table = results.new_table((f"{kind}realised at f =",), [*map(str, FRACTIONS)], ("backends",))
    some = [r for r in wgrads if 0 < r["active"] < 1]
    for model, its in wgrad_report.by_model(some).items():
        cells = []
        for fraction in FRACTIONS:
            near = [r["realised"] for r in its if abs(r["active"] - fraction) < 0.04]
            cells.append(results.cell(median(near) if near else None))
        backends = Counter(r["backend"] for r in its).most_common()
        table.add_row(model, *cells, ", ".join(f"{name} {times}" for name, times in backends))
    return table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results")
    parser.add_argument(
        "--minutes", type=cli.positive, default=8.0, help="for all parts of this call"
    )
    parser.add_argument(
        "--parts", type=cli.pattern, default="", metavar="PATTERN", help="of names; see --list"
    )
    parser.add_argument(
        "--list", action="store_true", help="the parts, in order, with their limits"
    )
    given = parser.parse_args(arguments)
    every = list(parts(Path()))
    if given.list:
        print(*(f"{part.seconds:6.0f} s  {part.name}" for part in every), sep="\n")
        parser.exit()
    if not any(given.parts.search(part.name) for part in every):
        parser.error(
            f"argument --parts: {given.parts.pattern!r} matches no part, "
            f"there are {', '.join(part.name for part in every)}"
        )
    if not torch.cuda.is_available():
        parser.error(f"needs a GPU: torch {torch.__version__} sees no CUDA device")
    return given


if __name__ == "__main__":
    sys.exit(main())
