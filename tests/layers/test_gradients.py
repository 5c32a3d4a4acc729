"""Every layer and geometry: the plain module's output, and gradients of the active rows only."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import neq
from neq.layers.conversion import convertible
from neq_kernels import ops
from neq_kernels.wgrad import dense, planner
from tests.support.layers import (
    ALL,
    CONV,
    MATRIX,
    NORM,
    Operators,
    Saved,
    active_elements,
    first_of_each,
    integers,
    random_mask,
    run,
)

each = pytest.mark.parametrize
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


@pytest.fixture(params=["joint", "dense", "pack"])
def backend(request, monkeypatch):
    """Whoever computes the gradient: tiny layers alone would meet the joint backward only."""

    def choose(dy, x, weight, rows, k, bias, conv=None):
        return "dense" if conv is not None and conv.groups > 1 else request.param

    known_early = "dense" if request.param == "joint" else None
    monkeypatch.setattr(planner, "planned", lambda *sizes: known_early)
    monkeypatch.setattr(planner, "choose", choose)
    return request.param


def masks(neurons):
    yield random_mask(neurons)
    yield torch.arange(neurons) == neurons - 1  # one row
    if neurons > 1:
        yield torch.arange(neurons) != 0  # all but one


def test_each_layer_that_neq_has_is_among_the_cases():
    assert {case.kind for case in ALL} == set(convertible())


@each("case", MATRIX, ids=repr)
def test_exact_gradients(case, backend):
    """With small integers there is one right answer, whatever the order of summation."""
    for mask in masks(case.twins()[1].n_neurons):
        plain, layer = case.twins(exact=True)
        layer.set_active(mask)
        x = case.input(exact=True)
        y, dx = run(plain, x, **case.forward)
        dy = integers(y.shape)
        plain.zero_grad()
        y, dx = run(plain, x, dy, **case.forward)
        mine, my_dx = run(layer, x, dy, **case.forward)
        assert torch.equal(mine, y)
        assert torch.equal(my_dx, dx)
        for name, active in active_elements(layer).items():
            grad, expected = getattr(layer, name).grad, getattr(plain, name).grad
            assert torch.equal(grad, expected * active), name
            assert grad.stride() == expected.stride()
            assert grad.dtype == expected.dtype


@each("training", [True, False], ids=["train", "eval"])
@each("case", NORM, ids=repr)
def test_norms_equal_the_plain_ones_bit_for_bit(case, training):
    for mask in masks(case.twins()[1].n_neurons):
        plain, layer = case.twins()
        layer.set_active(mask)
        for module in plain, layer:
            run(module, torch.ones(case.shape) + torch.arange(case.shape[-1]))  # running statistics
            module.zero_grad()
            module.train(training)
        x, dy = case.input(), torch.randn(case.shape)
        y, dx = run(plain, x, dy)
        mine, my_dx = run(layer, x, dy)
        assert torch.equal(mine, y)
        assert torch.equal(my_dx, dx)
        for name, active in active_elements(layer).items():
            assert torch.equal(getattr(layer, name).grad, getattr(plain, name).grad * active), name
        mine, theirs = dict(layer.named_buffers()), dict(plain.named_buffers())
        assert mine.keys() == theirs.keys()
        for name, buffer in theirs.items():
            assert torch.equal(mine[name], buffer), name


WIDE = [
    ("linear", lambda: nn.Linear(33, 40), (3, 50, 33)),
    ("transformers", lambda: Conv1D(40, 33), (9, 7, 33)),
    ("conv", lambda: nn.Conv2d(9, 40, 3, padding=1), (6, 9, 12, 11)),
    ("conv same", lambda: nn.Conv2d(9, 40, 4, padding="same"), (6, 9, 12, 11)),
    ("conv channels_last", lambda: nn.Conv2d(9, 40, 3, stride=2), (6, 9, 12, 11)),
    ("grouped", lambda: nn.Conv2d(8, 40, 3, groups=4), (6, 8, 12, 11)),
    ("transposed", lambda: nn.ConvTranspose2d(9, 40, 3, stride=2), (6, 9, 6, 5)),
    ("transposed grouped", lambda: nn.ConvTranspose2d(8, 40, 3, groups=4), (6, 8, 6, 5)),
    ("conv1d", lambda: nn.Conv1d(9, 40, 5), (6, 9, 60)),
    ("conv3d", lambda: nn.Conv3d(5, 40, 3), (3, 5, 6, 7, 6)),
]


@each("dtype", [torch.float32, torch.bfloat16], ids=str)
@each(("name", "make", "shape"), WIDE, ids=[w[0] for w in WIDE])
def test_within_twice_the_vendors_error(name, make, shape, dtype, backend):
    plain = make().to(dtype)
    layer = neq.convert(copy.deepcopy(plain))
    truth = copy.deepcopy(plain).double()
    layer.set_active(random_mask(layer.n_neurons))
    x = torch.randn(shape).to(dtype)
    if name == "conv channels_last":
        x = x.to(memory_format=torch.channels_last)
    dy = torch.randn(plain(x).shape).to(dtype)
    y, dx = run(plain, x, dy)
    mine, my_dx = run(layer, x, dy)
    run(truth, x.double(), dy.double())
    assert torch.equal(mine, y)
    assert torch.equal(my_dx, dx)
    for key, active in active_elements(layer).items():
        exact = getattr(truth, key).grad * active
        mine, vendor = getattr(layer, key).grad, getattr(plain, key).grad * active
        assert (mine - exact).norm() <= 2 * (vendor - exact).norm(), key
        assert not mine[~active].any(), key


@each("case", ALL, ids=repr)
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
    expected, dx = run(plain, x.detach(), torch.ones_like(y), **case.forward)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, dx)


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
def test_the_operator_is_called_where_somebody_looks(case, monkeypatch):
    monkeypatch.setattr(planner, "planned", lambda *sizes: "pack")
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
        raise AssertionError("nobody looks")

    monkeypatch.setattr(ops, "linear_wgrad", dispatched)
    monkeypatch.setattr(ops, "conv_wgrad", dispatched)
    y.sum().backward()
    assert all(torch.equal(p.grad, seen[name]) for name, p in layer.named_parameters())


@each("plan", ["pack", "native"])
def test_gradients_whose_values_are_not_those_in_memory(plan, monkeypatch):
    monkeypatch.setattr(planner, "planned", lambda *sizes: plan)
    monkeypatch.setattr(planner, "choose", lambda *args: plan)
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 4])
    x = torch.randn(5, 6)
    y = layer(x)
    negated = torch.randn(5, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    (dw,) = torch.autograd.grad(y, layer.weight, negated, retain_graph=True)
    right = negated.resolve_neg().t() @ x
    torch.testing.assert_close(dw[[1, 4]], right[[1, 4]])

    several = torch.randn(3, 5, 8)
    (dws,) = torch.autograd.grad(y, layer.weight, several, is_grads_batched=True)
    torch.testing.assert_close(dws[:, [1, 4]], (several.mT @ x)[:, [1, 4]])
    assert not dws[:, [0, 2, 3, 5, 6, 7]].any()


@each("plan", ["dense", "pack", None])
@each("case", first_of_each(MATRIX), ids=repr)
def test_some_rows_active_runs_one_operator_unless_dense_is_planned(case, plan, monkeypatch):
    """Then the vendor's joint backward runs, as in the plain layer, and the rows are zeroed."""
    monkeypatch.setattr(planner, "planned", lambda *sizes: plan)
    monkeypatch.setattr(planner, "choose", lambda *args: plan or "dense")
    plain, layer = case.twins()
    layer.set_active([0])
    x = case.input()
    dy = torch.randn(plain(x, **case.forward).shape)
    with Operators() as ops:
        run(layer, x, dy, **case.forward)
    if plan != "dense":
        assert len(ops.of_neq) == 1
        return
    assert not ops.of_neq
    with Operators() as theirs:
        run(plain, x, dy, **case.forward)
    more = Counter(ops.names) - Counter(theirs.names)
    views, fills = {"detach", "view", "t"}, {"index_fill", "index_fill_"}
    of_columns = {"new_full", "bitwise_and_"}
    assert {name.split("::")[1].split(".")[0] for name in more} <= views | fills | of_columns


