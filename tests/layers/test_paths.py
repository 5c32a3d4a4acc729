"""Which way a layer goes: the plain one, the vendor's joint backward, or one operator."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq_kernels import ops
from neq_kernels.wgrad import dense, planner
from tests.support.layers import ALL, MATRIX, NORM, Operators, Saved, first_of_each, run

each = pytest.mark.parametrize
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


@each("case", [*MATRIX, *NORM], ids=repr)
def test_no_active_row(case):
    plain, layer = case.twins()
    layer.set_active([])
    x = case.input().requires_grad_()
    with Saved() as saved:
        y = layer(x, **case.forward)
    with Operators() as ops:
        y.backward(torch.ones_like(y))
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None
    assert not ops.of_neq
    if case in MATRIX:  # the norms need their input for dX
        assert not saved.has(x)
        assert saved.bytes <= layer.weight.nbytes, "nor a copy of it"
    # of a norm with statistics the output is frozen too: that of eval mode
    plain.train(not (layer.has_statistics and layer.running_mean is not None))
    expected, dx = run(plain, x.detach(), torch.ones_like(y), **case.forward)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, dx)
    for name, buffer in plain.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer)


@each("case", ALL, ids=repr)
def test_no_active_row_and_nothing_upstream(case):
    _, layer = case.twins()
    layer.set_active([])
    with Saved() as saved:
        y = layer(case.input(), **case.forward)
    assert not y.requires_grad
    assert not saved.tensors


@each("case", first_of_each(ALL), ids=repr)
@each("rows", [None, "all", "mask"])
def test_all_rows_active_is_the_plain_path(case, rows):
    plain, layer = case.twins()
    n = layer.n_neurons
    layer.set_active([0])
    layer.set_active({None: None, "all": range(n), "mask": torch.ones(n, dtype=torch.bool)}[rows])
    x = case.input()
    dy = torch.randn(plain(x, **case.forward).shape)
    plain.load_state_dict(layer.state_dict())  # the running statistics
    with Operators() as theirs:
        y, dx = run(plain, x, dy, **case.forward)
    with Operators() as ours:
        mine, my_dx = run(layer, x, dy, **case.forward)
    assert ours.names == theirs.names
    assert torch.equal(mine, y)
    assert torch.equal(my_dx, dx)
    for (name, p), q in zip(plain.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@each("case", first_of_each(MATRIX), ids=repr)
def test_the_operator_is_called_where_something_observes(case, monkeypatch):
    monkeypatch.setattr(planner, "choose", lambda *sizes: "pack")
    _, layer = case.twins()
    layer.set_active([0])
    x = case.input()
    y = layer(x, **case.forward)
    with torch.profiler.profile() as profile:
        y.sum().backward(retain_graph=True)
    assert sum(event.key.startswith("neq::") for event in profile.key_averages()) == 1
    seen = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()

    def dispatched(*args):
        raise AssertionError("nothing observes")

    monkeypatch.setattr(ops, "linear_wgrad", dispatched)
    monkeypatch.setattr(ops, "conv_wgrad", dispatched)
    y.sum().backward()
    assert all(torch.equal(p.grad, seen[name]) for name, p in layer.named_parameters())


@each("backend", ["dense", "pack", None])
@each("case", first_of_each(MATRIX), ids=repr)
def test_some_rows_active_runs_one_operator_unless_dense_is_chosen(case, backend, monkeypatch):
    """Then the vendor's joint backward runs, as in the plain layer, and the rows are zeroed."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: backend)
    monkeypatch.setattr(planner, "_measure", lambda *args: backend or "dense")
    plain, layer = case.twins()
    layer.set_active([0])
    x = case.input()
    dy = torch.randn(plain(x, **case.forward).shape)
    with Operators() as ops:
        run(layer, x, dy, **case.forward)
    if backend != "dense":
        assert len(ops.of_neq) == 1
        return
    assert not ops.of_neq
    with Operators() as theirs:
        run(plain, x, dy, **case.forward)
    more = Counter(ops.names) - Counter(theirs.names)
    views, fills = {"detach", "view", "t", "clone"}, {"index_fill", "index_fill_"}
    of_columns = {"new_full", "bitwise_and_"}
    assert {name.split("::")[1].split(".")[0] for name in more} <= views | fills | of_columns


