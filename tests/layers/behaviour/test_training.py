"""Everything that people do to modules, done to converted ones with some neurons frozen."""

import copy
import functools
import gc
import io
import pickle
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import neq
from neq_kernels.wgrad import planner
from tests.support.layers import (
    LINEAR,
    MATRIX,
    NORM,
    Operators,
    Saved,
    Tiny,
    active_elements,
    assert_gradients_of_active_rows,
    first_of_each,
    gradients,
    layers_of,
    mask_randomly,
    run,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["dense", None], ids=["joint", "by rows"])
def path(request, monkeypatch):
    """Tiny layers alone would all take the vendor's joint backward."""
    monkeypatch.setattr(planner, "planned", lambda *sizes: request.param)
    monkeypatch.setattr(planner, "choose", lambda *tensors: "dense")
    return request.param


@pytest.fixture
def plain():
    return Tiny()


@pytest.fixture
def model(plain):
    """The same model, converted, with random rows."""
    model = neq.convert(copy.deepcopy(plain))
    mask_randomly(model)
    return model


def step(model, x=None):
    torch.manual_seed(1)
    model.zero_grad()
    y = model(tiny_input() if x is None else x)
    y.square().sum().backward()
    return y


def masks_of(model):
    return [layer.active_rows.tolist() for layer in layers_of(model)]


def test_a_training_step(plain, model):
    assert torch.equal(step(model), step(plain))
    assert_gradients_of_active_rows(model, plain)
    for name, buffer in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


