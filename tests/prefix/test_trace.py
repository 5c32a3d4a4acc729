"""One traced forward: which outputs every path crosses, and which modules hand them on."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.prefix.trace import tensors_in, trace
from tests.support.cuttable import resnet

pytestmark = pytest.mark.usefixtures("one_thread")


def modules(model, x):
    return [one.module for one in trace(model, (x,)).crossings]


class Halves(nn.Module):
    def forward(self, x):
        return x.chunk(2, -1)


class Gated(nn.Module):
    """One node with two outputs, both used or one of them."""

    def __init__(self, both):
        super().__init__()
        self.both, self.a, self.halves = both, nn.Linear(3, 4), Halves()
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        one, other = self.halves(self.a(x))
        return self.head(one * other.sigmoid() if self.both else one)


def test_two_outputs_of_one_node_are_two_paths():
    x = torch.randn(2, 3)
    assert modules(Gated(both=True), x) == ["a", "head"]
    assert modules(Gated(both=False), x) == ["a", "halves", "head"]


class Late(nn.Module):
    """A module hands on what was computed long before."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.body, self.late, self.head = nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)

    def forward(self, x):
        x = F.linear(x, self.weight)
        y = self.body(x)
        return self.head(y + self.late(x))


def test_a_module_that_ends_too_late_is_no_end():
    assert modules(Late(), torch.randn(2, 3)) == ["head"]


def test_modules_that_hand_on_one_tensor_are_in_the_order_in_which_they_began():
    found = trace(resnet(), (torch.randn(2, 3, 8, 8),)).crossings
    by_place = {}
    for one in found:
        by_place.setdefault(one.place, []).append(one.module)
    assert [*by_place.values()][2:] == [
        ["stem", "stem.2"],
        ["blocks.0"],
        ["blocks", "blocks.1"],
        ["pool.0"],
        ["pool", "pool.1", "drop"],
        ["head"],
    ]


def test_neurons_and_parameters_that_do_not_train_count_too():
    model, x = neq.convert(resnet()), torch.randn(2, 3, 8, 8)
    expected = [(one.module, one.complete, one.open) for one in trace(model, (x,)).crossings]
    model.stem.requires_grad_(False)
    for layer in (model.stem[0], model.blocks[0].a, model.blocks[0].shortcut, model.blocks[0].b):
        layer.set_active([])
    found = trace(model, (x,)).crossings
    assert [(one.module, one.complete, one.open) for one in found] == expected
    assert model.stem[0].weight in found[0].parameters


def test_nothing_is_kept_for_a_backward():
    model = resnet()
    seen = []
    model.stem[2].register_forward_hook(lambda m, args, y: seen.append(weakref.ref(y)))
    model.head.register_forward_hook(lambda m, args, y: seen.append(seen[0]()))
    trace(model, (torch.randn(2, 3, 8, 8),))
    assert seen[1] is None


def test_a_hidden_state_that_is_an_output_too_is_no_end():
    class Telling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.a(x)
            return {"logits": self.head(self.b(hidden)), "hidden": (hidden, None)}

    assert modules(Telling(), torch.randn(2, 3)) == ["a", "b", "head"]


def test_several_outputs_that_end_apart():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            x = self.a(x)
            return self.one(x), self.other(x)

    assert modules(TwoHeads(), torch.randn(2, 3)) == ["a"]
    model = TwoHeads()
    assert trace(model, (torch.randn(2, 3),)).parameters == {*model.parameters()}
    assert [block.end for block in neq.blocks(TwoHeads(), torch.randn(2, 3))] == ["a"]


def test_tensors_in_containers():
    x, y = torch.ones(1), torch.zeros(1)
    assert [*tensors_in({"a": (x, None), "b": [y], "c": {x}})] == [x, y]
