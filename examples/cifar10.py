"""Train ResNet-32 on CIFAR-10 while neurons at equilibrium rest, beside what a sceptic would try.

    python examples/cifar10.py --epochs 20                        # made-up images, no download
    python examples/cifar10.py --data cifar-10-batches-py         # as published, 250 epochs
    python examples/cifar10.py --data FOLDER --policy equilibrium budget --seeds 0 1 2
    python examples/cifar10.py --data FOLDER --compare --seeds 0 1 2

The last is the whole comparison: dense; equilibrium; as many neurons as that, but random ones; a
dense run short enough to need no more weight gradients; and equilibrium stopped where nearly
everything rests. Results, histories and plots go to --output.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench import options
from bench.report import WIDTH, show_environment
from bench.timing import environment
from examples import cifar_report
from examples.cifar_data import Data, Images, augment, load
from examples.resnet import resnet32
from neq import history, report

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
DROPS = 0.4, 0.6  # of the epochs: the learning rate falls to a tenth
COMPARISON = ["dense", "equilibrium", "random-equal-flops", "short"]
DENSE = "dense", "short"  # nobody ever rests, so there is nothing to draw
PHASES = ("data", "forward", "backward", "optimizer", "probe")

NOTES = """\
Saved: of what the whole schedule computes when everything trains, by neq.account. Published MFLOPs:
what the paper calls backprop FLOPs, for an image and step, on average over the whole schedule.
Seconds are the processor's on a CPU, the device's on a GPU. Images decoded from JPEG are not the
original ones: compare accuracies on them with each other only."""

# options that make another run
RUN = ("limit", "test_limit", "batch", "probe", "eps", "mu", "fraction", "amp")

Row = dict[str, Any]  # one epoch of one run


class Recorded(neq.Policy):
    """Of each layer as many neurons as trained in a recorded run, epoch by epoch, but random ones.

    So the weight gradients cost the same, and all that differs is who gets them.
    """

    measures = False

    def __init__(self, records: Sequence[history.EpochRecord], seed: int) -> None:
        self.counts = {r.epoch: {layer.name: layer.active for layer in r.layers} for r in records}
        self._generator = torch.Generator().manual_seed(seed)

    def choose(self, layers: Sequence[neq.Motion], epoch: int) -> list[Tensor]:
        return [
            torch.randperm(len(layer), generator=self._generator)[: self.counts[epoch][layer.name]]
            for layer in layers
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())


def recorded(given: argparse.Namespace, seed: int) -> list[history.EpochRecord]:
    """The equilibrium run that this one has to match."""
    file = given.history or given.output / f"equilibrium-{seed}.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} is not there: run --policy equilibrium first, or give --history")
    records = history.read(file)
    if len(records) != given.epochs:
        raise ValueError(
            f"{file} holds {len(records)} epochs, and this run is to have {given.epochs}"
        )
    return records


def fixed(given: argparse.Namespace, seed: int) -> neq.Policy:
    """The same share of each layer all along, drawn once."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        name: len(layer.weight)
        for name, layer in resnet32().named_modules()
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
    }
    return neq.Fixed(
        {
            name: torch.randperm(n, generator=generator)[: round(given.fraction * n)]
            for name, n in sizes.items()
        }
    )


POLICIES: dict[str, Callable[[argparse.Namespace, int], neq.Policy]] = {
    "dense": lambda given, seed: neq.Everything(),
    "equilibrium": lambda given, seed: neq.Equilibrium(given.eps, given.mu),
    "equilibrium-released": lambda given, seed: neq.Equilibrium.released(given.eps, given.mu),
    "adaptive-eps": lambda given, seed: neq.AdaptiveEps(given.eps, given.mu),
    "budget": lambda given, seed: neq.Budget(share=given.fraction, unit="flops", mu=given.mu),
    "random": lambda given, seed: neq.Random(given.fraction, seed),
    "lowest-velocity": lambda given, seed: neq.LowestVelocity(given.fraction, given.mu),
    "fixed": fixed,
    "random-equal-flops": lambda given, seed: Recorded(recorded(given, seed), seed),
    "short": lambda given, seed: neq.Everything(),
}


