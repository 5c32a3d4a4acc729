"""What tells one run of examples/airbench.py from another, what it starts from, and its files."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from examples.airbench_tasks import TASKS, Start
from examples.cifar_data import Data, Images

PRETRAIN_BATCH = 512
VALIDATION = 5000  # images, the last of the training set

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
    keep: bool = False  # the weights in the end, for runs that start from it
    seed: int = 0
    net: str = "94"
    width: float = 1.0
    images: int | None = None  # of the training set, all if None
    epochs: float = 9.9
    batch: int = 1024
    lr: float = 1.0  # a factor for the recipe's rate
    augment: bool = True
    split: str = "test"  # what accuracies are of: test, or validation, which it does not train on
    evaluated: int | None = None  # images of that split, all if None
    curve: bool = False  # evaluate after each epoch, not in the end only
    freeze: tuple[float, ...] = (0.4, 0.7)  # shares of the run: for scheduled and head-then-all
    parts: tuple[str, ...] = ("head",)  # that train: for the arm only
    policy: str = "BottomUp"  # of neq: for the arm policy
    options: tuple[tuple[str, Any], ...] = ()  # of the policy, and a warmup
    cached: bool = False  # keep what a frozen prefix computes, for the arm policy
    bank: int = 4  # how many draws of the augmentation each image has, in a cache
    stop: float = 1.0  # the share of the schedule after which the run ends

    @property
    def title(self) -> str:
        """Of its files, and on the screen."""
        task = [self.task] if self.keep else []
        return "-".join([self.name or self.arm, *task, str(self.seed)])


class Where(NamedTuple):
    """Where runs compute, and where they write."""

    output: Path
    pretrained: Path  # the dense runs that arms start from
    device: torch.device
    amp: bool = False


Placed = tuple[Settings, Where]  # a run, and where it is


def predecessor(settings: Settings, where: Where) -> Placed | None:
    """The run that this one starts from; None: it starts from nothing."""
    task = TASKS[settings.task]
    if task.before is None:
        return None
    if task.goes_on:
        return replace(settings, task=task.before, keep=True), where
    dense = Settings(
        name=f"{settings.net}-{settings.width:g}",
        task=task.before,
        seed=settings.seed % settings.pretrained if settings.pretrained else settings.seed,
        net=settings.net,
        width=settings.width,
        images=settings.pretrain_images,
        epochs=settings.pretrain_epochs,
        batch=PRETRAIN_BATCH,
        keep=True,
    )
    return dense, where._replace(output=where.pretrained)


def lineage(settings: Settings, where: Where) -> list[Placed]:
    """The run, and before it those that it comes after: each starts from the one before."""
    runs = [(settings, where)]
    while (first := predecessor(*runs[0])) is not None:
        runs.insert(0, first)
    return runs


def start_file(settings: Settings, output: Path) -> Path:
    return output / f"{settings.title}-start.pt"


def start(settings: Settings, where: Where) -> Start | None:
    """What a run starts from, if its task comes after another."""
    *earlier, _ = lineage(settings, where)
    for first, place in earlier:
        if finished(first, place.output) is None:
            raise ValueError(f"{settings.title} starts from {first.title}, which has not ended")
        if not (file := start_file(first, place.output)).is_file():
            raise ValueError(
                f"{settings.title} starts from {file}, which is gone: delete {first.title}.json "
                "to make it again"
            )
    return left_by(*earlier[-1]) if earlier else None


def left_by(settings: Settings, where: Where) -> Start:
    """What a run that has ended left to those that start from it."""
    file = start_file(settings, where.output)
    return Start(**torch.load(file, map_location="cpu", weights_only=True))


def finished(settings: Settings, output: Path) -> Result | None:
    """The result of a run that has ended."""
    file = output / f"{settings.title}.json"
    if not file.is_file():
        return None
    result: Result = json.loads(file.read_text())
    refuse_another(file, result["settings"], settings)
    return result


def refuse_another(file: Path, found: Result, settings: Settings) -> None:
    """An error, if a file that was found is of a run with other settings."""
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