# Copies and files


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_the_meta_device(model):
    """What ``map_location`` does to tensors must not reach the masks."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False, map_location="meta")
    copied = copied.to_empty(device="cpu")
    copied.load_state_dict(model.state_dict())
    return copied


COPIES = [copy.deepcopy, through_pickle, through_a_file, through_the_meta_device]


@each("duplicate", COPIES, ids=lambda f: f.__name__)
def test_copies_have_masks_of_their_own(plain, model, duplicate):
    other = duplicate(model)
    assert masks_of(other) == masks_of(model)
    step(plain)
    step(other)
    assert_gradients_of_active_rows(other, plain)
    before = masks_of(model)
    for layer in layers_of(other):
        layer.set_active([0])
    assert masks_of(model) == before
    assert repr(other) == repr(plain)
    assert [type(m) for m in neq.revert(other).modules()] == [type(m) for m in plain.modules()]


def test_a_copy_of_one_layer(model):
    layer = copy.deepcopy(model.hidden)
    layer.set_active([])
    assert model.hidden.active_fraction > 0


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_to_and_from_the_plain_model(plain, model):
    step(model)
    state = saved_and_loaded(model.state_dict())
    assert state.keys() == plain.state_dict().keys()
    assert not plain.load_state_dict(state, strict=True).missing_keys
    x = tiny_input()
    assert torch.equal(plain.eval()(x), model.eval()(x))
    step(plain.train())
    model.load_state_dict(saved_and_loaded(plain.state_dict()), strict=True)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_load_state_dict_keeps_the_mask_and_the_parameters(plain, model):
    before, parameters = masks_of(model), list(model.parameters())
    model.load_state_dict(plain.state_dict())
    assert masks_of(model) == before
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))


def test_load_state_dict_assign(plain, model):
    model.load_state_dict(copy.deepcopy(plain).state_dict(), assign=True)
    for p in model.parameters():
        p.requires_grad_()
    step(plain)
    step(model)
    assert_gradients_of_active_rows(model, plain)


def test_exponential_moving_average(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert masks_of(average.module) == masks_of(model)
    torch.optim.swa_utils.update_bn([tiny_input()], average)


# Places and types


@each("move", ["double", "to bfloat16", "half", "channels_last", "to cpu", "share_memory"])
def test_moves(plain, model, move):
    x = tiny_input()
    moves = {
        "double": lambda m: m.double(),
        "to bfloat16": lambda m: m.to(torch.bfloat16),
        "half": lambda m: m.half(),
        "channels_last": lambda m: m.to(memory_format=torch.channels_last),
        "to cpu": lambda m: m.to("cpu"),
        "share_memory": lambda m: m.share_memory(),
    }
    for m in plain, model:
        assert moves[move](m) is m
    x = x.to(plain.conv.weight.dtype)
    if move == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    mine, theirs = step(model, x), step(plain, x)
    assert torch.equal(mine, theirs)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == q.grad.dtype
        assert p.grad.stride() == q.grad.stride()
    for layer in layers_of(model):
        for name, active in active_elements(layer).items():
            assert not getattr(layer, name).grad[~active].any()
    if move not in ("half", "to bfloat16"):
        assert_gradients_of_active_rows(model, plain)


def test_eval_uses_the_running_statistics(plain, model):
    for m in plain, model:
        step(m)
        m.eval()
    assert torch.equal(step(model), step(plain))
    assert_gradients_of_active_rows(model, plain)
    for m in plain, model:
        m.train()
    assert torch.equal(step(model), step(plain))


# Hooks


def test_forward_hooks(model):
    calls = []
    layer = model.hidden
    layer.register_forward_pre_hook(lambda m, args: calls.append("pre") or (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, out: calls.append("post") or out + 1)
    x = torch.randn(3, 6)
    y = layer(x)
    assert calls == ["pre", "post"]
    assert torch.equal(y, nn.functional.linear(x * 2, layer.weight, layer.bias) + 1)
    y.sum().backward()
    assert torch.equal(layer.weight.grad[layer.active_rows[0]], 2 * x.sum(0))


@each("rows", [[], [1], None], ids=str)
def test_full_backward_hooks(plain, model, rows):
    seen = {}
    for m in plain, model:
        m.hidden.register_full_backward_pre_hook(
            lambda _, dy, m=m: seen.update({(m, "pre"): dy[0]})
        )
        m.hidden.register_full_backward_hook(lambda _, dx, dy, m=m: seen.update({m: dx[0]}))
    model.hidden.set_active(rows)
    x = torch.randn(3, 6)
    for m in plain, model:
        m.hidden(x.clone().requires_grad_()).square().sum().backward()
    assert torch.equal(seen[model], seen[plain])
    assert torch.equal(seen[model, "pre"], seen[plain, "pre"])


def test_hooks_on_parameters(model):
    p = model.hidden.weight
    p.register_hook(lambda grad: grad * 2)
    after = []
    p.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    step(model)
    twice = after[0]
    reference = copy.deepcopy(model)
    step(neq.revert(reference))
    active = active_elements(model.hidden)["weight"]
    torch.testing.assert_close(twice, 2 * reference.hidden.weight.grad * active)


def test_hooks_put_on_before_convert_stay(plain):
    calls = []
    plain.hidden.register_forward_hook(lambda *_: calls.append(1))
    step(neq.convert(plain))
    assert calls == [1]


@each("hook", ["half", "none"])
def test_saved_tensors_hooks_see_float_tensors_only(model, hook):
    """What rounds or offloads activations must not meet our bookkeeping."""
    seen = []

    def pack(t):
        seen.append(t)
        return t.bfloat16() if hook == "half" else t

    layer = model.hidden
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float()):
        y = layer(torch.ones(3, 6))
    y.sum().backward()
    assert all(t.is_floating_point() for t in seen)
    assert (layer.weight.grad[layer.active_rows] == 3).all()


@each("backend", ["native", "pack"])
@each(
    "unpack",
    [
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda x: x[:1],
        lambda x: x[:, :2],
        lambda x: x.to("meta"),
    ],
    ids=["narrower", "wider", "samples", "inputs", "device"],
)
def test_another_tensor_than_was_saved_is_an_error(backend, unpack):
    """Where kernels read by address, nobody else would notice."""
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 2])
    with mock.patch.object(planner, "planned", return_value=backend):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = layer(torch.ones(3, 6))
        with pytest.raises(
            (ValueError, RuntimeError), match=r"dtype|size|dimensions|inputs|device"
        ):
            y.sum().backward()


def test_a_saved_tensor_without_memory_is_an_error():
    def freed(x):
        x.untyped_storage().resize_(0)
        return x

    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 2])
    with mock.patch.object(planner, "planned", return_value="native"):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, freed):
            y = layer(torch.ones(3, 6))
        with pytest.raises(ValueError, match="a tensor must have memory"):
            y.sum().backward()


@each("transform", ["vjp", "functionalize", "jvp"])
def test_a_transform_around_a_backward_pass(transform):
    """Of a graph made outside; after one without, which has taught what an ordinary tensor is."""
    layer = neq.NEqLinear(6, 8)
    layer.set_active([1, 2])
    with mock.patch.object(planner, "planned", return_value="native"):
        y = layer(torch.arange(18.0).view(3, 6))
        dy = torch.arange(24.0).view(3, 8)

        def backward(dy):
            return torch.autograd.grad(y, layer.weight, dy, retain_graph=True)[0]

        expected = backward(dy)
        if transform == "vjp":
            assert torch.equal(torch.func.vjp(backward, dy)[0], expected)
        elif transform == "functionalize":
            assert torch.equal(torch.func.functionalize(backward)(dy), expected)
        else:
            with pytest.raises(RuntimeError, match="forward-mode derivatives of a backward pass"):
                torch.func.jvp(backward, (dy,), (dy,))


# What trains, and what does not


def test_requires_grad_of_the_model(plain, model):
    for m in plain, model:
        m.requires_grad_(False)
        m.head.requires_grad_(True)
        step(m)
    assert_gradients_of_active_rows(model.head, plain.head)
    assert all(p.grad is None for n, p in model.named_parameters() if "head" not in n)


def test_no_grad_and_inference_mode(plain, model):
    x = tiny_input()
    for mode in torch.no_grad(), torch.inference_mode():
        with mode, Saved() as saved, Operators() as ours:
            y = model.eval()(x)
        with mode, Operators() as theirs:
            assert torch.equal(y, plain.eval()(x))
        assert not y.requires_grad
        assert not saved.tensors
        assert set(ours.names) == set(theirs.names) - {"aten::equal"}, "the plain path"


def test_layers_below_the_first_active_one_are_not_visited(model):
    for layer in layers_of(model):
        layer.set_active([])
    model.head.set_active([1])
    y = model(tiny_input())
    with Operators() as ops:
        y.sum().backward()
    assert "aten::convolution_backward" not in ops.names
    assert ops.names.count("aten::mm") + len(ops.of_neq) == 1, "the weight gradient of the head"
    grads = gradients(model)
    assert {n for n, g in grads.items() if g is not None} == {"head.weight", "head.bias"}


def test_gradient_accumulation(plain, model):
    for m in plain, model:
        for seed in 1, 2:
            torch.manual_seed(seed)
            m(tiny_input()).square().sum().backward()
    assert_gradients_of_active_rows(model, plain)


def test_accumulation_over_two_masks(model):
    layer = model.hidden
    x = torch.ones(2, 6)
    layer.set_active([1, 2])
    layer(x).sum().backward()
    layer.set_active([2, 3])
    layer(x).sum().backward()
    assert layer.bias.grad.tolist()[:5] == [0, 2, 4, 2, 0]


def test_retain_graph(model):
    layer = model.hidden
    layer.set_active([1])
    loss = layer(torch.ones(2, 6)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert layer.bias.grad[1] == 4
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_input_is_released_by_backward(model):
    for layer in model.hidden, model.conv:
        layer.set_active([1])
        x = torch.randn(2, 6) if layer is model.hidden else tiny_input()
        copied = x.clone()
        ref = weakref.ref(copied)
        loss = layer(copied).sum()
        del copied
        loss.backward()
        gc.collect()
        assert ref() is None


def test_autograd_grad(plain, model):
    x = tiny_input()
    grads = {}
    for m in plain, model:
        names, parameters = zip(*m.named_parameters(), strict=True)
        loss = m(x).square().sum()
        grads[m] = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for name, p in plain.named_parameters():
        p.grad = grads[plain][name]
    assert_gradients_of_active_rows(model, plain, grads=grads[model])
    assert all(p.grad is None for p in model.parameters())


@each("layer", ["conv", "hidden", "up"])
def test_backward_of_some_inputs_computes_no_gradient_for_others(plain, model, layer):
    x = {}
    for m in plain, model:
        x[m] = (
            torch.ones(2, 6)
            if layer == "hidden"
            else torch.ones(2, *((3, 5, 5) if layer == "conv" else (8, 5, 5)))
        )
        x[m].requires_grad_()
        y = m.get_submodule(layer)(x[m]).square().sum()
        with Operators() as ops:
            y.backward(inputs=[x[m]])
        assert not ops.of_neq
    assert torch.equal(x[model].grad, x[plain].grad)
    assert all(p.grad is None for p in model.parameters())
    bias = model.get_submodule(layer).bias
    model.get_submodule(layer)(x[model]).sum().backward(inputs=[bias])
    assert bias.grad.any()
    assert model.get_submodule(layer).weight.grad is None


def test_anomaly_mode(plain, model):
    with torch.autograd.set_detect_anomaly(True):
        step(plain)
        step(model)
    assert_gradients_of_active_rows(model, plain)


@pytest.mark.filterwarnings("ignore:Error detected in")
@each(("plan", "node"), [("dense", "AddmmBackward0"), ("pack", "RowGradBackward")])
def test_anomaly_mode_names_the_layer_of_a_bad_gradient(model, plan, node, monkeypatch):
    monkeypatch.setattr(planner, "planned", lambda *sizes: plan)
    layer = model.hidden
    x = torch.full((2, 6), torch.inf)
    with torch.autograd.set_detect_anomaly(True):
        loss = (layer(x) * 0).sum()
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(RuntimeError, match=f"'{node}' returned nan"),
    ):
        loss.backward()


def test_in_place_operations_on_the_output():
    for case in first_of_each(MATRIX):
        plain, layer = case.twins()
        layer.set_active([0])
        x = case.input()
        grads = []
        for m in plain, layer:
            leaf = x.clone().requires_grad_()
            y = m(leaf, **case.forward)
            y = y.mul_(2)
            y[..., 0] = 1
            y = y.relu_()
            y.square().sum().backward()
            grads.append((y, leaf.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
        for name, active in active_elements(layer).items():
            mine, theirs = getattr(layer, name).grad, getattr(plain, name).grad
            torch.testing.assert_close(mine, theirs * active)


@each("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@each("none", [True, False], ids=["some layers with none active", "random"])
def test_checkpointing(plain, model, reentrant, none):
    if none:
        model.conv.set_active([])
        model.up.set_active([])
        model.hidden.set_active([])
    x = tiny_input().double().requires_grad_()
    for m in plain, model:
        m.double().eval()  # else the running statistics are updated twice
        checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
    assert_gradients_of_active_rows(model, plain)


def test_checkpointing_that_offloads(model, plain):
    with torch.autograd.graph.save_on_cpu():
        step(plain)
        step(model)
    assert_gradients_of_active_rows(model, plain)


# Autocast


@each("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(plain, model, dtype):
    outs = []
    for m in plain, model:
        with torch.autocast("cpu", dtype=dtype):
            y = m.head(m.hidden(m.token_norm(m.up(m.norm(m.conv(tiny_input_of(0)))).mean((2, 3)))))
        assert y.dtype == dtype
        outs.append(y)
        y.float().square().sum().backward()
    assert torch.equal(*outs)
    for layer in layers_of(model):
        for name, active in active_elements(layer).items():
            assert getattr(layer, name).grad.dtype == torch.float32
            assert not getattr(layer, name).grad[~active].any()
    truth = copy.deepcopy(plain).double()
    truth.zero_grad()
    y = truth.head(
        truth.hidden(
            truth.token_norm(
                truth.up(truth.norm(truth.conv(tiny_input_of(0).double()))).mean((2, 3))
            )
        )
    )
    y.square().sum().backward()
    for name, p in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        active = active_elements(layer)[name.rpartition(".")[2]]
        exact = truth.get_parameter(name).grad * active
        error = (p.grad - exact).norm()
        assert error <= 2 * (plain.get_parameter(name).grad * active - exact).norm(), name


def tiny_input_of(seed):
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


@each("case", first_of_each(MATRIX), ids=repr)
@each("rows", [[0], []], ids=str)
def test_autocast_saves_no_more_than_the_plain_layer(case, rows):
    plain, layer = case.twins()
    layer.set_active(rows)
    sizes = []
    for m in plain, layer:
        leaf = case.input().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), Saved() as saved:
            y = m(leaf, **case.forward)
        assert not saved.has(leaf), "the cast input is saved, not the input"
        sizes.append(saved.bytes)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert sizes[1] <= sizes[0]


# Function transforms and other derivatives


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model, x):
    return lambda p: functional_call(model, p, (x,)).square().sum()


@each("rows", [[1, 3], [], None], ids=str)
def test_func_grad(rows):
    plain = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model = neq.convert(copy.deepcopy(plain))
    for layer in model:
        layer.set_active(rows)
    x = torch.randn(3, 4)
    p = parameters_of(plain)
    expected = torch.func.grad(loss_of(plain, x))(p)
    for transform in torch.func.grad, torch.func.jacrev, torch.func.jacfwd:
        mine = transform(loss_of(model, x))(p)
        for name, grad in mine.items():
            mask = model[int(name[0])].active_mask
            mask = mask[:, None] if grad.dim() == 2 else mask
            torch.testing.assert_close(grad, expected[name] * mask)


def test_func_hessian():
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    model = neq.convert(copy.deepcopy(plain))
    model[0].set_active([1])
    x = torch.randn(3, 2)
    p = parameters_of(plain)
    mine = torch.func.hessian(loss_of(model, x))(p)
    theirs = torch.func.hessian(loss_of(plain, x))(p)
    torch.testing.assert_close(mine["0.bias"]["0.bias"][1, 1], theirs["0.bias"]["0.bias"][1, 1])
    assert mine["0.bias"]["0.bias"].nonzero().tolist() == [[1, 1]]


def test_func_vmap_of_per_sample_gradients():
    plain = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(12, 3))
    model = neq.convert(copy.deepcopy(plain))
    mask_randomly(model)
    x = torch.randn(5, 1, 2, 5)
    p = parameters_of(plain)
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda p, x, m=m: loss_of(m, x)(p)), (None, 0))(p, x)
        for m in (model, plain)
    ]
    for i in 0, 2:
        for name, active in active_elements(model[i]).items():
            mine, theirs = (grads[f"{i}.{name}"] for grads in per_sample)
            assert mine.shape[0] == 5
            torch.testing.assert_close(mine, theirs * active)


def test_func_vmap_over_an_ensemble():
    layers = [neq.convert(nn.Linear(3, 4)) for _ in range(3)]
    base = copy.deepcopy(layers[0])
    base.set_active([1])
    stacked, buffers = torch.func.stack_module_state(layers)

    def loss(p, x):
        return functional_call(base, (p, buffers), (x,)).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (0, None))(stacked, torch.ones(2, 3))
    assert grads["bias"].tolist() == [[0, 2, 0, 0]] * 3


def test_functional_call_with_ordinary_backward():
    """The weight is no leaf: as in meta-learning or from a hypernetwork."""
    layer = neq.convert(nn.Linear(3, 4))
    layer.set_active([1])
    scale = torch.tensor(2.0, requires_grad=True)
    weights = {name: p.detach() * scale for name, p in layer.named_parameters()}
    functional_call(layer, weights, (torch.ones(1, 3),)).sum().backward()
    torch.testing.assert_close(scale.grad, layer.weight[1].sum() + layer.bias[1])


def test_vjp_and_jvp():
    plain = nn.Linear(4, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    p = parameters_of(plain)
    x, tangent = torch.randn(2, 2, 4)
    _, vjp = torch.func.vjp(lambda p, x: functional_call(layer, p, (x,)), p, x)
    dp, dx = vjp(torch.ones(2, 3))
    assert dp["bias"].tolist() == [0, 2, 0]
    torch.testing.assert_close(dx, torch.ones(2, 3) @ plain.weight)
    ones = {name: torch.ones_like(t) for name, t in p.items()}
    _, dy = torch.func.jvp(lambda p: functional_call(layer, p, (x,)), (p,), (ones,))
    torch.testing.assert_close(dy[:, 1], x.sum(1) + 1)
    assert not dy[:, [0, 2]].any()
    _, dy = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(dy, tangent @ plain.weight.t())


@each("grad", [True, False])
def test_forward_mode(grad):
    layer = neq.convert(nn.Linear(4, 3))
    layer.set_active([1])
    x = torch.randn(2, 4)
    with torch.set_grad_enabled(grad), torch.autograd.forward_ad.dual_level():
        weight = torch.autograd.forward_ad.make_dual(layer.weight.detach(), torch.ones(3, 4))
        y = functional_call(layer, {"weight": weight}, (x,))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent[:, 1], x.sum(1))
    assert not tangent[:, [0, 2]].any()


@each(
    ("plan", "name", "shape"),
    [
        ("pack", "hidden", (2, 6)),
        ("pack", "conv", (2, 3, 5, 5)),
        ("dense", "conv", (2, 3, 5, 5)),
        ("dense", "norm", (2, 8, 5, 5)),
    ],
)
def test_double_backward_says_that_it_does_not_work(model, monkeypatch, plan, name, shape):
    monkeypatch.setattr(planner, "planned", lambda *sizes: plan)
    x = torch.randn(shape, requires_grad=True)
    y = model.get_submodule(name)(x)
    with pytest.raises(RuntimeError, match=r"second derivative.*use torch\.func\.grad, or set_act"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@each("case", first_of_each(LINEAR), ids=repr)
def test_double_backward_through_the_vendors_joint_backward(case, monkeypatch):
    """A penalty on all gradients; on the frozen rows' there is none."""
    monkeypatch.setattr(planner, "planned", lambda *sizes: "dense")
    plain, layer = (module.double() for module in case.twins())
    layer.set_active([0, 2])
    active = active_elements(layer)
    x = case.input().double().requires_grad_()
    found = []
    for m in plain, layer:
        p = dict(m.named_parameters())
        y = m(x, **case.forward)
        dx, *dp = torch.autograd.grad(y.pow(3).sum(), [x, *p.values()], create_graph=True)
        dp = [g * active[name] for name, g in zip(p, dp, strict=True)]
        penalty = sum(g.square().sum() for g in (dx, *dp))
        found.append(torch.autograd.grad(penalty, [x, *p.values()]))
    (dx, *dp), (my_dx, *my_dp) = found
    torch.testing.assert_close(my_dx, dx)
    for name, mine, theirs in zip(p, my_dp, dp, strict=True):
        torch.testing.assert_close(mine, theirs * active[name])


