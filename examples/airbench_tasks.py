"""What examples/airbench.py learns: all classes from scratch, or more after a pretraining."""

from typing import NamedTuple

import torch
from torch import Tensor

from examples.cifar_data import Data, Images


class Task:
    """All classes, from scratch."""

    pretrained = False
    fresh_head = False  # does the head start anew after the pretraining?

    def before(self, data: Data) -> Data:
        """What the pretraining learns."""
        return data

    def after(self, data: Data) -> Data:
        """What the run itself learns."""
        return data


class ClassSplit(Task):
    """The second half of the classes, after the first."""

    pretrained = fresh_head = True

    def before(self, data: Data) -> Data:
        return _classes(data, 0, len(data.classes) // 2)

    def after(self, data: Data) -> Data:
        return _classes(data, len(data.classes) // 2, len(data.classes))


class Corrupted(Task):
    """Negatives with the colours in another order: the first block can undo it."""

    pretrained = True

    def after(self, data: Data) -> Data:
        train, test = (Images(255 - part.pixels.roll(1, 1), part.labels) for part in data[2:])
        return data._replace(train=train, test=test)


class Relabelled(Task):
    """Each class under the label of the next: the head can learn it alone."""

    pretrained = True

    def after(self, data: Data) -> Data:
        count = len(data.classes)
        train, test = (Images(part.pixels, (part.labels + 1) % count) for part in data[2:])
        return data._replace(train=train, test=test)


TASKS = {
    "scratch": Task(),
    "split": ClassSplit(),
    "corrupted": Corrupted(),
    "relabelled": Relabelled(),
}


class Start(NamedTuple):
    """What a pretraining leaves."""

    model: dict[str, Tensor]  # a state_dict
    mean: Tensor  # of the pixels that it saw, by channel
    deviation: Tensor


def _classes(data: Data, first: int, end: int) -> Data:
    def chosen(images: Images) -> Images:
        here = torch.nonzero((first <= images.labels) & (images.labels < end)).flatten()
        return Images(images.pixels[here], images.labels[here] - first)

    train, test = map(chosen, (data.train, data.test))
    return data._replace(classes=data.classes[first:end], train=train, test=test)
