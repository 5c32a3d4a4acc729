"""An Embedding: gradients of the active entries only, with each option that it has."""

import copy

import pytest
import torch
from torch import nn

import neq
from tests.support.layers import EMBEDDING, Operators, Saved, active_elements
from tests.support.optimizers import ARGUMENTS, EVERY, bits
from tests.support.tensors import integers

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")
LOOKED_UP = torch.tensor([[0, 1, 1], [4, 2, 1]])


def embedding(rows, entries=6, **options):
    layer = neq.convert(nn.Embedding(entries, 3, **options))
    layer.set_active(rows)
    return layer


def dense(grad):
    return grad.to_dense() if grad.is_sparse else grad


@each("indices", [torch.int64, torch.int32], ids=str)
@each("case", EMBEDDING, ids=repr)
def test_active_rows_have_the_plain_gradients_bits(case, indices):
    for rows in [2], [0, 1, 2, 4, 5, 6], [1, 3, 5], []:
        plain, layer = case.twins()
        layer.set_active(rows)
        x = case.input().to(indices)
        y, mine = plain(x), layer(x)
        assert torch.equal(mine, y)
        assert mine.requires_grad == bool(rows)
        if not rows:
            continue
        dy = torch.randn(y.shape)
        y.backward(dy)
        mine.backward(dy)
        grad, expected = layer.weight.grad, plain.weight.grad
        assert torch.equal(dense(grad), dense(expected) * active_elements(layer)["weight"])
        assert grad.layout == expected.layout
        if not grad.is_sparse:
            assert grad.stride() == expected.stride()


@each("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    plain = nn.Embedding(6, 3, dtype=dtype)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 4])
    dy = torch.randn(2, 3, 3).to(dtype)
    for m in plain, layer:
        m(LOOKED_UP).backward(dy)
    assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])


def test_a_sparse_gradient_has_active_rows_only():
    layer = embedding([1, 3, 4], sparse=True, padding_idx=4)
    layer(LOOKED_UP).sum().backward()
    grad = layer.weight.grad
    assert grad.shape == (6, 3)
    assert set(grad._indices()[0].tolist()) == {1}  # 3 was not looked up, 4 is padding


@each("bad", [torch.nan, torch.inf])
@each("options", [{}, {"padding_idx": 4}, {"sparse": True}], ids=str)
def test_frozen_rows_are_zero_whatever_comes_in(bad, options):
    layer = embedding([0, 2], **options)
    y = layer(LOOKED_UP)
    y.backward(torch.full_like(y, bad))
    assert not dense(layer.weight.grad)[[1, 3, 4, 5]].any()


def test_a_padding_index_that_was_set_later():
    plain = nn.Embedding(6, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 4, 5])
    for m in plain, layer:
        m.padding_idx = -2
        m(torch.arange(6)).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])
    assert not layer.weight.grad[4].any()


def test_what_is_saved_is_the_indices():
    layer = embedding([1], entries=1000)
    with Saved() as saved:
        layer(LOOKED_UP)
    assert [t.dtype for t in saved.tensors] == [torch.int64]
    layer.set_active([])
    with Saved() as saved:
        layer(LOOKED_UP)
    assert not saved.tensors


def test_backward_passes_over_the_weight_once():
    """Frozen rows are left out of the sum; no second pass zeroes them."""
    layer = embedding([1])
    y = layer(LOOKED_UP)
    dy = torch.ones_like(y)
    with Operators() as ops:
        y.backward(dy)
    views = {"detach", "view", "_unsafe_view", "reshape", "flatten", "slice"}
    done = [name.split("::")[1].split(".")[0] for name in ops.names]
    assert [name for name in done if name not in views] == ["embedding_dense_backward"]


def test_wrong_inputs_get_the_errors_of_torch():
    plain = nn.Embedding(6, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1])
    for x in torch.tensor([6]), torch.tensor([-1]), torch.ones(2), torch.ones(2, dtype=torch.uint8):
        messages = []
        for m in plain, layer:
            with pytest.raises((RuntimeError, IndexError)) as error:
                m(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_indices_changed_before_backward():
    """torch refuses to go on; here the gradient is that of the forward."""
    layer = embedding([1, 2])
    x = LOOKED_UP.clone()
    y = layer(x)
    x.zero_()
    y.sum().backward()
    assert layer.weight.grad.tolist() == [[0] * 3, [3] * 3, [1] * 3, *[[0] * 3] * 3]


def test_jagged_indices():
    plain = nn.Embedding(6, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2])
    parts = [torch.tensor([1, 1, 0]), torch.tensor([2])]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for m in plain, layer:
        m(x).values().square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])


