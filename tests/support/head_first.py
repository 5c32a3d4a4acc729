"""A small network under HeadFirst, with signals that are made up."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.measure.gradient_signal import HEAD, GradientSignal


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 6, 3),
            norm=nn.BatchNorm2d(6),
            act=nn.ReLU(),
            second=nn.Conv2d(6, 6, 3),
            act2=nn.ReLU(),
            third=nn.Conv2d(6, 6, 3),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(6, 4),
        )
    )


class MadeUp(GradientSignal):
    """Finds what it is told, decision by decision."""

    def __init__(self, table):
        super().__init__()
        self.table = iter(table)

    def score(self, sums):
        scores = super().score(sums)
        self.found = dict.fromkeys(self.found, math.nan) | next(self.table)
        return scores


class Told(neq.HeadFirst):
    def __init__(self, *table, **options):
        super().__init__(**options)
        self.table = table

    def measure(self):
        self._measure = MadeUp(self.table)
        return self._measure


X, LABELS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


def build(policy, model=None, optimizer=torch.optim.SGD, **options):
    model = network() if model is None else model
    optimizer = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    options.setdefault("example_inputs", X)
    return model, optimizer, neq.Controller(model, optimizer=optimizer, policy=policy, **options)


def epoch(model, optimizer, control, steps=3):
    """Returns the names of what changed, parameters and buffers."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    if control is not None and control.every is None:
        control.step()
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


HEAD_NAMES = {"head.weight", "head.bias"}
SIGNALS = {"first": 0.1, "norm": 9.0, "second": 0.8, "third": 3.0}
SECOND = {"second.weight", "second.bias"}
THIRD = {"third.weight", "third.bias"}


def chosen(signals, **options):
    """The names of the layers that train after a look, and how many blocks are frozen."""
    policy = Told({HEAD: 0.0}, {name: signals.get(name, 0.0) for name in SIGNALS}, **options)
    model, optimizer, control = build(policy)
    epoch(model, optimizer, control)
    epoch(model, optimizer, control)
    active = {name for name, group in control.layers.items() if group.mask.any()}
    return active, control.prefix.depth
