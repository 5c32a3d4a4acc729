"""Text with labels, without a download: docstrings of installed packages, to be told apart.

The label of a docstring is the package that it comes from. All docstrings of a module, a file, are
of one part: trained on, tuned with or tested with. Names of the packages are blanked out.
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
PARTS = ("test", "tune", "train", "train", "train")  # of five modules
SHORTEST, LONGEST = 80, 2000  # characters of a docstring


class Batch(NamedTuple):
    """Tokens and labels of some texts."""

    tokens: dict[str, Tensor]  # int64 [texts, length] each
    labels: Tensor  # int64 [texts]

    def of(self, chosen: Tensor | slice) -> dict[str, Tensor]:
        """Some of them, as a model of transformers takes them."""
        return {"labels": self.labels[chosen]} | {k: t[chosen] for k, t in self.tokens.items()}


class Texts(NamedTuple):
    """What to train on, to choose settings with, and to test with."""

    train: Batch
    tune: Batch
    test: Batch

    def checksum(self) -> int:
        """Another one for other texts."""
        found = 0
        for batch in self:
            for t in (batch.labels, *batch.tokens.values()):
                found = zlib.crc32(t.numpy().tobytes(), found)
        return found


def load(
    tokenizer: Any,
    packages: Sequence[str] = PACKAGES,
    limit: int = 160,
    test_limit: int = 64,
    length: int = 32,
) -> Texts:
    """The docstrings of some packages, as many of each.

    Args:
        tokenizer: One of transformers.
        packages: Their names. ``"stdlib"`` is Python itself.
        limit: How many docstrings of a package to train on, at most.
        test_limit: How many to tune with, and to test with.
        length: How many tokens of each are kept.
    """
    limits = {"train": limit, "tune": test_limit, "test": test_limit}
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in limits}
    blanked = re.compile("|".join(p for p in packages if p != STDLIB), re.IGNORECASE)
    for label, package in enumerate(packages):
        found: dict[str, set[str]] = {part: set() for part in limits}
        for module, text in _docstrings(package):
            part = PARTS[zlib.crc32(f"{package}/{module}".encode()) % len(PARTS)]
            found[part].add(blanked.sub("", text))
        for part, most in limits.items():
            # in an order that has to do with no module
            ordered = sorted(found[part], key=lambda text: zlib.crc32(text.encode()))
            parts[part] += [(text, label) for text in ordered[:most]]
    batches = {}
    for part, labelled in parts.items():
        texts, labels = zip(*labelled, strict=True)
        tokens = tokenizer(
            list(texts), truncation=True, padding="max_length", max_length=length,
            return_tensors="pt",
        )  # fmt: skip
        batches[part] = Batch(dict(tokens), torch.tensor(labels))
    return Texts(**batches)


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
