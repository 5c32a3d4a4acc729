"""What a part of a step takes: by hand, and against steps whose FLOPs are counted."""

import io
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.cost import rehearsal
from neq.cost.step_times import Segment, StepTimes
from neq.layers.groups import chosen_for
from tests.support.training import Net, data

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_chain_by_hand():
    times = StepTimes(
        (
            Segment("a", "a", 0, frozen=1, forward=2, dgrad=4, wgrad=8, update=16),
            Segment("b", "b", 1, frozen=32, forward=64, dgrad=128, wgrad=256, update=512),
            Segment("c", "c", fixed=True, forward=1024, dgrad=2048, wgrad=4096, update=8192),
        ),
        head=0.5,
    )
    head = 0.5 + 1024 + 4096 + 8192  # the classifier trains always
    assert times.dense == head + 2 + 8 + 16 + 64 + 128 + 256 + 512 + 2048
    assert times.ms(0, {"b": 1}) == head + 2 + 64 + 256 + 512 + 2048
    assert times.ms(1, {"b": 0.5}) == head + 1 + 64 + 128 + 256 + 2048
    assert times.ms(2, {"b": 1}) == times.ms(2, {}) == head + 1 + 32
    assert times.ms(0, {}, reach=0) == head + 2 + 64 + 128 + 2048
    assert times.reached(0, {}) == 2
    # of a dense step: the lowest layer has no dgrad
    assert times.dense_ms(0) == 2 + 8 + 16
    assert times.dense_ms(1) == 64 + 128 + 256 + 512
    assert sum(map(times.dense_ms, (0, 1, None))) == times.dense
    assert times.price == {"a": 24, "b": 768, "c": 12288}


def test_a_shared_weight_is_frozen_with_its_first_layer():
    times = StepTimes(
        (
            Segment("a", "a", 0, fixed=True, wgrad=1),
            Segment("b", "b", dgrad=2),
            Segment("a", "a", fixed=True, dgrad=4, wgrad=8),
        )
    )
    assert times.dense == 1 + 2 + 4 + 8
    assert times.ms(1, {"b": 1}) == 4


def test_what_is_not_converted_has_its_wgrad_in_its_backward():
    times = StepTimes((Segment("a", None, 0, fixed=True, dgrad=1, update=2), Segment("b", "b")))
    assert times.dense == times.dense_ms(0) == 3
    assert times.ms(1, {"b": 1}) == 0


def test_times_survive_a_checkpoint():
    times = StepTimes((Segment("a", "a", 0, wgrad=0.1), Segment("b")), 0.3)
    file = io.BytesIO()
    torch.save(times.state_dict(), file)
    file.seek(0)
    assert StepTimes.from_state(torch.load(file, weights_only=True)) == times


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.b(torch.relu_(self.a(x)))


class Tied(nn.Module):
    """A language model whose first and last layer share a weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), Residual(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return {"loss": self.head(self.body(self.embed(ids))).sum()}


class Branches(nn.Module):
    """A network that can't be cut: each layer reads the input too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.a(x) + self.b(x)) + x[:, :2]


MODELS = {
    "chain": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).append(
        nn.Linear(4, 2)
    ),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), nn.Sequential(nn.Linear(4, 2))
    ),
    "residual": lambda: nn.Sequential(nn.Linear(3, 4), Residual(4), Residual(4), nn.Linear(4, 2)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 2)
    ),
    "tied": Tied,
    "branches": Branches,
}
INPUTS = {"tied": torch.arange(6).view(2, 3), "convolutions": torch.randn(5, 3, 1, 1)}


def counted(model, inputs, depth, trained, prefix, layers):
    """The FLOPs of a real step."""
    if prefix is not None:
        prefix.freeze(depth)
    for name, group in layers.items():
        inside = prefix is not None and prefix.block_of(group)
        if inside is None or inside is False or inside >= depth:
            group.set_active(None if name in trained else torch.zeros(group.n_neurons).bool())
    with FlopCounterMode(display=False) as counter:
        out = model(inputs)
        out = out["loss"] if isinstance(out, dict) else out
        if out.requires_grad:
            out.backward(torch.ones_like(out))
    if prefix is not None:
        prefix.freeze(0)
    return counter.get_total_flops()