@each("case", MATRIX, ids=repr)
@pytest.mark.usefixtures("fresh_planner")
def test_the_planner_is_asked_before_the_forward_what_it_is_asked_after(case, monkeypatch):
    asked = []

    def problem_of(*sizes):
        asked.append(problem(*sizes))
        return asked[-1]

    problem = planner.problem_of
    monkeypatch.setattr(planner, "problem_of", problem_of)
    monkeypatch.setattr(planner, "predict", lambda problem: "pack")
    monkeypatch.setitem(planner.BACKENDS, "pack", dense)
    monkeypatch.setitem(planner.LINEAR, "pack", dense)
    _, layer = case.twins()
    layer.set_active([0])
    y = layer(case.input(), **case.forward)
    if layer.n_neurons == 1:
        return
    (early,) = asked
    assert early.neurons == layer.n_neurons
    assert math.prod(early.dy) == y.numel()
    planner._choices.clear()
    y.sum().backward()
    assert set(asked) == {early}


@each("backend", ["dense", "pack"])
@pytest.mark.usefixtures("fresh_planner")
def test_tuning_waits_for_the_backward(backend, monkeypatch):
    """What is timed there decides between the paths of the next forward."""
    monkeypatch.setattr(planner.timing, "fastest", lambda *args: backend)
    layer = neq.convert(nn.Linear(6, 8))
    layer.set_active([1])
    ran = []
    with planner.tuning():
        for _ in range(2):
            with Operators() as ops:
                layer(torch.ones(3, 6)).sum().backward()
            ran.append(len(ops.of_neq))
    assert ran == [1, 0 if backend == "dense" else 1]


def nodes_of(y):
    """The names of the nodes behind ``y``."""
    found, to_do = Counter(), [y.grad_fn]
    while to_do:
        node = to_do.pop()
        found[node.name()] += 1
        to_do += [n for n, _ in node.next_functions if n is not None]
    return found


@each("bias", [True, False])
@each("shape", [(4, 6), (1, 6), (2, 3, 6), (2, 2, 3, 6), (0, 6)], ids=str)
def test_a_linear_layer_has_the_plain_graph(shape, bias, monkeypatch):
    """Hooks zero its frozen rows, without a node of their own."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: "dense")
    plain = nn.Linear(6, 8, bias=bias)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 4])
    x = torch.randn(shape, requires_grad=True)
    assert nodes_of(layer(x)) == nodes_of(plain(x))


def another_sum(x, weight, bias):
    return x @ weight.t() + bias


def another_transposition(x, weight, bias):
    return torch.addmm(bias, x, weight.transpose(0, 1))


@each(
    ("x", "linear"),
    [
        (torch.randn(6, 3, 2).permute(1, 2, 0), F.linear),
        (torch.randn(3, 6), another_sum),
        (torch.randn(3, 6), another_transposition),
    ],
    ids=["an input with gaps", "another sum", "another transposition"],
)
def test_a_linear_layer_whose_nodes_are_others(x, linear, monkeypatch):
    """Weight and bias go through a node that zeroes."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: "dense")
    monkeypatch.setattr(F, "linear", linear)
    plain = nn.Linear(6, 8)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 4])
    y = layer(x)
    assert nodes_of(y)["MaskGradBackward"] > 0
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad[[1, 4]], q.grad[[1, 4]])
        assert not p.grad[[0, 2, 3, 5, 6, 7]].any()


@each("bias", [True, False])
@each("shape", [(4, 6), (2, 3, 6)], ids=str)
def test_double_backward_of_a_linear_layer_reaches_no_frozen_row(shape, bias, monkeypatch):
    """Its weight also gets a gradient through dX; and once more, through that of dX."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: "dense")
    layer = neq.convert(nn.Linear(6, 8, bias=bias))
    layer.set_active([1, 4])
    x = torch.randn(shape, requires_grad=True)
    y = layer(x).pow(4).sum()
    for _ in range(3):
        y, *grads = torch.autograd.grad(y, [x, *layer.parameters()], create_graph=True)
        y = y.pow(2).sum()
        for grad in grads:
            assert grad[[1, 4]].any()
            assert not grad[[0, 2, 3, 5, 6, 7]].any()


def test_a_gradient_of_one_sample_is_not_written(monkeypatch):
    """Of a sum of vectors, the bias's gradient is dY itself."""
    monkeypatch.setattr(planner, "choose", lambda *sizes: "dense")
    monkeypatch.setattr(F, "linear", another_sum)
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 4])
    dy = torch.ones(8)
    layer(torch.randn(6)).backward(dy)
    assert dy.all()
    assert layer.bias.grad.sum() == 2
