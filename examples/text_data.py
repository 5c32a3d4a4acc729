"""Text with labels, without a download: docstrings of installed packages, to be told apart.

The label of a docstring is the package that it comes from. All docstrings of a module, a file, are
either trained on or tested with. Names of the packages are blanked out.
"""

import ast
import importlib.util
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STDLIB = "stdlib"
PACKAGES = (
    *(STDLIB, "torch", "numpy", "sympy", "networkx", "matplotlib", "transformers", "lightning"),
    *("huggingface_hub", "mypy"),
)
TESTED = 5  # one module in so many is for testing
SHORTEST, LONGEST = 80, 2000  # characters of a docstring


class Batch(NamedTuple):
    """Tokens and labels of some texts."""

    tokens: dict[str, Tensor]  # int64 [texts, length] each
    labels: Tensor  # int64 [texts]

    def of(self, chosen: Tensor | slice) -> dict[str, Tensor]:
        """Some of them, as a model of transformers takes them."""
        return {"labels": self.labels[chosen]} | {k: t[chosen] for k, t in self.tokens.items()}


class Texts(NamedTuple):
    """What to train on, and what to test with."""

    classes: Sequence[str]
    train: Batch
    test: Batch


def load(
    tokenizer: Any,
    packages: Sequence[str] = PACKAGES,
    limit: int = 128,
    test_limit: int = 48,
    length: int = 64,
) -> Texts:
    """The docstrings of some packages, as many of each.

    Args:
        tokenizer: One of transformers.
        packages: Their names. ``"stdlib"`` is Python itself.
        limit: How many docstrings of a package to train on, at most.
        test_limit: How many to test with.
        length: How many tokens of each are kept.
    """
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    blanked = re.compile("|".join(p for p in packages if p != STDLIB), re.IGNORECASE)
    for label, package in enumerate(packages):
        found: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for module, text in _docstrings(package):
            tested = zlib.crc32(f"{package}/{module}".encode()) % TESTED == 0
            found[tested][blanked.sub("", text)] = label
        for part, texts, most in zip(parts, found, (limit, test_limit), strict=True):
            # in an order that has to do with no module
            ordered = sorted(texts, key=lambda text: zlib.crc32(text.encode()))
            part += [(text, label) for text in ordered[:most]]
    batches = []
    for part in parts:
        texts, labels = zip(*part, strict=True)
        tokens = tokenizer(
            list(texts), truncation=True, padding="max_length", max_length=length,
            return_tensors="pt",
        )  # fmt: skip
        batches.append(Batch(dict(tokens), torch.tensor(labels)))
    return Texts(packages, *batches)


def _docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Each with the path of its module. Nothing is imported."""
    root = _folder(package)
    for file in sorted(root.rglob("*.py")):
        module = file.relative_to(root)
        if package == STDLIB and module.parts[0] in ("site-packages", "test", "idlelib"):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a template, or a test of parsers
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if SHORTEST <= len(text) <= LONGEST:
                    yield module.as_posix(), text


def _folder(package: str) -> Path:
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"--packages: no package {package!r} is installed")
    return Path(next(iter(spec.submodule_search_locations)))
