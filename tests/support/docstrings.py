"""Docstrings in Google style: their sections, and the examples in them."""

import doctest
import inspect
import re

import torch
from torch import nn

import neq
import neq_kernels

SECTIONS = "Args", "Attributes", "Examples", "Raises", "Returns"
GIVEN = {"neq": neq, "neq_kernels": neq_kernels, "nn": nn, "torch": torch}  # to every example


def sections(text: str) -> dict[str, str]:
    """The sections of a docstring by name; what comes before them is called "summary"."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section: str) -> list[str]:
    """The names that a section explains, without stars."""
    return re.findall(r"^ {4}\*{0,2}(\w+): ", section, re.MULTILINE)


def failures(name: str, text: str) -> str:
    """Run the examples of a docstring; what doctest has to say against them."""
    example = doctest.DocTestParser().get_doctest(text, dict(GIVEN), name, None, 0)
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    return "".join(told)
