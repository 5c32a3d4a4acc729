"""What a run of examples/airbench.py learns: from scratch, or from what another one has learned."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from examples.airbench_net import PARTS
from examples.cifar_data import Data, Images


class Task(NamedTuple):
    """The images and labels that a run learns from, and the task that it learned before."""

    data: Callable[[Data], Data]
    before: str | None = None
    fresh_head: bool = False  # the classes are others, so the head starts anew
    goes_on: bool = False  # from the same arm's run on the task before; else from a dense one
    parts: tuple[str, ...] = PARTS  # that are enough to learn it, after the task before
    rate: float = 1.0  # of these, as a factor for the recipe's rate


class Start(NamedTuple):
    """What a run leaves to those that start from it."""

    model: dict[str, Tensor]  # a state_dict
    mean: Tensor  # of the pixels that it saw, by channel
    deviation: Tensor

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of the body, and those of the head by their names in it."""
        head = {k.removeprefix("head."): t for k, t in self.model.items() if k.startswith("head.")}
        return {k: t for k, t in self.model.items() if not k.startswith("head.")}, head


def all_of_it(data: Data) -> Data:
    return data


def first_half(data: Data) -> Data:
    """Half of the classes."""
    return _classes(data, 0, len(data.classes) // 2)


def second_half(data: Data) -> Data:
    """The other classes."""
    return _classes(data, len(data.classes) // 2, len(data.classes))


def _classes(data: Data, first: int, end: int) -> Data:
    def chosen(images: Images) -> Images:
        here = torch.nonzero((first <= images.labels) & (images.labels < end)).flatten()
        return Images(images.pixels[here], images.labels[here] - first)

    train, test = map(chosen, (data.train, data.test))
    return data._replace(classes=data.classes[first:end], train=train, test=test)


def corrupted(data: Data) -> Data:
    """Negatives with the colours in another order: the first block can undo it."""
    train, test = (Images(255 - part.pixels.roll(1, 1), part.labels) for part in data[2:])
    return data._replace(train=train, test=test)


def relabelled(data: Data) -> Data:
    """Each class under the label of the next one: the head can learn it alone."""
    count = len(data.classes)
    train, test = (Images(part.pixels, (part.labels + 1) % count) for part in data[2:])
    return data._replace(train=train, test=test)


OTHER_COLOURS = Task(corrupted, "scratch", parts=("block1",), rate=0.3)
OTHER_LABELS = Task(relabelled, "scratch", parts=("head",), rate=3.0)

TASKS = {
    "scratch": Task(all_of_it),
    "first-half": Task(first_half),
    "second-half": Task(second_half, "first-half", fresh_head=True, parts=PARTS[2:]),
    "corrupted": OTHER_COLOURS,
    "relabelled": OTHER_LABELS,
    "then-corrupted": OTHER_COLOURS._replace(
        data=lambda data: corrupted(second_half(data)), before="second-half", goes_on=True
    ),
    "then-relabelled": OTHER_LABELS._replace(
        data=lambda data: relabelled(corrupted(second_half(data))),
        before="then-corrupted",
        goes_on=True,
    ),
}
