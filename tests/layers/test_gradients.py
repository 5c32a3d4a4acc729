"""Every layer and geometry: the plain module's output, and gradients of the active rows only."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import neq
from neq.layers.conversion import convertible
from neq_kernels import planner
from tests.support.layers import (
    ALL,
    EMBEDDING,
    MATRIX,
    NORM,
    active_elements,
    first_of_each,
    random_mask,
    run,
)
from tests.support.tensors import integers

each = pytest.mark.parametrize
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]


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


@each("bad", [torch.nan, torch.inf])
@each("case", [c for c in MATRIX if 0 not in c.shape], ids=repr)
def test_frozen_rows_are_zero_whatever_comes_in(case, bad, backend):
    _, layer = case.twins()
    layer.set_active([0])
    run(layer, torch.full(case.shape, bad), **case.forward)
    for name, active in active_elements(layer).items():
        assert not getattr(layer, name).grad[~active].any(), name


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
    if case not in EMBEDDING:
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


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (neq.NEqLinear(6, 5), (1, 6)),
        (neq.NEqLinear(6, 5), (6,)),
        (neq.NEqConv1d(6, 5, 1), (1, 6, 1)),
        (neq.NEqConv2d(6, 5, 3), (1, 6, 3, 3)),
        (neq.NEqConvTranspose2d(6, 5, 1), (1, 6, 1, 1)),
        (neq.NEqLayerNorm(5), (1, 5)),
        (neq.NEqGroupNorm(1, 5), (1, 5, 1)),
        (neq.NEqBatchNorm1d(5).eval(), (1, 5)),
    ],
    ids=repr,
)
def test_of_one_sample_the_gradient_that_comes_is_left_as_it_is(layer, shape):
    """Frozen elements of db become zeros in place, where db can be no part of dY."""
    layer.set_active([1, 3])
    with planner.only("dense"):
        y = layer(torch.randn(shape))
        dy = torch.randn_like(y)
        before = dy.clone()
        y.backward(dy)
    assert torch.equal(dy, before)
    assert layer.bias.grad.nonzero().flatten().tolist() == [1, 3]
