"""Train the network of airbench94 or airbench93 on CIFAR-10, whole or by parts.

    python examples/airbench.py --epochs 2 --width 0.25              # made-up images, no download
    python examples/airbench.py --data cifar-10-batches-py           # airbench94's recipe
    python examples/airbench.py --data FOLDER --net 93 --epochs 11 --seeds 0 1 2 --jobs 2
    python examples/airbench.py --data FOLDER --arm scheduled --freeze 0.4 0.7
    python examples/airbench.py --data FOLDER --task second-half --images 500 --batch 50 --lr 0.3
    python examples/airbench.py --data FOLDER --arm policy --policy BottomUp --options eps=0.1
    python examples/airbench.py --data FOLDER --task then-relabelled --arm known  # three in turn

Each run writes a JSON file to --output, named after the arm and the seed; of several tasks in turn
each has one, and all but the last are named after the task too. A run that was stopped goes on from
its last epoch; one that has ended is not made again. Seconds are the processor's on a CPU, the
device's on a GPU, and evaluating is not among them. Of several tasks, they are of all so far.
"""

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli
from examples.airbench_arms import ARMS, POLICIES
from examples.airbench_net import PARTS, WIDTHS
from examples.airbench_run import Run
from examples.airbench_settings import Placed, Result, Settings, Where, finished, lineage
from examples.airbench_tasks import TASKS
from examples.cifar_data import load


def run_all(
    wanted: list[Settings], where: Where, data: Path | None, cache: Path | None, jobs: int
) -> list[Result]:
    """The results of these runs. Those that are missing are made, so many side by side in
    processes of their own.
    """
    missing = [settings for settings in wanted if not finished(settings, where.output)]
    lines = [lineage(settings, where) for settings in missing]
    if lines and data and cache:
        load(data, cache=cache)  # decoded once, before several processes would do it
    starts = dict.fromkeys(run for line in lines for run in line if run[1] != where)
    own = [[run for run in line if run[1] == where] for line in lines]
    for in_turn in ([[start] for start in starts], own):
        for settings, accuracy in _each(in_turn, data, cache, jobs):
            tqdm.write(f"{settings.title}: {settings.split} {accuracy:.2%}")
    results = [finished(settings, where.output) for settings in wanted]
    return [result for result in results if result is not None]


def _each(
    lines: list[list[Placed]], data: Path | None, cache: Path | None, jobs: int
) -> Iterator[tuple[Settings, float]]:
    """Make what is missing of these lines, each of which is made in turn."""
    missing = [[run for run in line if not finished(run[0], run[1].output)] for line in lines]
    # with more threads than cores, runs side by side would wait for each other
    share = max(1, torch.get_num_threads() // jobs)
    todo = [(line, data, cache, share, i % jobs) for i, line in enumerate(filter(None, missing))]
    if jobs == 1:
        yield from chain.from_iterable(map(_line, todo))
        return
    spawn = multiprocessing.get_context("spawn")
    # an executor tells when a process was killed; a Pool would wait for its run for ever
    with ProcessPoolExecutor(jobs, spawn, tqdm.set_lock, (spawn.RLock(),)) as pool:
        try:
            yield from chain.from_iterable(pool.map(_line, todo))
        except BaseException:  # Ctrl-C, a kill, an error: don't wait for the other runs
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _line(
    todo: tuple[list[Placed], Path | None, Path | None, int, int],
) -> list[tuple[Settings, float]]:
    line, path, cache, threads, position = todo
    torch.set_num_threads(threads)
    data, accuracies = load(path, cache=cache), []
    for settings, where in line:
        if where.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        where.output.mkdir(parents=True, exist_ok=True)
        accuracies.append((settings, Run(settings, data, where).go(position)["accuracy"]))
    return accuracies


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser()
    given = parser.parse_args(arguments)
    amp = given.device.type == "cuda" if given.amp is None else given.amp
    values = {key: value for key, value in vars(given).items() if key in vars(Settings())}
    values |= {key: tuple(values[key]) for key in ("freeze", "parts", "options")}
    base = Settings(**values)
    wanted = [replace(base, seed=seed) for seed in given.seeds]
    where = Where(given.output, given.output / "pretrained", given.device, amp)
    try:
        for result in run_all(wanted, where, given.data, given.cache, given.jobs):
            seconds = sum(result["seconds"].values())
            print(
                f"{Settings(**result['settings']).title}: {result['settings']['split']} "
                f"{result['accuracy']:.2%}, {result['accuracy_of_one_view']:.2%} of one view, "
                f"{seconds:.1f} s"
            )
            for measure in ("learned", "kept"):
                if tasks := result.get(measure):
                    each = (f"{task} {accuracy:.2%}" for task, accuracy in tasks.items())
                    print(f"  {measure}: {', '.join(each)}")
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))


