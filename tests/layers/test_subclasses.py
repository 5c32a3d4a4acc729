"""Layers that users derive."""

import inspect

import pytest
import torch
from torch import nn

import neq

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(nn.Linear):
    def __init__(self, inputs, neurons, scale):
        super().__init__(inputs, neurons)
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


class NEqScaled(neq.NeuronLayer, Scaled):
    plain = Scaled


class Named(neq.NeuronLayer, Scaled):
    plain = Scaled

    def __init__(self, neurons):
        super().__init__(4, neurons, scale=3.0)
        self.set_active([0])
        self.extra = 1


class Square(neq.NEqLinear):
    plain = nn.Linear

    def __init__(self, size, bias=True):
        super().__init__(size, size, bias)


@pytest.mark.parametrize("make", [lambda: Named(3), lambda: NEqScaled(4, 3, 2.0)])
def test_of_a_module_of_their_own(make):
    layer = make()
    layer.set_active([1])
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad.any(1).tolist() == [False, True, False]


def test_an_init_of_their_own_runs():
    layer = Named(3)
    assert (layer.extra, layer.scale, layer.active_rows.tolist()) == (1, 3.0, [0])
    assert Square(4, bias=False).bias is None


@pytest.mark.parametrize(
    ("layer", "signature"),
    [
        (NEqScaled, "(inputs, neurons, scale)"),
        (Named, "(neurons)"),
        (Square, "(size, bias=True)"),
    ],
)
def test_signatures(layer, signature):
    assert str(inspect.signature(layer)) == signature


def test_a_layer_without_a_weight_is_refused():
    with pytest.raises(ValueError, match="NEqLayerNorm: without a weight it has no neurons"):
        neq.NEqLayerNorm(4, elementwise_affine=False)
