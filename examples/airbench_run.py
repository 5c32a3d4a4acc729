"""One run of examples/airbench.py: its settings, its training, its result as JSON."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.lib.environment import environment
from examples import airbench_net
from examples.airbench_arms import ARMS, PROBE, ByPolicy, freeze
from examples.airbench_tasks import TASKS, Start
from examples.airbench_views import CachedLoader, Views
from examples.cifar_data import Data, Images, Normal
from examples.clock import Clock

PHASES = "data", "forward", "backward", "optimizer", "freeze"
BIAS_EPOCHS = 3  # for which the stem's bias trains
LOOK_EVERY = 5  # steps between two updates of Lookahead
VALIDATION = 5000  # images, the last of the training set
PRETRAIN_BATCH = 512
EVALUATED_AT_ONCE = {"cpu": 100}  # images whose activations its caches hold

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What tells one run from another."""

    name: str = ""  # of the result's file; the arm's name if empty
    arm: str = "dense"
    task: str = "scratch"
    pretrain_epochs: float = 8.0  # of the run that it starts from, if the task has one
    pretrain_images: int | None = None
    pretrained: int = 0  # from how many such runs seeds start, in turns; 0: each from its own
    keep: bool = False  # the weights in the end, for runs that start from them
    seed: int = 0
    net: str = "94"
    width: float = 1.0
    images: int | None = None  # of the training set, all if None
    epochs: float = 9.9
    batch: int = 1024
    lr: float = 1.0  # a factor for the recipe's rate
    augment: bool = True
    split: str = "test"  # what accuracies are of: test, or validation, which nothing trains on
    evaluated: int | None = None  # images of that split, all if None
    curve: bool = False  # evaluate after each epoch, not in the end only
    freeze: tuple[float, ...] = (0.4, 0.7)  # shares of the run: for the arm scheduled
    parts: tuple[str, ...] = ("head",)  # that train: for the arm only
    policy: str = "BottomUp"  # of neq: for the arm policy
    options: tuple[tuple[str, Any], ...] = ()  # of the policy, and a warmup
    cached: bool = False  # keep what a frozen prefix computes, for the arm policy
    bank: int = 4  # how many draws of the augmentation each image has, in a cache
    stop: float = 1.0  # the share of the schedule after which the run ends

    @property
    def title(self) -> str:
        return f"{self.name or self.arm}-{self.seed}"

    def before(self) -> "Settings | None":
        """The settings of the run that this one starts from; None: it starts from nothing."""
        task = TASKS[self.task].before
        if task is None:
            return None
        return Settings(
            name=f"{task}-{self.net}-{self.width:g}",
            task=task,
            seed=self.seed % self.pretrained if self.pretrained else self.seed,
            net=self.net,
            width=self.width,
            images=self.pretrain_images,
            epochs=self.pretrain_epochs,
            batch=PRETRAIN_BATCH,
            keep=True,
        )


class Where(NamedTuple):
    """Where runs compute, and where they write."""

    output: Path
    pretrained: Path  # the runs that others start from
    device: torch.device
    amp: bool = False


def finished(settings: Settings, output: Path) -> Result | None:
    """The result of a run that has ended."""
    file = output / f"{settings.title}.json"
    if not file.is_file():
        return None
    result: Result = json.loads(file.read_text())
    _refuse_another(file, result["settings"], settings)
    return result


def _refuse_another(file: Path, found: Result, settings: Settings) -> None:
    # through JSON, which knows no tuples; what an older file does not know had its default
    given, default = (json.loads(json.dumps(asdict(s))) for s in (settings, Settings()))
    found = {**default, **json.loads(json.dumps(found))}
    if other := {key: found[key] for key in given if found[key] != given[key]}:
        instead = {key: given[key] for key in other}
        raise ValueError(f"{file} is of another run, with {other} instead of {instead}")


