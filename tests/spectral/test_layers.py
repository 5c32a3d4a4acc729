"""Spectral layers: what they compute, and the gradients of their eigenvalues."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neq
from neq.spectral import SpectralConv1d, SpectralConv2d, SpectralConv3d, layers, ways

KINDS = "two", "one", "svd", "qr"
each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["products", "tiles"])
def way(request, monkeypatch):
    crossing = 0 if request.param == "tiles" else math.inf
    monkeypatch.setitem(ways.CROSSING, "cpu", (crossing, crossing))
    return request.param


SHAPES = {
    "wide": (lambda **kw: neq.SpectralLinear(5, 7, **kw), (6, 5)),
    "tall": (lambda **kw: neq.SpectralLinear(7, 5, bias=False, **kw), (2, 3, 7)),
    "one neuron": (lambda **kw: neq.SpectralLinear(4, 1, **kw), (6, 4)),
    "conv1d": (lambda **kw: SpectralConv1d(3, 4, 3, padding=1, dilation=2, **kw), (2, 3, 9)),
    "conv2d": (lambda **kw: SpectralConv2d(3, 5, (3, 2), stride=2, padding=1, **kw), (2, 3, 7, 6)),
    "conv3d": (lambda **kw: SpectralConv3d(2, 3, 2, bias=False, **kw), (2, 2, 4, 3, 3)),
    "circular": (
        lambda **kw: SpectralConv2d(2, 3, 3, padding=1, padding_mode="circular", **kw),
        (2, 2, 5, 5),
    ),
    "same": (lambda **kw: SpectralConv2d(2, 3, 3, padding="same", **kw), (2, 2, 5, 5)),
    "one sample": (lambda **kw: SpectralConv2d(2, 3, 3, **kw), (2, 5, 5)),
}


def moved(layer):
    """The layer with parameters that are nothing special."""
    with torch.no_grad():
        for p in layer.parameters():
            p += torch.randn_like(p)
    return layer.double()


def same_by_formed_weight(layer, x):
    """The outputs and gradients that autograd gives through the weight of the plain layer."""
    x = x.clone().requires_grad_()
    plain = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch.nn"))
    other = copy.deepcopy(layer)
    weight = other.formed_weight()
    assert weight.shape == layer.formed_shape
    vendor = plain.__new__(plain)
    vars(vendor).update(vars(layer), weight=weight, bias=other.bias)
    y = plain.forward(vendor, x)
    return other, x, y


@each("shape", SHAPES)
@each("kind", KINDS)
@each("options", [{}, {"sparsity": 0.4}, {"sparsity": 0.4, "sparse_by": "eigenvalue"}], ids=str)
def test_outputs_and_gradients_are_those_of_the_formed_weight(way, shape, kind, options):
    make, size = SHAPES[shape]
    layer, x = moved(make(kind=kind, **options)), torch.randn(size).double().requires_grad_()
    other, other_x, expected = same_by_formed_weight(layer, x.detach())
    y = layer(x)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, other_x.grad)
    for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@each("kind", ["two", "one"])
def test_groups(kind):
    layer = moved(SpectralConv2d(4, 6, 3, groups=2, kind=kind))
    x = torch.randn(3, 4, 5, 5).double()
    other, _, expected = same_by_formed_weight(layer, x)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for bad in ("svd", "qr"):
        with pytest.raises(ValueError, match="this convolution has 2 groups"):
            SpectralConv2d(4, 6, 3, groups=2, kind=bad)


def by_hand():
    layer = neq.SpectralLinear(2, 2, bias=False)
    with torch.no_grad():
        layer.phi.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.lambda_in.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lambda_out.copy_(torch.tensor([3.0, 5.0]))
    return layer


def test_by_hand(way):
    """W = [(1-3)1, (2-3)2], [(1-5)3, (2-5)4] = [-2, -2], [-12, -12]."""
    layer = by_hand()
    assert layer.formed_weight().tolist() == [[-2.0, -2.0], [-12.0, -12.0]]
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    y = layer(x)
    assert y.tolist() == [[-6.0, -36.0], [-2.0, -12.0]]
    y.backward(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    # dW = dYᵀ X = [1, 4], [0, 1]; dλin_j = Σ_i φ_ij dW_ij; dλout_i = -Σ_j φ_ij dW_ij
    assert layer.lambda_in.grad.tolist() == [[1.0, 12.0]]
    assert layer.lambda_out.grad.tolist() == [-9.0, -4.0]
    assert x.grad.tolist() == [[-2.0, -2.0], [-16.0, -16.0]]


def test_sparse_by_hand():
    """Of |w| = 2, 2, 12, 12 half goes; |λin_j - λout_i| = 2, 1, 4, 3."""
    layer = by_hand()
    layer.sparsity = 0.5
    assert layer.formed_weight().tolist() == [[0.0, 0.0], [-12.0, -12.0]]
    layer.sparsity, layer.sparse_by = 0.25, "eigenvalue"
    assert layer.formed_weight().tolist() == [[-2.0, 0.0], [-12.0, -12.0]]
    with torch.no_grad():
        layer.lambda_out[0] = 9.0  # what is zero follows the eigenvalues
    assert layer.formed_weight().tolist() == [[-8.0, -14.0], [-12.0, 0.0]]


def test_the_triangle_is_one():
    """The published code trains the whole square matrix."""
    layer = neq.SpectralLinear(6, 4, bias=False, kind="qr")
    assert layer.triangle.numel() == 4 * 5 // 2
    r = layer._left(layer.shared)
    assert r.tril(-1).count_nonzero() == 0
    q = layer.right
    torch.testing.assert_close(q @ q.t(), torch.eye(4))
    tall = neq.SpectralLinear(3, 5, bias=False, kind="qr")
    assert tall.triangle.numel() == 3 * 4 // 2 + 2 * 3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert layer._left(layer.shared).tril(-1).count_nonzero() == 0


class Largest(TorchDispatchMode):
    """The most elements of any tensor for which there is new memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage().data_ptr(): t for t in tree_leaves(some) if torch.is_tensor(t)}
            for some in ((args, kwargs), out)
        )
        made = [t for at, t in made.items() if at not in given]  # no views
        self.elements = max([self.elements, *(t.numel() for t in made)])
        return out


