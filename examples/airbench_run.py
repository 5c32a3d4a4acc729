"""One run of examples/airbench.py: its settings, its training, its result as JSON."""

import json
import math
from collections import Counter
from collections.abc import Callable
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
from examples.airbench_arms import ARMS, freeze
from examples.airbench_tasks import TASKS, Start
from examples.cifar_data import Data, Images, Normal, windows
from examples.clock import Clock

PHASES = "data", "forward", "backward", "optimizer", "freeze"
SHIFT = 2  # pixels that a window moves, at most
BIAS_EPOCHS = 3  # for which the stem's bias trains
LOOK_EVERY = 5  # steps between two updates of Lookahead
VALIDATION = 5000  # images, the last of the training set
PRETRAIN_BATCH = 512

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What tells one run from another."""

    name: str = ""  # of the result's file; the arm's name if empty
    arm: str = "dense"
    task: str = "scratch"
    pretrain_epochs: float = 8.0  # of the run that it starts from, if the task has one
    pretrain_images: int | None = None
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
    fraction: float = 0.5  # of the rows that train: for the arm random-rows

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
            seed=self.seed,
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
    if found != given:
        other = {key: found.get(key) for key in given if found.get(key) != given[key]}
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


class Views:
    """Windows of images, moved and mirrored at random.

    A seed mirrors half of the images; then every second epoch mirrors all of them. So an image and
    its mirror image come in turns.
    """

    def __init__(self, pixels: Tensor, seed: int, augment: bool) -> None:
        self._size = pixels.shape[2], pixels.shape[3]
        self._shift = SHIFT if augment else 0
        ys, xs = (_reflected(n, self._shift, pixels.device) for n in self._size)
        self._padded = pixels[:, :, ys][..., xs]
        self._flips = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        if augment:
            generator = torch.Generator(pixels.device).manual_seed(seed)
            self._flips.random_(generator=generator)
        self._augment = augment

    def __call__(self, chosen: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        top, left = torch.randint(
            *(2 * self._shift + 1, (2, len(chosen), 1)), device=chosen.device, generator=generator
        )
        flip = self._flips[chosen, None] ^ (self._augment and epoch % 2 == 1)
        return windows(self._padded[chosen], top, left, flip, self._size)


def _reflected(n: int, pad: int, device: torch.device) -> Tensor:
    """The indices 0 ... n - 1, with ``pad`` more on both sides that go back."""
    inside = torch.arange(-pad, n + pad, device=device).abs()
    return (n - 1) - ((n - 1) - inside).abs()


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
        self.steps = math.ceil(self.per_epoch * settings.epochs)
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
        self.arm.start(self.model, self.optimizer)
        self.lookahead = airbench_net.Lookahead(self.model)
        self.amp = torch.autocast(device.type, torch.bfloat16) if where.amp else nullcontext()
        self.file = where.output / f"{settings.title}.pt"
        if self.file.is_file():
            self._load()

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
        return [*stem, *self.arm.frozen(step / self.steps)]

    def state(self, step: int) -> str:
        """What trains in this step: the time of the step follows from it."""
        frozen = self._frozen(step)
        trained = "+".join(part for part in airbench_net.PARTS if part not in frozen)
        return self.arm.rows() + trained

    def enter(self, step: int) -> None:
        """Bring the model into the state of this step, and the rates to its values."""
        freeze(self.model, self._frozen(step))
        factor = airbench_net.triangle(step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["full_lr"]

    def step(self, step: int, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Train on these images; their mean loss."""
        with self.clock("freeze"):
            self.enter(step)
        with self.clock("data"):
            views = self.views(chosen, step // self.per_epoch, generator)
            x, y = self.normal(views), self.train.labels[chosen]
        with self.clock("forward"), self.amp:
            loss = F.cross_entropy(self.model(x), y, label_smoothing=0.2, reduction="sum")
        self.optimizer.zero_grad()
        with self.clock("backward"):
            loss.backward()
        with self.clock("optimizer"):
            self.optimizer.step()
            done = (step + 1) / self.steps
            if (step + 1) % LOOK_EVERY == 0:
                self.lookahead.update(self.model, self.lookahead.keep(done))
            if step + 1 == self.steps:
                self.lookahead.update(self.model, 1.0)
        return loss.detach() / len(y)

    def epoch(self, epoch: int, tell: Callable[[], object]) -> Result:
        # order and views depend on seed and epoch alone, so there is no state to save
        device = self.where.device
        generator = torch.Generator(device).manual_seed(1_000_000 * self.settings.seed + epoch)
        order = torch.randperm(len(self.train.labels), device=device, generator=generator)
        first = epoch * self.per_epoch
        steps = range(first, min(first + self.per_epoch, self.steps))
        states, loss_sum = Counter[str](), torch.zeros((), device=device)
        self.model.train()
        for step, chosen in zip(steps, order.split(self.settings.batch), strict=False):
            loss_sum += self.step(step, chosen, generator)
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
            result["accuracy"] = self.accuracy(several=False)
        return result

    def result(self) -> Result:
        return {
            "settings": asdict(self.settings),
            "steps": dict(sum((Counter(e["steps"]) for e in self.epochs), Counter[str]())),
            "seconds": {
                phase: sum(epoch["seconds"][phase] for epoch in self.epochs) for phase in PHASES
            },
            "accuracy": self.accuracy(several=True),
            "accuracy_of_one_view": self.accuracy(several=False),
            "epochs": self.epochs,
            "sizes": {"train": len(self.train.labels), "evaluated": len(self.evaluated.labels)},
            "environment": environment(self.where.device),
        }

    @torch.no_grad()
    def accuracy(self, several: bool) -> float:
        """The share of the images that the model gets right.

        several: from the mean of six views: the image, moved by a pixel both ways along the
        diagonal, and the mirror images of these three.
        """
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.where.device)
        for pixels, labels in zip(*(t.split(500) for t in self.evaluated), strict=True):
            x = self.normal(pixels)
            with self.amp:
                logits = self._of_six(x) if several else self.model(x)
            right += (logits.argmax(1) == labels).sum()
        return int(right) / len(self.evaluated.labels)

    def _of_six(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (1,) * 4, "reflect")
        moved = (padded[:, :, i : i + height, i : i + width] for i in (0, 2))
        weights = 0.5, 0.25, 0.25
        both = (self.model(view) + self.model(view.flip(3)) for view in (x, *moved))
        return torch.stack([w * y for w, y in zip(weights, both, strict=True)]).sum(0)

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