@pytest.fixture
def flops_for_time(monkeypatch):
    """The clock shows how many FLOPs were made."""
    with FlopCounterMode(display=False) as counter:
        clock = counter.get_total_flops, lambda one, other: float(other - one)
        monkeypatch.setattr(rehearsal, "_moments", lambda module: clock)
        yield


@pytest.mark.usefixtures("flops_for_time")
@pytest.mark.parametrize("leave_alone", [(), None], ids=["all", "but the classifier"])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_takes_what_a_real_step_takes(name, leave_alone):
    model = MODELS[name]()
    inputs = INPUTS.get(name, torch.randn(5, 3))
    layers = chosen_for(model, leave_alone)
    prefix = None if name == "branches" else neq.Prefix(model, inputs)
    blocks = () if prefix is None else prefix.blocks
    times = rehearsal.rehearse(model, layers, blocks, (inputs,), ())
    for depth in range(1 + len(blocks)):
        for choice in product((False, True), repeat=len(layers)):
            trained = {n for n, trains in zip(layers, choice, strict=True) if trains}
            expected = counted(model, inputs, depth, trained, prefix, layers)
            assert times.ms(depth, dict.fromkeys(trained, 1.0)) == expected, (depth, trained)


def test_segments_say_what_always_trains_and_where_blocks_end():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.body, self.act = nn.Linear(3, 3), nn.PReLU()

        def forward(self, x):
            return self.act(self.body(x * self.scale))

    model = nn.Sequential(Loose(), nn.Linear(3, 2))
    layers = chosen_for(model, None)
    blocks = neq.Prefix(model, torch.randn(2, 3)).blocks
    times = rehearsal.rehearse(model, layers, blocks, (torch.randn(2, 3),), ())
    found = [(one.name, one.group, one.block, one.fixed) for one in times.segments]
    assert found == [
        ("0.body", "0.body", 0, False),
        ("0.act", None, 0, True),
        ("0", None, 0, True),  # its scale
        ("1", "1", None, True),  # the classifier, left alone
    ]


def test_a_rehearsal_leaves_no_trace():
    model = neq.convert(Net())
    model.drop.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the optimizer's step
    steps = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.conv.set_active([1])
    layers = chosen_for(model, None)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    images = data()[0][:4]
    rehearsal.rehearse(model, layers, (), (images,), [optimizer])
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert not model.drop.training
    assert not steps
    assert not optimizer.state
    assert all(p.grad.eq(1).all() for p in model.parameters())
    assert model.conv.active_rows.tolist() == [1]
    assert not any(m._forward_hooks for m in model.modules())


def test_updates_are_timed_for_each_parameter():
    model = neq.convert(nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 10, bias=False)))
    for kind in (torch.optim.SGD, torch.optim.AdamW, neq.optim.AdamW):
        optimizer = kind(model.parameters(), lr=1e-3)
        if kind is neq.optim.AdamW:
            optimizer.follow(model)
        times = rehearsal.rehearse(
            model, chosen_for(model, ()), (), (torch.randn(4, 30),), [optimizer]
        )
        first, second = (one.update for one in times.segments)
        assert first == pytest.approx(3 * second)
        assert first > 0


def test_what_can_not_be_timed_is_an_error():
    class Numbers(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    model = neq.convert(nn.Sequential(nn.Linear(3, 2)))
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="a step of LBFGS takes can't be measured on copies"):
        rehearsal.rehearse(
            model, chosen_for(model, ()), (), (x,), [torch.optim.LBFGS(model.parameters())]
        )
    model = nn.Sequential(nn.Linear(3, 2), Numbers(2, 2))
    with pytest.raises(ValueError, match="Sequential: no output has a gradient"):
        rehearsal.rehearse(model, chosen_for(model, ()), (), (x,), ())
