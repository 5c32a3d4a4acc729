"""One run of examples/airbench.py: its training, and its result as JSON."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.lib.environment import environment
from examples import airbench_net
from examples.airbench_arms import ARMS, PROBE, ByPolicy, freeze
from examples.airbench_settings import (
    Placed,
    Result,
    Settings,
    Where,
    left_by,
    refuse_another,
    split,
    start,
    start_file,
)
from examples.airbench_stream import of_stream
from examples.airbench_tasks import TASKS, Start
from examples.airbench_views import CachedLoader, Views
from examples.cifar_data import Data, Images, Normal
from examples.clock import Clock

PHASES = "data", "forward", "backward", "optimizer", "freeze"
BIAS_EPOCHS = 3  # for which the stem's bias trains
LOOK_EVERY = 5  # steps between two updates of Lookahead
EVALUATED_AT_ONCE = {"cpu": 100}  # images whose activations its caches hold


class Run:
    """A model and its optimizer, stopped and resumed between any two epochs."""

    def __init__(self, settings: Settings, data: Data, where: Where) -> None:
        self.settings, self.where, self.data = settings, where, data
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
        if begin := start(settings, where):
            self.normal.mean, self.normal.deviation = (t.to(device) for t in begin[1:])
            body, _ = begin.parts()
            model.load_state_dict(body if task.fresh_head else begin.model, strict=False)
        self.model = model.to(device)
        self.arm = ARMS[settings.arm](settings)
        self.optimizer = self.arm.optimizer(
            airbench_net.groups(self.model, settings.batch, self.arm.rate),
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
            left = Start(self.model.state_dict(), self.normal.mean, self.normal.deviation)
            torch.save(left._asdict(), start_file(self.settings, self.where.output))
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
        freeze(self.model, self._frozen(step), self.arm.thaws)
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
            [result["accuracy"]] = self.accuracies(self.evaluated, several=False)
        return result

    def result(self) -> Result:
        of_one_view, of_six = self.accuracies(self.evaluated, several=True)
        own = {
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
        if not TASKS[self.settings.task].goes_on:
            return own
        return of_stream(own, self.settings, self.where, self._accuracy_now)

    def _accuracy_now(self, earlier: Placed) -> float:
        """Of the model as it is, on the task of an earlier run, with the head that it had then."""
        settings = earlier[0]
        data = TASKS[settings.task].data(self.data)
        _, images = split(data, self.settings)
        head = airbench_net.network(settings.net, settings.width, len(data.classes)).head
        head.load_state_dict(left_by(*earlier).parts()[1])
        now, self.model.head = self.model.head, head.to(self.where.device)
        try:
            images = Images(*(t.to(self.where.device) for t in images))
            return self.accuracies(images, several=False)[0]
        finally:
            self.model.head = now

    @torch.no_grad()
    def accuracies(self, evaluated: Images, several: bool) -> list[float]:
        """The share of these images that the model gets right.

        several: also the share from the mean of six views: the image, moved by a pixel both ways
        along the diagonal, and the mirror images of these three.
        """
        self.model.eval()
        device, images = self.where.device, len(evaluated.labels)
        right = torch.zeros(1 + several, dtype=torch.int64, device=device)
        size = EVALUATED_AT_ONCE.get(device.type, 500)
        for pixels, labels in zip(*(t.split(size) for t in evaluated), strict=True):
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
        refuse_another(self.file, state["settings"], self.settings)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lookahead.slow = state["lookahead"]
        self.arm.load_state_dict(state["arm"])
        self.epochs = state["epochs"]