@each("rows", [[], None], ids=["none", "all"])
def test_double_backward_where_no_row_differs(plain, model, rows):
    """A gradient penalty."""
    x = torch.randn(2, 3, 5, 5)
    penalties = []
    for m in plain, model:
        if m is model:
            for layer in layers_of(m):
                layer.set_active(rows)
        m.norm.eval()
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        penalties.append((dx, leaf.grad))
    torch.testing.assert_close(penalties[0], penalties[1])


def test_the_hint_for_double_backward_is_right():
    plain = nn.Linear(4, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    x = torch.randn(2, 4)

    def penalty(m):
        def inner(p):
            dx = torch.func.grad(lambda x: functional_call(m, p, (x,)).pow(3).sum())(x)
            return dx.square().sum()

        return torch.func.grad(inner)(parameters_of(plain))

    mine, theirs = penalty(layer), penalty(plain)
    torch.testing.assert_close(mine["weight"][1], theirs["weight"][1])
    assert not mine["weight"][[0, 2]].any()


# Training


@each("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda c: c.__name__)
def test_an_optimizer_built_before_convert(optimizer):
    model = Tiny()
    optim = optimizer(model.parameters(), lr=0.1, weight_decay=0)
    neq.convert(model)
    mask_randomly(model)
    before = copy.deepcopy(model.state_dict())
    step(model)
    optim.step()
    for name, layer in model.named_modules():
        if isinstance(layer, neq.NeuronLayer):
            for key, active in active_elements(layer).items():
                old, new = before[f"{name}.{key}"], getattr(layer, key)
                assert torch.equal(new[~active], old[~active])
                assert not torch.equal(new, old) or not active.any()
    neq.revert(model)
    step(model)
    optim.step()


def test_clip_grad_norm(plain, model):
    model.hidden.set_active([])
    step(plain)
    step(model)
    for name, layer in model.named_modules():
        if isinstance(layer, neq.NeuronLayer):
            for key, active in active_elements(layer).items():
                plain.get_submodule(name).get_parameter(key).grad *= active
    mine = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(mine, nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
    assert_gradients_of_active_rows(model, plain)


def test_grad_scaler(model):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = ~model.hidden.active_mask
    before = model.hidden.weight[frozen].clone()
    scaler.scale(model(tiny_input()).square().sum()).backward()
    scaler.step(optim)
    scaler.update()
    assert torch.equal(model.hidden.weight[frozen], before)


def test_a_gan_step(model):
    """Through a partly frozen discriminator, with gradients for the generator only."""
    generator = nn.Linear(2, 75)
    fake = generator(torch.randn(4, 2)).view(4, 3, 5, 5)
    with Operators() as ops:
        model(fake).sum().backward(inputs=list(generator.parameters()))
    assert generator.weight.grad.any()
    assert not ops.of_neq
    assert all(p.grad is None for p in model.parameters())


def test_no_expert_token():
    """An expert to which no token is routed."""
    expert = neq.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)))
    mask_randomly(expert)
    expert(torch.randn(0, 4)).sum().backward()
    assert not expert[0].weight.grad.any()