@each("case", MATRIX, ids=repr)
def test_the_planner_is_asked_before_the_forward_what_it_is_asked_after(case, monkeypatch):
    asked = []

    def problem_of(*sizes):
        asked.append(problem(*sizes))
        return asked[-1]

    problem = planner.problem_of
    monkeypatch.setattr(planner, "problem_of", problem_of)
    monkeypatch.setattr(planner, "_plans", {})
    monkeypatch.setattr(planner, "predict", lambda problem: "pack")
    monkeypatch.setitem(planner.BACKENDS, "pack", dense)
    _, layer = case.twins()
    layer.set_active([0])
    y = layer(case.input(), **case.forward)
    if layer.n_neurons == 1:
        return
    (early,) = asked
    assert early.neurons == layer.n_neurons
    assert math.prod(early.dy) == y.numel()
    planner._plans.clear()
    y.sum().backward()
    assert set(asked) == {early}


@each("plan", ["dense", "pack"])
def test_tuning_waits_for_the_backward(plan, monkeypatch):
    """What is timed there decides between the paths of the next forward."""
    monkeypatch.setattr(planner, "_plans", {})
    monkeypatch.setattr(planner, "_measured", {})
    monkeypatch.setattr(planner, "_fastest", lambda *args: plan)
    layer = neq.convert(nn.Linear(6, 8))
    layer.set_active([1])
    ran = []
    with planner.tuning():
        for _ in range(2):
            with Operators() as ops:
                layer(torch.ones(3, 6)).sum().backward()
            ran.append(len(ops.of_neq))
    assert ran == [1, 0 if plan == "dense" else 1]


