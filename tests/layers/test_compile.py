"""torch.compile: one graph for all masks, with eager's gradients."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import neq
from neq.layers import active
from neq.layers.active import ActiveSet
from tests.support.layers import (
    ALL,
    Tiny,
    assert_gradients_of_active_rows,
    first_of_each,
    gradients,
    layers_of,
    mask_randomly,
    random_mask,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


@pytest.fixture
def fresh_dynamo(monkeypatch):
    monkeypatch.setattr(ActiveSet, "ever_masked", False)  # as in a new process
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager", **options):
    count = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=count, fullgraph=True, **options), count


def train(call, model, x):
    model.zero_grad()
    y = call(x)
    y.square().sum().backward()
    return y, gradients(model)


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        # where no row is active eager has no gradient, a graph for any mask has zeros
        grad = torch.zeros_like(mine[name]) if grad is None else grad
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-4, msg=name)
        assert torch.equal(mine[name] == 0, grad == 0) or grad.any(), name


def assert_frozen(model):
    for layer in layers_of(model):
        rows = (~layer.active_mask).nonzero().flatten()
        assert not layer.bias.grad[rows].any()


def mask_anyhow(layer):
    n = layer.n_neurons
    kinds = [random_mask(n), random_mask(n), [], None, [int(torch.randint(n, ()))]]
    layer.set_active(kinds[int(torch.randint(len(kinds), ()))])


@each("backend", ["inductor", "aot_eager"])
def test_twenty_masks_cost_at_most_two_recompiles(backend):
    model = neq.convert(Tiny())
    call, count = compiled(model, backend)
    layers = layers_of(model)
    for step in range(21):
        for layer in layers[:step]:  # the first masks come one layer at a time
            mask_anyhow(layer)
        if step == 20:
            for layer in layers:
                layer.set_active(None)
        x = tiny_input()
        y, mine = train(call, model, x)
        assert_frozen(model)
        expected, theirs = train(model, model, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert_same(mine, theirs)
    assert count.frame_count <= 3
    assert counters["stats"]["unique_graphs"] == count.frame_count
    assert not counters["graph_break"]


def test_layers_that_no_convert_joined_and_that_are_masked_one_by_one():
    model = nn.Sequential(neq.NEqLinear(8, 16), neq.NEqLayerNorm(16), neq.NEqLinear(16, 4))
    call, count = compiled(model)
    for layer in (None, *model, *model):
        if layer is not None:
            mask_anyhow(layer)
        train(call, model, torch.randn(3, 8))
    assert count.frame_count <= 2


def test_masks_before_the_first_call_cost_no_recompile():
    model = neq.convert(Tiny())
    mask_randomly(model)
    call, count = compiled(model)
    for _ in range(4):
        train(call, model, tiny_input())
        assert_frozen(model)
        for layer in layers_of(model):
            mask_anyhow(layer)
    assert count.frame_count == 1


def test_layers_compiled_one_by_one():
    model = neq.convert(Tiny())
    plain = copy.deepcopy(neq.revert(copy.deepcopy(model)))
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    mask_randomly(model)
    x = tiny_input()
    train(model, model, x)
    train(plain, plain, x)
    assert_gradients_of_active_rows(model, plain)


def graphs_of(model, *steps):
    """The text of all graphs that dynamo makes of a model, stepping through ``steps``."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    call = torch.compile(model, backend=backend, fullgraph=True)
    for step in steps:
        step()
        train(call, model, tiny_input())
    return graphs


def test_a_model_never_masked_is_compiled_as_the_plain_model():
    plain = Tiny()
    model = neq.convert(copy.deepcopy(plain))
    before, after = graphs_of(model, lambda: None, lambda: model.hidden.set_active([1]))
    assert "autograd_function_apply" not in before
    assert "detach" not in before
    assert "autograd_function_apply" in after

    torch._dynamo.reset()
    ActiveSet.ever_masked = False
    model = neq.convert(copy.deepcopy(plain))
    x = tiny_input()
    y, mine = train(compiled(model)[0], model, x)
    expected, theirs = train(compiled(plain)[0], plain, x)
    assert torch.equal(y, expected)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@each("case", first_of_each(ALL), ids=repr)
def test_each_layer(case):
    plain, layer = case.twins()
    layer.set_active([0])
    call, count = compiled(layer)
    x = case.input()
    for rows in [0], random_mask(layer.n_neurons), [], None:
        layer.set_active(rows)
        layer.zero_grad()
        plain.zero_grad()
        plain.load_state_dict(layer.state_dict())
        stands = layer.has_statistics and rows == []  # then the output is that of eval mode
        expected = plain.train(not stands)(x, **case.forward)
        expected.square().sum().backward()
        y = call(x, **case.forward)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected)
        assert_gradients_of_active_rows(layer, plain)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(layer.get_buffer(name), buffer)
    assert count.frame_count == 1