def option(text: str) -> tuple[str, float | str]:
    """NAME=VALUE; a value that is no number is a word."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def new_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add, default = parser.add_argument, Settings()
    add("--arm", choices=ARMS, default="dense", help=f"one of {', '.join(ARMS)}")
    add("--task", choices=TASKS, default="scratch", help=f"one of {', '.join(TASKS)}")
    add("--pretrain-epochs", type=cli.positive, default=default.pretrain_epochs)
    add("--pretrain-images", type=cli.whole, metavar="N", help="(default: all)")
    add(
        "--pretrained",
        type=cli.whole,
        default=0,
        metavar="N",
        help="so many, in turns (default: each its own)",
    )
    add("--name", default="", help="of the result's file (default: the arm)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    add("--net", choices=WIDTHS, default=default.net)
    add("--width", type=cli.positive, default=1.0, help="a factor for the channels")
    add("--images", type=cli.whole, metavar="N", help="to train on (default: all)")
    add("--epochs", type=cli.positive, default=default.epochs, help="also parts of one")
    add("--batch", type=cli.whole, default=default.batch)
    add("--lr", type=cli.positive, default=1.0, help="a factor for the recipe's rate")
    add("--augment", action=argparse.BooleanOptionalAction, default=True)
    add("--split", choices=("test", "validation"), default="test", help="to evaluate")
    add("--evaluated", type=cli.whole, metavar="N", help="images of that split (default: all)")
    add("--curve", action="store_true", help="evaluate after each epoch")
    add(
        "--freeze", type=cli.share, nargs="+", default=default.freeze, metavar="SHARE",
        help="scheduled: the shares of the run at which one more block is frozen; "
        "head-then-all: the share for which the head trains alone",
    )  # fmt: skip
    add(
        "--parts", nargs="+", choices=PARTS, default=default.parts, metavar="PART",
        help=f"only: those that train, of {', '.join(PARTS)}",
    )  # fmt: skip
    add("--policy", choices=POLICIES, default=default.policy, help="policy: which one of neq")
    add(
        "--options", nargs="+", type=option, default=default.options, metavar="NAME=VALUE",
        help="policy: its options, such as eps=0.1, and warmup=0",
    )  # fmt: skip
    add("--cached", action="store_true", help="policy: with a cache of the frozen prefix")
    add("--bank", type=cli.whole, default=default.bank, metavar="N", help="draws in the cache")
    add("--stop", type=cli.share, default=default.stop, help="end after this share of the schedule")
    add_place(parser, Path("runs/airbench"))
    return parser


def add_place(parser: argparse.ArgumentParser, output: Path) -> None:
    """Options of where runs are made, and from which data."""
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="see examples/cifar_data.py")
    add("--cache", type=Path, metavar="FOLDER", help="keeps the images decoded")
    add("--output", type=Path, default=output, metavar="FOLDER")
    text = "runs side by side, which share the threads"
    add("--jobs", type=cli.whole, default=1, metavar="N", help=text)
    cli.add_device(parser)
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that kill ends the runs too
    main()