@each("bad", [torch.nan, torch.inf])
@each("case", [c for c in MATRIX if 0 not in c.shape], ids=repr)
def test_frozen_rows_are_zero_whatever_comes_in(case, bad, backend):
    _, layer = case.twins()
    layer.set_active([0])
    run(layer, torch.full(case.shape, bad), **case.forward)
    for name, active in active_elements(layer).items():
        assert not getattr(layer, name).grad[~active].any(), name


@each("inputs", [1, 6])
@each("leading", [(), (1,), (3,), (1, 1)], ids=str)
@each("kind", [nn.Linear, Conv1D])
def test_a_gradient_that_others_read_is_not_written(kind, leading, inputs, backend):
    """The bias's gradient can be dY itself."""
    layer = neq.convert(nn.Linear(inputs, 8) if kind is nn.Linear else Conv1D(8, inputs))
    layer.set_active([1, 2])
    y = layer(torch.randn(*leading, inputs))
    dy = torch.randn(y.shape)
    kept = dy.clone()
    other = torch.zeros_like(y, requires_grad=True)
    (y + other).backward(dy)
    assert torch.equal(dy, kept)
    assert torch.equal(other.grad, kept)


@each(
    "case",
    [c for c in first_of_each(ALL) if c.make()._parameters.get("bias") is not None],
    ids=repr,
)
@each("fixed", ["weight", "bias"])
def test_requires_grad_of_weight_or_bias_alone(case, fixed):
    plain, layer = case.twins(exact=True)
    layer.set_active(random_mask(layer.n_neurons))
    x = case.input(exact=True)
    dy = integers(plain(x, **case.forward).shape)
    plain.load_state_dict(layer.state_dict())
    for module in plain, layer:
        getattr(module, fixed).requires_grad_(False)
    y, dx = run(plain, x, dy, **case.forward)
    mine, my_dx = run(layer, x, dy, **case.forward)
    assert torch.equal(mine, y)
    assert torch.equal(my_dx, dx)
    assert getattr(layer, fixed).grad is None
    free = "bias" if fixed == "weight" else "weight"
    active = active_elements(layer)[free]
    assert torch.equal(getattr(layer, free).grad, getattr(plain, free).grad * active)


@each("case", first_of_each(ALL), ids=repr)
def test_a_layer_whose_parameters_are_all_fixed(case):
    _, layer = case.twins()
    layer.set_active([0])
    layer.requires_grad_(False)
    assert not layer(case.input(), **case.forward).requires_grad
    run(layer, case.input(), **case.forward)
    assert layer.weight.grad is None


@each("case", first_of_each(ALL), ids=repr)
def test_the_mask_of_the_forward_is_the_mask_of_its_backward(case):
    plain, layer = case.twins(exact=True)
    mask = random_mask(layer.n_neurons)
    layer.set_active(mask)
    expected = active_elements(layer)
    x = case.input(exact=True)
    y = layer(x, **case.forward)
    layer.set_active(~mask)
    dy = integers(y.shape)
    y.backward(dy)
    run(plain, x, dy, **case.forward)
    for name, active in expected.items():
        assert torch.equal(getattr(layer, name).grad, getattr(plain, name).grad * active)


@each("case", first_of_each(CONV), ids=repr)
def test_channels_last(case, backend):
    if len(case.shape) != 4:
        case = next(c for c in CONV if len(c.shape) == 4)
    plain, layer = case.twins(exact=True)
    layer.set_active(random_mask(layer.n_neurons))
    for module in plain, layer:
        module.to(memory_format=torch.channels_last)
    x = case.input(exact=True).to(memory_format=torch.channels_last)
    dy = integers(plain(x).shape)
    y, dx = run(plain, x, dy)
    mine, my_dx = run(layer, x, dy)
    assert torch.equal(mine, y)
    assert mine.stride() == y.stride()
    assert torch.equal(my_dx, dx)
    assert torch.equal(layer.weight.grad, plain.weight.grad * active_elements(layer)["weight"])
    assert layer.weight.grad.stride() == plain.weight.grad.stride()