def test_layers_called_several_times_in_one_graph():
    plain = nn.Linear(4, 4)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    x = torch.randn(2, 4)
    for m in plain, layer:
        h = x
        for _ in range(3):
            h = m(h).tanh()
        h.sum().backward()
    assert_gradients_of_active_rows(layer, plain)


def test_masks_changed_between_the_calls_of_one_graph():
    layer = neq.convert(nn.Linear(4, 4))
    x = torch.ones(1, 4)
    total = 0
    for rows in [0], [0, 1], [], None:
        layer.set_active(rows)
        total = total + layer(x).sum()
    total.backward()
    assert layer.bias.grad.tolist() == [3, 2, 1, 1]


def test_keyword_arguments():
    layer = neq.convert(nn.Linear(4, 4))
    layer.set_active([1])
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))


class Marked(torch.Tensor):
    """What torch makes of it is marked as well: by one node more."""


@each("case", first_of_each(MATRIX + NORM), ids=repr)
def test_inputs_of_a_class_of_ones_own(case):
    plain, layer = (module.double() for module in case.twins())
    layer.set_active([0, 2])
    x = case.input().double()
    for m in plain, layer:
        y = m(x.as_subclass(Marked), **case.forward)
        assert type(y) is Marked
        y.pow(2).sum().backward()
    assert_gradients_of_active_rows(layer, plain)


