"""Train ResNet-32 on CIFAR-10 with neurons at equilibrium frozen, beside what a sceptic would try.

    python examples/cifar10.py --epochs 20                        # made-up images, no download
    python examples/cifar10.py --data cifar-10-batches-py         # as published, 250 epochs
    python examples/cifar10.py --data FOLDER --policy equilibrium budget --seeds 0 1 2
    python examples/cifar10.py --data FOLDER --compare --seeds 0 1 2

The last is the whole comparison: dense; equilibrium; as many active neurons as that, but random
ones; a dense run short enough to need no more weight gradients; and equilibrium stopped when nearly
all neurons are frozen. Results, histories and plots go to --output.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli
from bench.lib.environment import environment
from bench.lib.results import Result, show_environment, show_table
from examples import cifar_report
from examples.cifar_controls import COMPARISON, DENSE, POLICIES, schedule
from examples.cifar_data import Data, Images, Normal, augment, load
from examples.clock import Clock
from examples.resnet import resnet32
from neq import history, report

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
DROPS = 0.4, 0.6  # of the epochs: the learning rate falls to a tenth
PHASES = ("data", "forward", "backward", "optimizer", "probe")

NOTES = """\
Saved: the share of the whole schedule's work with all neurons active, by neq.account. Published
MFLOPs: the paper's backprop FLOPs for an image and step, averaged over the whole schedule. Seconds
are the processor's on a CPU, the device's on a GPU. Images decoded from JPEG are not the original
ones: compare accuracies on them with each other only."""

MAKE_ANOTHER_RUN = ("limit", "test_limit", "batch", "probe", "eps", "mu", "fraction", "amp")
# no compiling, or a mode of torch.compile
COMPILE = "none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"


class Run:
    """A model, its optimizer and its Controller, stopped and resumed between any two epochs."""

    def __init__(self, name: str, seed: int, given: argparse.Namespace, data: Data) -> None:
        device = given.device
        self.name, self.seed, self.given = name, seed, given
        self.epochs = schedule(name, given, seed)
        self.results: list[Result] = []  # one for each epoch
        # the first images, one class after the other, are held out: nothing trains on them
        held_out, self.train = (
            Images(*(t[part].to(device) for t in data.train))
            for part in (slice(given.probe), slice(given.probe, None))
        )
        self.test = Images(*(t.to(device) for t in data.test))
        self.normal = Normal(self.train.pixels)
        self.steps = len(self.train.labels) // given.batch  # of whole batches only
        self.clock = Clock(device, PHASES)

        torch.manual_seed(seed)
        model = resnet32(len(data.classes)).to(device, memory_format=torch.channels_last)
        neq.convert(model)
        self.optimizer = neq.optim.SGD(
            model.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        policy = POLICIES[name](given, seed)
        probe = self.normal(held_out.pixels)
        self.control = neq.Controller(
            model,
            probe=probe if policy.measures else None,
            example_inputs=probe[:1],
            policy=policy,
            optimizer=self.optimizer,
            history=given.output / f"{name}-{seed}.jsonl",
        )
        self.model, self.example = model, probe[:1]
        self.call = model if given.compile == "none" else torch.compile(model, mode=given.compile)
        self.amp = torch.autocast(device.type, torch.bfloat16, enabled=given.amp)

        self.file = given.output / f"{name}-{seed}.pt"
        # what tells this run from others: a checkpoint of another run is refused
        self.what = {"data": data.source, "epochs": self.epochs}
        self.what |= {key: getattr(given, key) for key in MAKE_ANOTHER_RUN}
        if given.resume and self.file.is_file():
            self.load()

    def go(self) -> list[Result]:
        """Train for all epochs that are still to come. Returns the results of all."""
        title, total = f"{self.name}, seed {self.seed}", self.epochs * self.steps
        done = len(self.results)
        with tqdm(total=total, initial=done * self.steps, desc=title, disable=None) as bar:
            for epoch in range(done, self.epochs):
                result = self.epoch(epoch, bar)
                record = self.control.history.records[-1]
                accuracy = f"test {result['accuracy']:.2%}"
                tqdm.write(f"{title}: {record}, loss {result['loss']:.3f}, {accuracy}")
                self.results.append(result)
                self.save()
        return self.results

    def epoch(self, epoch: int, bar: "tqdm[Any]") -> Result:
        lr = LR * 0.1 ** sum(epoch >= drop * self.epochs for drop in DROPS)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        costs = neq.account(self.model, self.example)
        # order and augmentation depend on seed and epoch alone, so there is no state to save
        generator = torch.Generator(self.given.device)
        generator.manual_seed(1_000_000 * self.seed + epoch)
        images, device = len(self.train.labels), self.given.device
        shuffled = torch.randperm(images, device=device, generator=generator)
        loss_sum = torch.zeros((), device=device)
        self.model.train()
        for chosen in shuffled[: self.steps * self.given.batch].split(self.given.batch):
            with self.clock("data"):
                x = self.normal(augment(self.train.pixels[chosen], generator))
                y = self.train.labels[chosen]
            with self.clock("forward"), self.amp:
                loss = F.cross_entropy(self.call(x), y)
            self.optimizer.zero_grad()
            with self.clock("backward"):
                loss.backward()
            with self.clock("optimizer"):
                self.optimizer.step()
            loss_sum += loss.detach()
            bar.update()
        with self.clock("probe"):
            record = self.control.step()
        return {
            "epoch": record.epoch,
            "lr": lr,
            "loss": float(loss_sum) / self.steps,
            "accuracy": self.accuracy(),
            "frozen": record.frozen_share,  # in the next epoch; the costs are this epoch's
            "wgrad": costs.now.wgrad.flops / costs.dense.wgrad.flops,
            "flops": costs.now.total.flops / costs.dense.total.flops,
            "published_mflops": costs.now.published_backprop_flops / 1e6,
            "seconds": self.clock.take(),
        }

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of the test images that the model gets right."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.given.device)
        for pixels, labels in zip(*(t.split(500) for t in self.test), strict=True):
            with self.amp:
                right += (self.model(self.normal(pixels)).argmax(1) == labels).sum()
        return int(right) / len(self.test.labels)

    def save(self) -> None:
        state = {
            "what": self.what,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "control": self.control.state_dict(),
            "results": self.results,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)  # a run that is stopped meanwhile leaves the checkpoint before

    def load(self) -> None:
        state = torch.load(self.file, map_location=self.given.device, weights_only=True)
        if state["what"] != self.what:
            other = {key: value for key, value in state["what"].items() if value != self.what[key]}
            given = {key: self.what[key] for key in other}
            raise ValueError(f"{self.file} is of another run, with {other} instead of {given}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.control.load_state_dict(state["control"])
        self.results = state["results"]


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser()
    given = parser.parse_args(arguments)
    on_gpu = given.device.type == "cuda"
    if given.amp is None:
        given.amp = on_gpu
    if given.compile is None:
        given.compile = "default" if on_gpu else "none"

    facts = environment(given.device)
    show_environment(facts)
    try:
        given.output.mkdir(parents=True, exist_ok=True)
        compared = compare(given)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    text = json.dumps({"environment": facts, **compared}, indent=1)
    (given.output / "results.json").write_text(text + "\n")


def new_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--policy", nargs="+", choices=POLICIES, default=["equilibrium"], metavar="NAME",
        help=f"one after the other: {', '.join(POLICIES)} (default: equilibrium)",
    )  # fmt: skip
    which.add_argument(
        "--compare", action="store_const", dest="policy", const=COMPARISON,
        help=f"the same as --policy {' '.join(COMPARISON)}",
    )  # fmt: skip
    parser.add_argument("--epochs", type=cli.whole, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="see examples/cifar_data.py")
    parser.add_argument("--limit", type=cli.whole, metavar="N", help="training images in all")
    parser.add_argument("--test-limit", type=cli.whole, metavar="N", help="test images in all")
    parser.add_argument("--batch", type=cli.whole, default=100)
    parser.add_argument("--probe", type=cli.whole, default=50, metavar="N", help="images held out")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--mu", type=float, default=0.5)
    parser.add_argument(
        "--fraction", type=cli.share, default=0.5,
        help="that is active, for budget, random, lowest-velocity and fixed",
    )  # fmt: skip
    parser.add_argument(
        "--stop-at", type=cli.share, default=0.95, metavar="SHARE",
        help="of the neurons frozen, at which stopping early stops (default: 0.95)",
    )  # fmt: skip
    parser.add_argument(
        "--history", type=Path, metavar="FILE",
        help="the run to match, for random-equal-flops and short (default: equilibrium's with the "
        "same seed in --output)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"), metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --output")
    cli.add_device(parser)
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)"
    )
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE", choices=COMPILE,
        help=f"one of {', '.join(COMPILE)} (default: default on a GPU, none on a CPU)",
    )  # fmt: skip
    return parser


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Make all the runs, print their summary and draw it."""
    wanted = None if given.limit is None else given.limit + given.probe
    data = load(given.data, wanted, given.test_limit)
    if given.probe + given.batch > len(data.train.labels):
        raise ValueError(
            f"--batch {given.batch} and --probe {given.probe} need {given.probe + given.batch} "
            f"training images, {data.source} gives {len(data.train.labels)}"
        )
    sizes = f"{len(data.train.labels) - given.probe} to train on, {len(data.test.labels)} to test"
    print(f"{data.source}: {sizes}")
    if given.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    runs: dict[str, dict[int, list[Result]]] = {name: {} for name in given.policy}
    for seed in given.seeds:
        for name in given.policy:
            runs[name][seed] = Run(name, seed, given, data).go()
            if name not in DENSE:
                records = history.read(given.output / f"{name}-{seed}.jsonl")
                report.write(records, given.output / f"{name}-{seed}.png")
    everything = cifar_report.with_stopped(runs, given.stop_at)
    summary = cifar_report.summary(everything, given.epochs)
    show_table(cifar_report.table(summary))
    print(NOTES)
    if "equilibrium" in runs and len(everything.get(cifar_report.STOPPED, {})) < len(given.seeds):
        print(f"not every run had {given.stop_at:.0%} of its neurons frozen at once")
    cifar_report.plot(everything, f"ResNet-32, {sizes}", given.output / "accuracy.png")
    return {
        "command": ["python", *sys.argv],
        "options": {key: str(value) for key, value in vars(given).items()},
        "data": f"{data.source}: {sizes}",
        "summary": summary,
        "results": [
            {"policy": name, "seed": seed, "epochs": epochs}
            for name, seeds in runs.items()
            for seed, epochs in seeds.items()
        ],
    }


if __name__ == "__main__":
    main()
