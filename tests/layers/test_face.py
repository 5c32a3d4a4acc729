"""What a drop-in layer shows of itself: the signature of its torch class, and help of its own."""

import ast
import inspect
import pydoc

import pytest

import neq
from neq.layers import LAYERS
from tests.support.docstrings import failures, sections

each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


@each_layer
def test_takes_the_arguments_of_its_torch_class(layer):
    assert inspect.signature(layer) == inspect.signature(layer.plain)


@each_layer
def test_has_a_docstring_of_its_own(layer):
    text = vars(layer)["__doc__"]
    assert f"``nn.{layer.plain.__name__}``" in sections(text)["summary"].splitlines()[0]


@each_layer
def test_its_example_prints_what_it_says(layer):
    example = sections(layer.__doc__)["Examples"]
    assert f"neq.{layer.__name__}(" in example
    assert "tensor([0, " in example
    assert not failures(layer.__name__, example)


@each_layer
def test_help_shows_signature_and_docstring(layer):
    text = pydoc.render_doc(layer, renderer=pydoc.plaintext)
    assert f"{layer.__name__}{inspect.signature(layer.plain)}" in text
    assert f"``nn.{layer.plain.__name__}`` that trains only its active neurons" in text


def test_editors_find_torchs_init():
    """They read the source: what is not for type checkers, they pass over."""
    (base,) = ast.parse(inspect.getsource(neq.NeuronLayer)).body
    assert "__init__" not in {node.name for node in base.body if isinstance(node, ast.FunctionDef)}


def test_there_are_eighteen():
    assert len(LAYERS) == 18