@each("view", ["transposed", "expanded", "strided", "subclass"])
def test_inputs_of_any_layout(view, backend):
    plain = nn.Linear(6, 8)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2, 7])
    x = {
        "transposed": lambda: integers((6, 4)).t(),
        "expanded": lambda: integers((1, 6)).expand(4, 6),
        "strided": lambda: integers((8, 12))[::2, ::2],
        "subclass": lambda: integers((4, 6)).as_subclass(type("Pixels", (torch.Tensor,), {})),
    }[view]()
    dy = integers((4, 8))
    for module in plain, layer:
        y = module(x)
        y.backward(dy.as_subclass(type(y)))
    assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])


@each("layout", ["jagged", "sparse", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_inputs_that_are_not_one_dense_block(layout):
    plain = nn.Linear(6, 8)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2, 7])
    x = {
        "jagged": lambda: torch.nested.nested_tensor(
            [torch.randn(3, 6), torch.randn(5, 6)], layout=torch.jagged
        ),
        "sparse": lambda: torch.randn(4, 6).relu().to_sparse(),
        "sparse_csr": lambda: torch.randn(4, 6).relu().to_sparse_csr(),
    }[layout]()
    for module in plain, layer:
        y = module(x)
        (y.values() if layout == "jagged" else y).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad * layer.active_mask)


@each("rows", [[0, 3], []], ids=str)
@each("make", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 3)], ids=["linear", "conv"])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_weights(make, rows):
    plain = make().to(torch.complex64)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active(rows)
    x = torch.randn(4, 4, dtype=torch.complex64)
    dy = torch.randn_like(plain(x))
    y, dx = run(plain, x, dy)
    mine, my_dx = run(layer, x, dy)
    torch.testing.assert_close(mine, y)
    torch.testing.assert_close(my_dx, dx)
    if not rows:
        assert layer.weight.grad is None
        return
    for name, active in active_elements(layer).items():
        torch.testing.assert_close(getattr(layer, name).grad, getattr(plain, name).grad * active)


def test_an_input_changed_before_backward_is_an_error_as_in_torch():
    layer = neq.convert(nn.Linear(4, 4))
    layer.set_active([1])
    x = torch.randn(2, 4)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradcheck():
    """Against finite differences: dX whole, dW and db on the active rows."""
    for case in first_of_each(MATRIX):
        layer = case.twins()[1].double()
        layer.set_active([1, 2])
        active = active_elements(layer)
        free = {k: getattr(layer, k).detach()[a].requires_grad_() for k, a in active.items()}
        full = {k: getattr(layer, k).detach() for k in active}

        def forward(x, *values, layer=layer, active=active, full=full, case=case):
            entries = zip(full, values, strict=True)
            given = {k: full[k].masked_scatter(active[k], v) for k, v in entries}
            return torch.func.functional_call(layer, given, (x,), case.forward)

        x = case.input().double().requires_grad_()
        assert torch.autograd.gradcheck(forward, (x, *free.values()))


@each(
    "make",
    [
        lambda: neq.NEqLayerNorm(4, elementwise_affine=False),
        lambda: neq.NEqInstanceNorm2d(4),
        lambda: neq.NEqBatchNorm2d(4, affine=False),
    ],
)
def test_without_a_weight_there_are_no_neurons(make):
    with pytest.raises(ValueError, match=r"NEq\w+: without a weight it has no neurons"):
        make()


@each("case", first_of_each(ALL), ids=repr)
def test_layers_can_be_made_directly(case):
    plain = case.make()
    layer = convertible()[case.kind](*case.args, **case.options)
    layer.load_state_dict(plain.state_dict())
    layer.set_active([0])
    assert layer.active_fraction == 1 / layer.n_neurons
    x = case.input()
    assert torch.equal(layer(x, **case.forward), plain(x, **case.forward))
    assert type(neq.revert(layer)) is type(plain)


@pytest.mark.gpu
def test_sync_batch_norm_in_a_process_group(tmp_path):
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", world_size=1, rank=0
    )
    try:
        plain = nn.SyncBatchNorm(6).cuda()
        layer = neq.convert(copy.deepcopy(plain))
        layer.set_active([1, 4])
        x, dy = torch.randn(2, 4, 6, 3, 2, device="cuda")
        y, dx = run(plain, x, dy)
        mine, my_dx = run(layer, x, dy)
        assert torch.equal(mine, y)
        assert torch.equal(my_dx, dx)
        assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask)
        assert torch.equal(layer.bias.grad, plain.bias.grad * layer.active_mask)
    finally:
        torch.distributed.destroy_process_group()
