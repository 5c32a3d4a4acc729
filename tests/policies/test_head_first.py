"""HeadFirst: the head alone, a look, and then what has a signal."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.measure.gradient_signal import HEAD
from tests.support.head_first import (
    HEAD_NAMES,
    SECOND,
    SIGNALS,
    THIRD,
    Told,
    X,
    build,
    chosen,
    epoch,
    network,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, neq.optim.AdamW])
def test_the_head_then_a_look_then_what_has_a_signal(optimizer):
    policy = Told({HEAD: 5.0}, {HEAD: 0.9}, SIGNALS, {}, {}, longest=9)
    model, optimizer, control = build(policy, optimizer=optimizer)
    assert policy.phase == "head"
    assert control.prefix.depth == len(control.blocks) == 3
    assert epoch(model, optimizer, control) == HEAD_NAMES
    assert policy.phase == "head"
    assert epoch(model, optimizer, control) == HEAD_NAMES
    assert policy.phase == "look"
    assert control.prefix.depth == 0
    assert epoch(model, optimizer, control) == HEAD_NAMES  # the norm's statistics neither
    assert policy.phase == "chosen"
    assert policy.signals == SIGNALS
    assert control.prefix.depth == 1  # the first block: its norm follows the layer before
    assert epoch(model, optimizer, control) == HEAD_NAMES | SECOND | THIRD


@pytest.mark.parametrize(
    ("signals", "options", "active", "depth"),
    [
        ({"third": 0.5}, {}, {"third"}, 2),
        ({"third": 0.49}, {}, set(), 3),
        ({"third": 0.49}, {"signal": 0.4}, {"third"}, 2),
        ({"second": 0.7, "third": 2.8}, {}, {"second", "third"}, 1),
        ({"second": 0.69, "third": 2.8}, {}, {"third"}, 2),
        ({"second": 0.69, "third": 2.8}, {"share": 0}, {"second", "third"}, 1),
        ({"second": 2.0, "third": 90.0}, {}, {"second", "third"}, 1),
        ({"second": 1.99, "third": 90.0}, {}, {"third"}, 2),
        ({"first": 1.0}, {}, {"first", "norm"}, 0),
        ({"norm": 90.0}, {}, set(), 3),
        ({"second": math.nan}, {}, {"second"}, 1),
        ({"first": 1.0, "third": 1.0}, {}, {"first", "norm", "third"}, 0),
    ],
)
def test_which_layers_train(signals, options, active, depth):
    assert chosen(signals, **options) == (active, depth)


def test_layers_without_a_signal_keep_their_bits_above_those_that_train():
    policy = Told({HEAD: 0.0}, {**SIGNALS, "first": 3.0, "second": 0.0, "third": 0.0}, {})
    model, optimizer, control = build(policy)
    epoch(model, optimizer, control)
    epoch(model, optimizer, control)
    changed = epoch(model, optimizer, control)
    assert not changed & (SECOND | THIRD)
    assert {"first.weight", "norm.weight", "norm.running_mean"} <= changed


def test_the_head_trains_alone_for_so_long_at_most():
    policy = Told(*[{HEAD: 50.0}] * 3, longest=3)
    model, optimizer, control = build(policy)
    phases = []
    for _ in range(3):
        epoch(model, optimizer, control)
        phases.append(policy.phase)
    assert phases == ["head", "head", "look"]


def test_a_head_without_a_signal_that_is_known_goes_on():
    policy = Told({HEAD: math.nan}, {HEAD: math.nan})
    model, optimizer, control = build(policy)
    epoch(model, optimizer, control)
    assert policy.phase == "head"


def test_it_looks_again():
    """What trains goes on in a look, and what is frozen does not."""
    told = [{HEAD: 0.0}, dict.fromkeys(SIGNALS, 0.0) | {"third": 1.0}, {}, {}, SIGNALS]
    policy = Told(*told, again=2)
    model, optimizer, control = build(policy)
    phases = []
    for _ in range(4):
        epoch(model, optimizer, control)
        phases.append(policy.phase)
    assert phases == ["look", "chosen", "chosen", "look"]
    assert epoch(model, optimizer, control) == HEAD_NAMES | THIRD
    assert policy.phase == "chosen"
    assert policy.signals == SIGNALS


def test_a_signal_adds_up_over_an_epoch():
    """A look of three steps, of an epoch of thirty."""
    policy = neq.HeadFirst(epoch_steps=30, settled=1e9)
    model, optimizer, control = build(policy, every=3)
    epoch(model, optimizer, control)
    assert policy.phase == "look"
    epoch(model, optimizer, control)
    assert policy.phase == "chosen"
    found = control.policy._measure.found
    assert policy.signals == pytest.approx({name: 10 * found[name] for name in policy.signals})
    policy._measure.found[HEAD] = 0.2
    assert policy._signal(HEAD) == pytest.approx(2)


def test_a_model_without_a_cut():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.a(x)
            return self.head(self.b(x) + self.a(x))

    policy = Told({HEAD: 0.0}, {"a": 0.0, "b": 1.0}, {})
    model = Twice()
    x = torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=x)

    def go():
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        control.step()
        return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}

    assert control.prefix is None
    assert go() == go() == HEAD_NAMES
    assert go() == HEAD_NAMES | {"b.weight", "b.bias"}


def test_remove_lets_go_in_a_look():
    policy = Told({HEAD: 0.0}, SIGNALS)
    model, optimizer, control = build(policy)
    epoch(model, optimizer, control)
    assert policy.phase == "look"
    control.remove()
    changed = epoch(model, optimizer, None)
    assert HEAD_NAMES | SECOND | THIRD | {"first.weight", "norm.running_mean"} <= changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": -1}, "signal must be at least 0, got -1"),
        ({"settled": math.nan}, "settled must be at least 0, got nan"),
        ({"share": 2}, r"share must lie in \[0, 1\], got 2"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
        ({"epoch_steps": 0}, "epoch_steps must be at least 1, got 0"),
        ({"again": 0}, "again must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        neq.HeadFirst(**options)


def test_what_it_needs():
    with pytest.raises(ValueError, match="give the Controller its optimizer"):
        neq.Controller(network(), optimizer=(), policy=neq.HeadFirst(), example_inputs=X)
    with pytest.raises(ValueError, match="name the head in leave_alone"):
        build(neq.HeadFirst(), leave_alone=())
    model = network()
    body = torch.optim.SGD(model[:-2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter that an optimizer steps is left alone"):
        neq.Controller(model, optimizer=body, policy=neq.HeadFirst(), example_inputs=X)
    compact = neq.compact(network(), capacity=0.5)
    with pytest.raises(ValueError, match="the compact layer 'first' has no room"):
        build(neq.HeadFirst(), compact)


def task(labels):
    """Images of four kinds, and a network that has learned them; their labels, or others."""
    generator = torch.Generator().manual_seed(2)
    kinds = torch.randn(4, 3, 8, 8, generator=generator)
    y = torch.randint(4, (256,), generator=generator)
    x = kinds[y] + 0.5 * torch.randn(256, 3, 8, 8, generator=generator)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(10):
        learn(model, optimizer, x, y)
    return model, x, (y + labels) % 4


def learn(model, optimizer, x, y):
    model.train()
    for own in torch.arange(len(y)).split(16):
        optimizer.zero_grad()
        F.cross_entropy(model(x[own]), y[own], label_smoothing=0.2).backward()
        optimizer.step()


@pytest.mark.parametrize("changed", ["labels", "colours"])
def test_it_finds_what_has_to_learn(changed):
    """Where the labels are others, the head alone; where the colours are, the first layer."""
    model, x, y = task(labels=int(changed == "labels"))
    if changed == "colours":
        x = -x.roll(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    policy = neq.HeadFirst(longest=6)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=x[:16])
    for _ in range(12):
        learn(model, optimizer, x, y)
        control.step()
    assert policy.phase == "chosen"
    accuracy = float((model.eval()(x).argmax(1) == y).float().mean())
    assert accuracy > 0.9
    if changed == "labels":
        assert control.prefix.depth == len(control.blocks)
        assert max(policy.signals[name] for name in ("first", "second", "third")) < 0.5
    else:
        assert policy.signals["first"] > 2
        assert control.layers["first"].mask.all()
