"""The same model in the masked and in the compact form."""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.optim import Guard
from neq_kernels import planner
from tests.support.optimizers import ARGUMENTS

# Sixteen rows of sixteen elements: no sum, and no step of an optimizer, has a tail whose elements
# torch computes by other instructions.
ROWS = {"conv": range(0, 32, 2), "norm": range(16), "tokens": range(8, 24), "mlp": range(1, 33, 2)}
OTHER = {"conv": range(16), "norm": range(8, 24), "tokens": range(0, 32, 2), "mlp": range(16, 32)}
NONE = {"mlp": []}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 1)
        self.norm = nn.LayerNorm(32)
        self.tokens = nn.Linear(32, 32)
        self.mlp = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return self.head(F.gelu(self.mlp(F.gelu(self.tokens(x)))).mean(1))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 16, 3, 3, generator=generator)


def loss_of(model, seed=0):
    return model(batch(seed)).square().sum()


def set_rows(model, rows):
    for name, chosen in rows.items():
        getattr(model, name).set_active(chosen)


def twins(rows=ROWS, **options):
    """A masked model and a compact one, with the same weights and active rows."""
    torch.manual_seed(0)
    masked = neq.convert(Net())
    set_rows(masked, rows)
    return masked, neq.compact(copy.deepcopy(masked), **options)


@contextmanager
def same_arithmetic():
    """Inside, both forms compute a gradient by the same kernel."""
    with planner.only("native"):
        yield


def assert_same_weights(model, other):
    names, others = model.state_dict(), other.state_dict()
    assert list(names) == list(others)
    for name, values in names.items():
        assert torch.equal(values, others[name]), name


def optimizer_for(kind, model, **options):
    if "weight_decay" in ARGUMENTS[kind]:
        options.setdefault("weight_decay", 0.1)
    if "momentum" in ARGUMENTS[kind]:
        options.setdefault("momentum", 0.9)
    return kind(model.parameters(), lr=1e-3, **options)


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def train_both(masked, compact, make, schedule=(ROWS, OTHER, NONE, OTHER), take=step):
    """Three steps with each of some rows, the same in both forms; then their weights are equal."""
    steppers = []
    for model in masked, compact:
        optimizer = make(model)
        steppers.append((model, optimizer))
    Guard(steppers[0][1], masked, on_thaw="reset")
    with same_arithmetic():
        for model, optimizer in steppers:
            for i, rows in enumerate(schedule):
                set_rows(model, rows)
                for j in range(3):
                    take(model, optimizer, 3 * i + j)
    assert_same_weights(masked, compact)
    return steppers[1][1]