class Copies(TorchFunctionMode):
    """Puts a node of its own on top of each result."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y.clone() if isinstance(y, torch.Tensor) and y.grad_fn is not None else y


def test_a_mode_that_changes_what_functions_return(plain, model):
    x = tiny_input()
    step(plain, x)
    with Copies():
        step(model, x)
    assert_gradients_of_active_rows(model, plain)


def test_wrong_inputs_get_the_errors_of_torch(plain, model):
    for name, x in [
        ("hidden", torch.randn(2, 5)),
        ("hidden", torch.tensor(1.0)),
        ("conv", torch.randn(2, 2, 5, 5)),
        ("conv", torch.randn(5)),
    ]:
        messages = []
        for m in plain, model:
            with pytest.raises((RuntimeError, ValueError)) as error:
                m.get_submodule(name)(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_names_of_parameters_and_buffers(plain, model):
    for names in "named_parameters", "named_buffers", "named_modules":
        assert [n for n, _ in getattr(model, names)()] == [n for n, _ in getattr(plain, names)()]
    assert repr(model) == repr(plain)
    assert str(model.up) == str(plain.up)
    assert model.conv.extra_repr() == plain.conv.extra_repr()


def test_isinstance(plain, model):
    for mine, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(mine, type(theirs))


def test_apply_and_reset_parameters(model):
    before = masks_of(model)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert masks_of(model) == before


def test_model_on_several_threads(plain, model):
    from concurrent.futures import ThreadPoolExecutor

    def grads(_):
        return torch.autograd.grad(model.hidden(torch.ones(2, 6)).sum(), model.hidden.bias)[0]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(grads, range(16)))
    assert all(torch.equal(r, 2.0 * model.hidden.active_mask) for r in results)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_jit_and_fx(plain):
    """Tracing takes a masked model without gradients; the rest wants the plain one."""
    model = neq.convert(copy.deepcopy(plain)).eval()
    x = tiny_input()
    expected = plain.eval()(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    mask_randomly(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    neq.revert(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_export_of_a_masked_model(plain, model):
    x = tiny_input()
    with torch.no_grad():
        program = torch.export.export(model.eval(), (x,))
    assert not any("neq" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), plain.eval()(x))


@each("case", first_of_each(MATRIX), ids=repr)
def test_time_travel(case):
    """Convert, train, revert, train, convert: always the plain layer's numbers."""
    plain, layer = case.twins()
    x = case.input()
    dy = torch.ones_like(plain(x, **case.forward))
    for _ in range(2):
        layer.set_active([0])
        run(layer, x, dy, **case.forward)
        neq.revert(layer)
        layer.zero_grad()
        plain.zero_grad()
        y, dx = run(plain, x, dy, **case.forward)
        mine, my_dx = run(layer, x, dy, **case.forward)
        assert torch.equal(mine, y)
        assert torch.equal(my_dx, dx)
        assert torch.equal(layer.weight.grad, plain.weight.grad)
        neq.convert(layer)