def split(data: Data, settings: Settings) -> tuple[Images, Images]:
    """The images to train on, and those to evaluate."""
    train, evaluated = data.train, data.test
    if settings.split == "validation":
        held_out = min(VALIDATION, len(train.labels) // 10)
        train, evaluated = (
            Images(*(t[part] for t in data.train))
            for part in (slice(-held_out), slice(-held_out, None))
        )
    return (
        Images(*(t[: settings.images] for t in train)),
        Images(*(t[: settings.evaluated] for t in evaluated)),
    )


def _start_file(settings: Settings, folder: Path) -> Path:
    return folder / f"{settings.title}-start.pt"


def _start(settings: Settings, where: Where) -> Start | None:
    """What the run starts from, if its task comes after another."""
    before = settings.before()
    if before is None:
        return None
    if finished(before, where.pretrained) is None:
        raise ValueError(f"{settings.title} starts from {before.title}, which has not ended")
    file = _start_file(before, where.pretrained)
    return Start(**torch.load(file, map_location="cpu", weights_only=True))


class Run:
    """A model and its optimizer, stopped and resumed between any two epochs."""

    def __init__(self, settings: Settings, data: Data, where: Where) -> None:
        self.settings, self.where = settings, where
        device, task = where.device, TASKS[settings.task]
        data = task.data(data)
        train, evaluated = split(data, settings)
        if len(train.labels) < settings.batch:
            raise ValueError(f"a batch of {settings.batch} from {len(train.labels)} images")
        self.train = Images(*(t.to(device) for t in train))
        self.evaluated = Images(*(t.to(device) for t in evaluated))
        self.views = Views(self.train.pixels, settings.seed, settings.augment)
        self.normal = Normal(self.train.pixels)
        self.per_epoch = len(self.train.labels) // settings.batch  # whole batches only
        self.schedule = math.ceil(self.per_epoch * settings.epochs)  # in steps
        self.steps = math.ceil(self.schedule * settings.stop)
        self.clock = Clock(device, PHASES)
        self.epochs: list[Result] = []

        torch.manual_seed(settings.seed)
        model = airbench_net.network(settings.net, settings.width, len(data.classes))
        airbench_net.whiten(model.stem[0], self.normal(self.train.pixels[:5000]).cpu())
        if start := _start(settings, where):
            self.normal.mean, self.normal.deviation = (t.to(device) for t in start[1:])
            kept = {k: t for k, t in start.model.items() if not k.startswith("head.")}
            model.load_state_dict(kept if task.fresh_head else start.model, strict=False)
        self.model = model.to(device)
        self.arm = ARMS[settings.arm](settings)
        self.optimizer = self.arm.optimizer(
            airbench_net.groups(self.model, settings.batch, settings.lr),
            momentum=airbench_net.MOMENTUM,
            nesterov=True,
        )
        seen = self.train.pixels[: max(PROBE, settings.batch)]
        self.arm.start(self.model, self.optimizer, self.normal(seen))
        self.loader = self._cached() if settings.cached else None
        self.lookahead = airbench_net.Lookahead(self.model)
        self.amp = torch.autocast(device.type, torch.bfloat16) if where.amp else nullcontext()
        self.file = where.output / f"{settings.title}.pt"
        if self.file.is_file():
            self._load()

    def _cached(self) -> CachedLoader:
        settings = self.settings
        if not isinstance(self.arm, ByPolicy):
            raise ValueError(f"{settings.title}: the arm {settings.arm} has no cache, policy has")
        return CachedLoader(
            self.arm.control,
            self.train,
            self.normal,
            batch=settings.batch,
            bank=settings.bank if settings.augment else None,
            epochs=settings.epochs,
        )

    def go(self, position: int = 0) -> Result:
        """Train to the end, and write the result. position: of the progress bar on the screen."""
        title, done = self.settings.title, min(self.steps, len(self.epochs) * self.per_epoch)
        look = {"disable": None, "leave": False, "position": position}
        with tqdm(total=self.steps, initial=done, desc=title, **look) as bar:
            for epoch in range(len(self.epochs), math.ceil(self.steps / self.per_epoch)):
                self.epochs.append(self.epoch(epoch, bar.update))
                self._save()
        result = self.result()
        if self.settings.keep:
            start = Start(self.model.state_dict(), self.normal.mean, self.normal.deviation)
            torch.save(start._asdict(), _start_file(self.settings, self.where.output))
        text = json.dumps(result, indent=1) + "\n"
        written = self.file.with_suffix(".part")
        written.write_text(text)
        written.replace(self.file.with_suffix(".json"))
        self.file.unlink()
        return result

    def _frozen(self, step: int) -> list[str]:
        # in the recipe the stem's weights never train, and its bias does not for long
        stem = ["stem"] if step >= BIAS_EPOCHS * self.per_epoch else []
        return [*stem, *self.arm.frozen(step / self.schedule)]

    def state(self, step: int) -> str:
        """What trains in this step: the time of the step follows from it."""
        frozen = self._frozen(step)
        trained = "+".join(part for part in airbench_net.PARTS if part not in frozen)
        return self.arm.kind() + trained

    def enter(self, step: int) -> None:
        """Bring the model into the state of this step, and the rates to its values."""
        freeze(self.model, self._frozen(step))
        factor = airbench_net.triangle(step / self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of an epoch, normalised, and their labels; without end."""
        # order and views depend on seed and epoch alone, so there is no state to save
        device, size = self.where.device, self.settings.batch
        generator = torch.Generator(device).manual_seed(1_000_000 * self.settings.seed + epoch)
        order = torch.randperm(len(self.train.labels), device=device, generator=generator)
        if self.loader is not None:
            yield from self.loader.epoch(order)
        for chosen in order.split(size):
            yield self.normal(self.views(chosen, epoch, generator)), self.train.labels[chosen]

    def step(self, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Train on the next batch; its mean loss."""
        with self.clock("freeze"):
            self.enter(step)
        with self.clock("data"):
            x, y = next(batches)
        with self.clock("forward"), self.amp:
            loss = F.cross_entropy(self.model(x), y, label_smoothing=0.2, reduction="sum")
        self.optimizer.zero_grad()
        with self.clock("backward"):
            loss.backward()
        with self.clock("optimizer"):
            self.optimizer.step()
            done = (step + 1) / self.schedule
            if (step + 1) % LOOK_EVERY == 0:
                self.lookahead.update(self.model, self.lookahead.keep(done))
            if step + 1 == self.steps:
                self.lookahead.update(self.model, 1.0)
        return loss.detach() / len(y)

    def epoch(self, epoch: int, tell: Callable[[], object]) -> Result:
        first = epoch * self.per_epoch
        steps = range(first, min(first + self.per_epoch, self.steps))
        states, loss_sum = Counter[str](), torch.zeros((), device=self.where.device)
        self.model.train()
        batches = self.batches(epoch)
        for step in steps:
            loss_sum += self.step(step, batches)
            states[self.state(step)] += 1
            tell()
        with self.clock("freeze"):
            self.arm.end_epoch()
        result = {
            "steps": dict(states),
            "loss": float(loss_sum) / len(steps),
            "seconds": self.clock.take(),
        }
        if self.settings.curve:
            [result["accuracy"]] = self.accuracies(several=False)
        return result

    def result(self) -> Result:
        of_one_view, of_six = self.accuracies(several=True)
        return {
            "settings": asdict(self.settings),
            "steps": dict(sum((Counter(e["steps"]) for e in self.epochs), Counter[str]())),
            "seconds": {
                phase: sum(epoch["seconds"][phase] for epoch in self.epochs) for phase in PHASES
            },
            "accuracy": of_six,
            "accuracy_of_one_view": of_one_view,
            "epochs": self.epochs,
            "sizes": {"train": len(self.train.labels), "evaluated": len(self.evaluated.labels)},
            "environment": environment(self.where.device),
        }

    @torch.no_grad()
    def accuracies(self, several: bool) -> list[float]:
        """The share of the images that the model gets right.

        several: also the share from the mean of six views: the image, moved by a pixel both ways
        along the diagonal, and the mirror images of these three.
        """
        self.model.eval()
        device, images = self.where.device, len(self.evaluated.labels)
        right = torch.zeros(1 + several, dtype=torch.int64, device=device)
        size = EVALUATED_AT_ONCE.get(device.type, 500)
        for pixels, labels in zip(*(t.split(size) for t in self.evaluated), strict=True):
            x = self.normal(pixels)
            with self.amp:
                logits = self._of_views(x, several)
            right += (logits.argmax(2) == labels).sum(1)
        return [n / images for n in right.tolist()]

    def _of_views(self, x: Tensor, several: bool) -> Tensor:
        # the logits of x, and of six views if several: (1 or 2, images, classes)
        first = self.model(x)
        if not several:
            return first[None]
        height, width = x.shape[2:]
        padded = F.pad(x, (1,) * 4, "reflect")
        moved = [padded[:, :, i : i + height, i : i + width] for i in (0, 2)]
        mean = 0.5 * (first + self.model(x.flip(3)))
        for view in moved:
            mean += 0.25 * (self.model(view) + self.model(view.flip(3)))
        return torch.stack([first, mean])

    def _save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lookahead": self.lookahead.slow,
            "arm": self.arm.state_dict(),
            "epochs": self.epochs,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)  # a run that is stopped meanwhile leaves the checkpoint before

    def _load(self) -> None:
        state = torch.load(self.file, map_location=self.where.device, weights_only=True)
        _refuse_another(self.file, state["settings"], self.settings)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lookahead.slow = state["lookahead"]
        self.arm.load_state_dict(state["arm"])
        self.epochs = state["epochs"]
