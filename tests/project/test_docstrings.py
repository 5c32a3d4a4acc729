"""Every public name has a docstring, which knows the arguments and whose examples run."""

import dataclasses
import inspect
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest
from torch._ops import OpOverload

import neq
import neq.history
import neq_kernels
from neq.cost.step_times import Segment, StepTimes
from neq.integrations import accelerate, lightning, transformers
from neq.layers.groups import Group
from neq.measure.base import Measure
from neq.measure.gradient_signal import GradientSignal
from neq.measure.update_gain import UpdateGain
from neq.policies.base import Training
from neq_kernels import planner, reference
from tests.support.docstrings import entries, failures, sections

PLANNER = planner.choose, planner.load, planner.only, planner.save, planner.tuning


def public() -> Iterator[tuple[str, object]]:
    """What the API pages show: names, and the public members of classes of ours."""
    for module in (neq, neq.distributed, neq.optim, neq.prune, neq_kernels, reference):
        for name in module.__all__:
            if name not in ("__version__", "OnThaw"):  # no docstring can be theirs
                yield from with_members(f"{module.__name__}.{name}", getattr(module, name))
    for name, thing in vars(neq.history).items():
        if getattr(thing, "__module__", None) == "neq.history" and not name.startswith("_"):
            yield from with_members(f"neq.history.{name}", thing)
    for thing in (lightning.NEqCallback, transformers.NEqCallback, accelerate.prepare_controller):
        yield f"{thing.__module__}.{thing.__name__}", thing
    measures = Measure, GradientSignal, UpdateGain
    for thing in (Group, *measures, StepTimes, Segment, Training, *PLANNER):
        yield from with_members(f"{thing.__module__}.{thing.__name__}", thing)


def with_members(name: str, thing: object) -> Iterator[tuple[str, object]]:
    yield name, thing
    if isinstance(thing, type):
        for key, member in vars(thing).items():
            kinds = FunctionType, property, classmethod
            if isinstance(member, kinds) and not key.startswith("_"):
                yield f"{name}.{key}", getattr(thing, key)


PUBLIC = dict(public())
each = pytest.mark.parametrize("name", PUBLIC)


def docstring(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def arguments(thing: object) -> dict[str, bool]:
    """Each argument, and whether it has to be given."""
    if isinstance(thing, OpOverload):
        return {a.name: not a.has_default_value() for a in thing._schema.arguments}
    optional = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {
        name: p.default is p.empty and p.kind not in optional
        for name, p in inspect.signature(thing).parameters.items()
        if name not in ("self", "cls")
    }


def wrong_arguments(thing: object) -> list[str]:
    """What the sections of a docstring have and the signature lacks, or the other way round."""
    found = sections(docstring(thing))
    wrong = []
    if "Args" in found:
        told, has = entries(found["Args"]), arguments(thing)
        wrong += [f"{name} is no argument" for name in told if name not in has]
        wrong += [f"{name} is not explained" for name in has if has[name] and name not in told]
    if dataclasses.is_dataclass(thing):
        told = entries(found.get("Attributes", ""))
        fields = [field.name for field in dataclasses.fields(thing)]
        if told != fields:
            wrong.append(f"attributes are {fields}, not {told}")
    return wrong


@each
def test_has_a_docstring(name):
    summary = sections(docstring(PUBLIC[name]))["summary"]
    first, *rest = summary.splitlines()
    assert first.endswith((".", "?"))
    assert not rest or not rest[0]


@each
def test_explains_its_arguments(name):
    thing = PUBLIC[name]
    if not isinstance(thing, property | ModuleType):
        assert not wrong_arguments(thing)


@pytest.mark.usefixtures("fresh_planner", "one_thread")
@pytest.mark.parametrize("name", [name for name in PUBLIC if ">>>" in docstring(PUBLIC[name])])
def test_examples_print_what_they_say(name):
    found = sections(docstring(PUBLIC[name]))
    assert [section for section, text in found.items() if ">>>" in text] == ["Examples"]
    assert not failures(name, found["Examples"])


def test_an_operator_takes_what_its_reference_takes():
    for name in neq_kernels.ops.__all__:
        operator = getattr(neq_kernels, name)
        assert operator.__doc__ == getattr(reference, name).__doc__
        assert list(arguments(operator)) == list(arguments(getattr(reference, name)))


def test_wrong_arguments_are_found():
    def function(a, b, c=1, *args):
        """Do something.

        Args:
            a: The first.
            d: No argument.
            *args: More.

        Returns:
            b: Not an argument here.
        """

    assert wrong_arguments(function) == ["d is no argument", "b is not explained"]


def test_wrong_attributes_are_found():
    @dataclasses.dataclass
    class Fields:
        """Some fields.

        Attributes:
            b: The second.
        """

        a: int
        b: int

    assert wrong_arguments(Fields) == ["attributes are ['a', 'b'], not ['b']"]


def test_a_wrong_example_is_found():
    assert "Expected:\n    3" in failures("sum", ">>> 1 + 1\n3\n")
    assert not failures("sum", ">>> 1 + 1\n2\n")