@each("kind", ["two", "one", "svd"])
@each("layer", ["linear", "conv"])
def test_backward_makes_nothing_as_large_as_the_weight(way, kind, layer):
    """But for W itself, where the input needs a gradient."""
    if layer == "linear":
        layer, x = neq.SpectralLinear(128, 128, kind=kind), torch.randn(50, 128)
    else:
        layer, x = SpectralConv2d(64, 64, 3, kind=kind), torch.randn(1, 64, 8, 8)
    size = layer.formed_shape.numel()
    y = layer(x.requires_grad_(way == "products"))
    with Largest() as seen:
        y.sum().backward()
    assert 0 < seen.elements < size
    dense = neq.spectral.revert(nn.Sequential(layer))
    y = dense(x)
    with Largest() as seen:
        y.sum().backward()
    assert seen.elements >= size


def test_more_samples_than_the_crossing_go_by_tiles(monkeypatch):
    layer, called = neq.SpectralLinear(4, 3), []
    monkeypatch.setattr(layers, "_by_tiles", lambda x, *args: called.append(len(x)) or x[:, :3])
    crossing, of_convolutions = ways.CROSSING["cpu"]
    for samples in (8, crossing, crossing + 1):
        layer(torch.randn(samples, 4))
    assert called == [crossing + 1]
    conv = SpectralConv2d(3, 3, 1)
    for samples in (crossing + 1, of_convolutions // 16, of_convolutions // 16 + 1):
        conv(torch.randn(samples, 3, 4, 4))
    assert called == [crossing + 1, of_convolutions // 16 + 1]


def test_second_derivatives(way):
    layer = moved(neq.SpectralLinear(3, 2))

    def f(x, lambda_in, lambda_out):
        shared = {"lambda_in": lambda_in}
        return layer._map(x, lambda_out, layer.bias, shared).sin()

    inputs = torch.randn(4, 3).double(), layer.lambda_in.detach(), layer.weight.detach()
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_function_transforms(way):
    layer, x = moved(neq.SpectralLinear(3, 2)), torch.randn(5, 3).double()
    rows = torch.vmap(lambda row: torch.func.jacrev(layer)(row))(x)
    torch.testing.assert_close(rows, layer.formed_weight().expand(5, 2, 3))
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, layer.formed_weight().sum(1).expand(5, 2))


@each("kind", KINDS)
def test_autocast(way, kind):
    layer, x = neq.SpectralLinear(32, 16, kind=kind), torch.randn(64, 32, requires_grad=True)
    exact = layer(x)
    exact.square().mean().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    y.square().mean().backward()
    for p, grad in zip(layer.parameters(), grads, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, grad, rtol=0.1, atol=0.05 * float(grad.abs().max()))


@each("kind", KINDS)
def test_saved_copied_and_pickled(kind):
    layer, x = neq.SpectralLinear(5, 4, kind=kind), torch.randn(3, 5)
    other = neq.SpectralLinear(5, 4, kind=kind)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    trained = {name for name, _ in layer.named_parameters()}
    fixed = {name for name, _ in layer.named_buffers()}
    expected = {"weight", "bias"} | ({"lambda_in"} if kind != "one" else set())
    expected |= {"svd": {"singular"}, "qr": {"triangle"}}.get(kind, set())
    assert trained == expected
    assert fixed == {"svd": {"left", "right"}, "qr": {"right"}}.get(kind, {"phi"})


def test_bad_input():
    with pytest.raises(ValueError, match="'two', 'one', 'svd', 'qr'; got 'three'"):
        neq.SpectralLinear(2, 2, kind="three")
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1"):
        neq.SpectralLinear(2, 2, sparsity=1)
    with pytest.raises(ValueError, match="'weight' or 'eigenvalue', got 'row'"):
        neq.SpectralLinear(2, 2, sparse_by="row")
    with pytest.raises(ValueError, match=r"dimension -1 .* its 3 inputs, got shape \[4, 1\]"):
        neq.SpectralLinear(3, 2)(torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"dimension -3 .* its 3 inputs, got shape \[1, 4, 4"):
        SpectralConv2d(3, 2, 2)(torch.randn(1, 4, 4))


def test_granules_are_active_as_a_whole():
    layer = neq.SpectralLinear(6, 8)
    layer.set_active([0, 1, 4], granule=4)
    assert layer.active_rows.tolist() == [0, 1, 2, 3]