@each("reuse", [1, 2])
def test_an_activation_that_works_in_place(reuse):
    plain = nn.Embedding(6, 3)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2])
    for m in plain, layer:
        sum(m(LOOKED_UP).mul_(2).relu_().square().sum() for _ in range(reuse)).backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad * layer.active_mask[:, None])


@each("options", [{}, {"sparse": True}, {"padding_idx": 1}], ids=str)
def test_function_transforms(options):
    plain = nn.Embedding(6, 3, **options)
    layer = neq.convert(copy.deepcopy(plain))
    layer.set_active([1, 2])

    def loss(m):
        def inner(weight):
            return torch.func.functional_call(m, {"weight": weight}, LOOKED_UP).square().sum()

        return inner

    mine, expected = (torch.func.grad(loss(m))(plain.weight.detach()) for m in (layer, plain))
    assert torch.equal(dense(mine), dense(expected) * layer.active_mask[:, None])


def test_forward_mode():
    layer = embedding([1, 2])
    with torch.autograd.forward_ad.dual_level():
        weight = torch.autograd.forward_ad.make_dual(layer.weight.detach(), torch.ones(6, 3))
        y = torch.func.functional_call(layer, {"weight": weight}, LOOKED_UP)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert tangent[..., 0].tolist() == [[0, 1, 1], [0, 1, 1]]


def test_second_derivatives():
    """The gradient depends on dY alone, so these are right too."""
    layer = embedding([1, 2]).double()
    free = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach()[[1, 2]].requires_grad_()

    def forward(rows, free):
        full = layer.weight.detach().index_copy(0, torch.tensor([1, 2]), rows)
        return (torch.func.functional_call(layer, {"weight": full}, LOOKED_UP) @ free).tanh()

    assert torch.autograd.gradcheck(forward, (weight, free))
    assert torch.autograd.gradgradcheck(forward, (weight, free))


@each("options", [{}, {"sparse": True}, {"padding_idx": 1}, {"scale_grad_by_freq": True}], ids=str)
def test_one_compiled_graph_for_all_masks(options):
    torch._dynamo.reset()
    plain = nn.Embedding(6, 3, **options)
    layer = embedding([1], **options)
    layer.load_state_dict(plain.state_dict())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    call = torch.compile(layer, backend=backend, fullgraph=True)
    plain(LOOKED_UP).square().sum().backward()
    for rows in [1], [0, 2], [], None:
        layer.set_active(rows)
        layer.zero_grad()
        call(LOOKED_UP).square().sum().backward()
        expected = dense(plain.weight.grad) * layer.active_mask[:, None]
        torch.testing.assert_close(dense(layer.weight.grad), expected)
    assert len(graphs) == 1


def test_from_pretrained():
    weight = integers((6, 3))
    layer = neq.NEqEmbedding.from_pretrained(weight, freeze=False, padding_idx=1)
    layer.set_active([0, 1, 2])
    layer(LOOKED_UP).sum().backward()
    assert layer.weight.grad.any(1).nonzero().flatten().tolist() == [0, 2]


def test_rows_that_the_forward_would_rescale_are_refused():
    with pytest.raises(ValueError, match=r"NEqEmbedding: max_norm must be None, got 2.0: it resc"):
        neq.NEqEmbedding(4, 3, max_norm=2.0)


TAKES_SPARSE = ["SGD", "SparseAdam", "Adagrad"]
STEPPED = [(name, False) for name in EVERY if name != "SparseAdam"]
STEPPED += [(name, True) for name in TAKES_SPARSE]


@each(("name", "sparse"), STEPPED)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_frozen_rows_keep_their_bits(name, sparse):
    """Under each optimizer of torch that takes the gradient."""
    layer = embedding(None, sparse=sparse)
    arguments = ARGUMENTS.get(EVERY[name], {})
    options = {"momentum": 0.9} if "momentum" in arguments else {}
    if "weight_decay" in arguments and not sparse:
        options["weight_decay"] = 0.1
    optimizer = EVERY[name](layer.parameters(), **options)
    neq.optim.Guard(optimizer, layer)

    def closure():
        optimizer.zero_grad()
        loss = (layer(LOOKED_UP) - 1).square().sum()
        loss.backward()
        return loss

    for rows in None, [1, 2, 3], [0, 1]:
        layer.set_active(rows)
        layer.reset_parameters()  # LBFGS has reached its goal
        before = bits(layer.weight)
        for _ in range(3):
            optimizer.step(closure)
        changed = (bits(layer.weight) != before).any(1)
        assert changed[1]
        assert not changed[~layer.active_mask].any()