def schedule(name: str, given: argparse.Namespace, seed: int) -> int:
    """How many epochs the run has."""
    if name != "short":
        return given.epochs
    records = recorded(given, seed)
    dense = sum(layer.wgrad_flops for layer in records[0].layers)
    spent = sum(
        layer.wgrad_flops * layer.trained / layer.neurons for r in records for layer in r.layers
    )
    return max(1, round(spent / dense))


class Clock:
    """Seconds by phase: of a GPU by its own clock; else of the processor, for all threads, so that
    whatever else the machine does is not in them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((phase, start, self._now()))

    def take(self) -> dict[str, float]:
        """What was spent since the last time."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self._cuda:
            torch.cuda.synchronize()
        for phase, start, end in self._spans:
            seconds[phase] += start.elapsed_time(end) / 1e3 if self._cuda else end - start
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def train(name: str, seed: int, given: argparse.Namespace, data: Data) -> list[Row]:
    """One run, epoch by epoch."""
    device, epochs = given.device, schedule(name, given, seed)
    policy = POLICIES[name](given, seed)
    run = given.output / f"{name}-{seed}"
    checkpoint = run.with_suffix(".pt")
    what = {
        key: getattr(given, key) for key in ("limit", "batch", "eps", "mu", "fraction", "probe")
    }
    what |= {"data": data.source, "epochs": epochs}

    torch.manual_seed(seed)
    model = resnet32(len(data.classes)).to(device, memory_format=torch.channels_last)
    neq.convert(model)
    optimizer = neq.optim.SGD(model.parameters(), LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    # the probe's images, one class after the other, are held out: nothing trains on them
    held_out, images = (
        Images(*(t[part].to(device) for t in data.train))
        for part in (slice(given.probe), slice(given.probe, None))
    )
    pixels = images.pixels[:5000].float()
    normal = Normal(pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)))
    probe = normal(held_out.pixels)
    control = neq.Controller(
        model,
        probe=probe if policy.measures else None,
        example_inputs=probe[:1],
        policy=policy,
        optimizer=optimizer,
        history=run.with_suffix(".jsonl"),
    )
    rows: list[Row] = []
    if given.resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["what"] != what:
            raise ValueError(f"{checkpoint} is of another run: {state['what']}, not {what}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        control.load_state_dict(state["control"])
        rows = state["rows"]

    call = model if given.compile == "none" else torch.compile(model, mode=given.compile)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=given.amp)
    clock = Clock(device)
    steps = len(images.labels) // given.batch  # what is left over waits for another epoch
    bar = tqdm(
        total=epochs * steps, initial=len(rows) * steps, desc=f"{name}, seed {seed}", disable=None
    )
    for epoch in range(len(rows), epochs):
        lr = LR * 0.1 ** sum(epoch >= drop * epochs for drop in DROPS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        costs = neq.account(model, probe[:1])
        model.train()
        # order and augmentation depend on nothing but seed and epoch, so there is no state to save
        generator = torch.Generator(device).manual_seed(1_000_000 * seed + epoch)
        order = torch.randperm(len(images.labels), device=device, generator=generator)
        loss_sum = torch.zeros((), device=device)
        for chosen in order[: steps * given.batch].split(given.batch):
            with clock("data"):
                x, y = normal(augment(images.pixels[chosen], generator)), images.labels[chosen]
            with clock("forward"), amp:
                loss = F.cross_entropy(call(x), y)
            optimizer.zero_grad()
            with clock("backward"):
                loss.backward()
            with clock("optimizer"):
                optimizer.step()
            loss_sum += loss.detach()
            bar.update()
        with clock("probe"):
            record = control.step()
        with amp:
            accuracy = evaluate(model, normal, data.test, device)
        rows.append(
            {
                "epoch": record.epoch,
                "lr": lr,
                "loss": float(loss_sum) / steps,
                "accuracy": accuracy,
                "frozen": record.frozen_share,  # in the next epoch; what follows is of this one
                "wgrad": costs.now.wgrad.flops / costs.dense.wgrad.flops,
                "flops": costs.now.total.flops / costs.dense.total.flops,
                "published_mflops": costs.now.published_backprop_flops / 1e6,
                "seconds": clock.take(),
            }
        )
        tqdm.write(
            f"{name}, seed {seed}: {record}, loss {rows[-1]['loss']:.3f}, test {accuracy:.2%}"
        )
        state = {
            "what": what,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "control": control.state_dict(),
            "rows": rows,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
    bar.close()
    return rows


class Normal:
    """uint8 images -> float32, each channel with mean 0 and deviation 1 over the training set."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean, self.deviation = mean[:, None, None], deviation[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        normal = (pixels.float() - self.mean) / self.deviation
        return normal.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(model: nn.Module, normal: Normal, test: Images, device: torch.device) -> float:
    """The share of the test images that the model gets right."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for pixels, labels in zip(test.pixels.split(500), test.labels.split(500), strict=True):
        guess = model(normal(pixels.to(device))).argmax(1)
        right += (guess == labels.to(device)).sum()
    return int(right) / len(test.labels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--policy", nargs="+", choices=POLICIES, default=["equilibrium"], metavar="NAME",
        help=f"one after the other: {', '.join(POLICIES)} (default: equilibrium)",
    )  # fmt: skip
    which.add_argument(
        "--compare", action="store_const", dest="policy", const=COMPARISON,
        help=f"the same as --policy {' '.join(COMPARISON)}",
    )  # fmt: skip
    parser.add_argument("--epochs", type=whole, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="see examples/cifar_data.py")
    parser.add_argument("--limit", type=whole, metavar="N", help="training images, of all classes")
    parser.add_argument("--test-limit", type=whole, metavar="N", help="test images, likewise")
    parser.add_argument("--batch", type=whole, default=100)
    parser.add_argument("--probe", type=whole, default=50, metavar="N", help="images held out")
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--mu", type=float, default=0.5)
    parser.add_argument(
        "--fraction", type=float, default=0.5,
        help="that trains, for budget, random, lowest-velocity and fixed",
    )  # fmt: skip
    parser.add_argument(
        "--history", type=Path, metavar="FILE",
        help="the run to match, for random-equal-flops and short (default: equilibrium's with the "
        "same seed in --output)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"), metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --output")
    parser.add_argument("--device", type=options.usable_device, default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)"
    )
    parser.add_argument(
        "--compile", nargs="?", const="default", metavar="MODE",
        help="of torch.compile, or none (default: default on a GPU, none on a CPU)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    on_gpu = given.device.type == "cuda"
    if given.amp is None:
        given.amp = on_gpu
    if given.compile is None:
        given.compile = "default" if on_gpu else "none"

    given.output.mkdir(parents=True, exist_ok=True)
    facts = environment(given.device)
    show_environment(facts)
    try:
        results = compare(given)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    text = json.dumps({"environment": facts, **results}, indent=1)
    (given.output / "results.json").write_text(text + "\n")


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Make all the runs, show what they come to and draw it."""
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
    runs: dict[str, dict[int, list[Row]]] = {name: {} for name in given.policy}
    for seed in given.seeds:
        for name in given.policy:
            runs[name][seed] = train(name, seed, given, data)
            if name not in DENSE:
                records = history.read(given.output / f"{name}-{seed}.jsonl")
                report.write(records, given.output / f"{name}-{seed}.png")
    everything = cifar_report.with_stopped(runs)
    lines = cifar_report.summary(everything, given.epochs)
    Console(width=WIDTH, highlight=False).print(cifar_report.table(lines))
    print(NOTES)
    if "equilibrium" in runs and len(everything.get(cifar_report.STOPPED, {})) < len(given.seeds):
        print(f"not every run had {cifar_report.NEARLY:.0%} of its neurons rest at once")
    cifar_report.plot(everything, f"ResNet-32, {sizes}", given.output / "accuracy.png")
    return {
        "command": ["python", *sys.argv],
        "options": {key: str(value) for key, value in vars(given).items()},
        "data": f"{data.source}: {sizes}",
        "summary": lines,
        "results": [
            {"policy": name, "seed": seed, "epochs": rows}
            for name, seeds in runs.items()
            for seed, rows in seeds.items()
        ],
    }


def whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    main()