@each("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_batch_sizes(dynamic):
    model = neq.convert(Tiny())
    mask_randomly(model)
    call, count = compiled(model, dynamic=dynamic)
    for batch in 4, 6, 3, 9:
        x = tiny_input(batch)
        _, mine = train(call, model, x)
        _, theirs = train(model, model, x)
        assert_same(mine, theirs)
        mask_randomly(model)
    assert count.frame_count <= 2


def test_autocast_inside():
    model = neq.convert(Tiny())
    mask_randomly(model)

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    call, count = compiled(forward)
    x = tiny_input()
    y, mine = train(call, model, x)
    mine = {name: g.clone() for name, g in mine.items()}
    assert_frozen(model)
    expected, theirs = train(forward, model, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    for name, grad in theirs.items():
        assert mine[name].dtype == torch.float32
        torch.testing.assert_close(mine[name], grad, rtol=0.05, atol=0.05 * float(grad.abs().max()))
    assert count.frame_count == 1


def test_checkpoint_inside():
    model = neq.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)))
    plain = neq.revert(copy.deepcopy(model))
    mask_randomly(model)
    call, _ = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    x = torch.randn(5, 4)
    train(call, model, x)
    train(plain, plain, x)
    assert_gradients_of_active_rows(model, plain)


def test_checkpoint_around():
    model = neq.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)))
    plain = neq.revert(copy.deepcopy(model))
    mask_randomly(model)
    call, _ = compiled(model)
    x = torch.randn(5, 4)
    train(lambda x: checkpoint(call, x, use_reentrant=False), model, x)
    train(plain, plain, x)
    assert_gradients_of_active_rows(model, plain)


def test_evaluation():
    model = neq.convert(Tiny()).eval()
    mask_randomly(model)
    call, _ = compiled(model)
    x = tiny_input()
    for mode in torch.no_grad(), torch.inference_mode():
        with mode:
            torch.testing.assert_close(call(x), model(x))


def test_module_compile_and_convert_after_it():
    model = Tiny()
    model.compile(backend="aot_eager", fullgraph=True)
    plain = copy.deepcopy(model)
    x = tiny_input()
    train(model, model, x)
    neq.convert(model)
    mask_randomly(model)
    train(model, model, x)
    train(plain, plain, x)
    assert_gradients_of_active_rows(model, plain)
    neq.revert(model)
    _, mine = train(model, model, x)
    assert_same(mine, gradients(plain))


def test_a_mask_set_between_forward_and_backward_of_a_graph():
    layer = neq.convert(nn.Linear(4, 6))
    layer.set_active([1])
    call, _ = compiled(layer)
    loss = call(torch.ones(1, 4)).sum()
    layer.set_active([2])
    loss.backward()
    assert layer.bias.grad.tolist() == [0, 1, 0, 0, 0, 0]


def test_a_copy_of_a_compiled_model_is_independent():
    model = neq.convert(nn.Sequential(nn.Linear(4, 6)))
    model[0].set_active([1])
    call, _ = compiled(model)
    train(call, model, torch.ones(1, 4))
    other = copy.deepcopy(model)
    other[0].set_active([3])
    _, grads = train(compiled(other)[0], other, torch.ones(1, 4))
    assert grads["0.bias"].nonzero().tolist() == [[3]]
    _, grads = train(call, model, torch.ones(1, 4))
    assert grads["0.bias"].nonzero().tolist() == [[1]]


@pytest.mark.gpu
def test_graphs_that_the_compiler_captures_follow_the_mask():
    """mode="reduce-overhead" captures CUDA graphs, which replay what they were captured with."""
    model = neq.convert(Tiny()).cuda()
    twin = copy.deepcopy(model)
    call = torch.compile(model, mode="reduce-overhead")
    mask_randomly(model)
    for _ in range(3):
        for layer, other in zip(layers_of(model), layers_of(twin), strict=True):
            other.set_active(layer.active_mask)
        for _ in range(4):  # the first are warm-up, then one is captured, then replays
            x = tiny_input().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            _, mine = train(call, model, x)
            _, theirs = train(twin, twin, x)
            assert_same(mine, theirs)
        mask_randomly(model)


def test_one_graph_serves_all_granules(monkeypatch):
    monkeypatch.setattr(active, "_is_gpu", lambda device: True)
    model = neq.convert(nn.Sequential(nn.Linear(6, 32)))
    call, count = compiled(model)
    for rows in (range(16), range(8), [1], range(4, 8)):
        model[0].set_active(rows)
        call(torch.randn(5, 6)).sum().backward()
    assert count.frame_count == 1
