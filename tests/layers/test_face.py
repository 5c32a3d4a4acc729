"""What ``help`` and an editor show of the drop-in layers."""

import doctest
import inspect
import pydoc

import pytest
import torch

import neq
from neq.layers import LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


def test_all_of_them_are_looked_at():
    assert len(LAYERS) == 17


@each_layer
def test_the_signature_is_torchs(layer):
    assert inspect.signature(layer) == inspect.signature(layer.plain)
    assert "__init__" not in vars(neq.NeuronLayer)  # so that static tools find torch's too


@each_layer
def test_the_docstring_is_its_own(layer):
    assert layer.__doc__ is not None
    assert layer.__doc__.startswith(f"``nn.{layer.plain.__name__}`` that trains only its active")
    shown = pydoc.plain(pydoc.render_doc(layer))
    assert "All neurons are active until ``set_active``." in shown
    arguments = [*inspect.signature(layer.plain).parameters]
    assert all(argument in shown for argument in arguments)


@each_layer
def test_the_example_runs(layer):
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    given = {"neq": neq, "torch": torch}
    example = parser.get_doctest(layer.__doc__, given, layer.__name__, None, None)
    assert any(f"neq.{layer.__name__}(" in line.source for line in example.examples)
    printed = []
    runner.run(example, out=printed.append)
    assert runner.failures == 0, "".join(printed)
    assert runner.tries >= 4