@each("kind", [neq.NEqLinear, neq.NEqConv1d], ids=["Linear", "Conv1d"])
def test_an_input_is_freed_where_no_row_is_active(kind):
    layer = kind(4, 8, *([1] if kind is neq.NEqConv1d else []))
    leaf = torch.randn(3, 4, *([5] if kind is neq.NEqConv1d else []), requires_grad=True)

    def forward_and_forget():
        x = leaf * 1  # multiplication by a number saves nothing
        return layer(x), weakref.ref(x)

    layer.set_active([])
    y, x = forward_and_forget()
    gc.collect()
    assert x() is None
    y.sum().backward()
    torch.testing.assert_close(
        leaf.grad, torch.autograd.grad(layer.plain.forward(layer, leaf).sum(), leaf)[0]
    )


@each("rows", [[], [1], None], ids=["none", "some", "all"])
@each("kind", [neq.NEqLinear, neq.NEqConv1d], ids=["Linear", "Conv1d"])
def test_a_weight_changed_before_backward_is_an_error(kind, rows):
    layer = kind(4, 8, *([1] if kind is neq.NEqConv1d else []))
    layer.set_active(rows)
    x = torch.randn(3, 4, *([5] if kind is neq.NEqConv1d else []), requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each("dtype", [torch.int64, torch.complex64, torch.float64], ids=str)
def test_autocast_casts_no_more_than_torch_does(dtype):
    layer = neq.NEqLinear(4, 8)
    layer.set_active([1])
    x = torch.ones(3, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_a_masked_layer_on_the_meta_device():
    layer = neq.NEqLinear(4, 8, device="meta")
    layer.set_active([1])
    assert layer(torch.empty(3, 4, device="meta")).shape == (3, 8)


def test_where_saved_tensors_hooks_are_forbidden():
    layer = neq.NEqConv1d(4, 8, 1)
    layer.set_active([])
    x = torch.randn(3, 4, 5, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        layer(x).sum().backward()
    assert x.grad is not None


def test_compiled_autograd():
    layer = neq.NEqLinear(4, 8)
    layer.set_active([1, 3])
    x = torch.randn(3, 4, requires_grad=True)
    layer(x * 2).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    compiler = functools.partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        layer(x * 2).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_replicas_of_data_parallel_place_their_rows_by_themselves():
    layer = neq.NEqLinear(4, 8)
    layer.set_active([1, 3])
    replica = layer._replicate_for_data_parallel()
    assert replica.rows is not layer.rows
    assert replica.rows.active.tolist() == [1, 3]
