"""Rules of the house that a machine can read: how long files and functions are, and which words are
not used in them."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
TEXT = {".py", ".pyi", ".md", ".h", ".cpp", ".cu", ".inc", ".toml", ".yml"}
# words that are not used, and what to write
RETIRED = {
    "rests": "is frozen, or is at equilibrium",
    "resting": "frozen, or at equilibrium",
    "rested": "frozen, or was at equilibrium",
    "at rest": "frozen, or at equilibrium",
    "who": "it: a kernel is a thing",
    "whoever": "the backend that",
    "whose turn": "the name of what comes next",
    "in no file": "the file or the command of the figure; strike a figure that has none",
}


def tracked(*suffixes: str) -> list[Path]:
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = (ROOT / name for name in run.stdout.split("\0") if name)
    return [file for file in files if file.suffix in suffixes and file.exists()]


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def lines_of(function) -> int:
    return function.end_lineno - function.lineno + 1


def has_its_reason(function, lines: list[str]) -> bool:
    """A line "# long: why" above the function or its first decorator."""
    starts = [function.lineno, *(decorator.lineno for decorator in function.decorator_list)]
    above = (lines[start - 2].strip() for start in starts if start > 1)
    return any(re.match(r"# long: \w", line) for line in above)


def long_functions(file: Path) -> list[str]:
    text = file.read_text()
    functions = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [
        f"{place(file, function.lineno)}: {function.name} has {lines_of(function)} lines"
        for function in functions
        if lines_of(function) > LINES_OF_A_FUNCTION
        if not has_its_reason(function, text.splitlines())
    ]


def bare_asserts(file: Path) -> list[str]:
    return [
        place(file, node.lineno)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]


def retired_words(file: Path) -> list[str]:
    words = "|".join(word.replace(" ", r"\s+") for word in RETIRED)
    text = file.read_text()
    found = [
        (text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()))
        for match in re.finditer(rf"\b(?:{words})\b", text, re.IGNORECASE)
    ]
    return [f"{place(file, line)}: {word} (write: {RETIRED[word.lower()]})" for line, word in found]


def test_no_file_is_long():
    lengths = {file: len(file.read_text().splitlines()) for file in tracked(".py")}
    long = [
        f"{place(file, 1)} has {lines} lines"
        for file, lines in lengths.items()
        if lines > LINES_OF_A_FILE
    ]
    assert not long, "\n".join(["longer than 400 lines:", *long])


def test_no_function_is_long_without_its_reason():
    long = [function for file in tracked(".py") for function in long_functions(file)]
    assert not long, "\n".join(['say why above it, as "# long: ...", or shorten it:', *long])


def test_users_get_exceptions_and_no_asserts():
    packages = ROOT / "neq", ROOT / "neq_kernels"
    files = [file for file in tracked(".py") if any(map(file.is_relative_to, packages))]
    assert len(files) > 100
    found = [assertion for file in files for assertion in bare_asserts(file)]
    assert not found, "\n".join(["raise an exception with a message instead:", *found])


def test_no_retired_word_is_used():
    files = (file for file in tracked(*TEXT) if file != Path(__file__).resolve())
    found = [word for file in files for word in retired_words(file)]
    assert not found, "\n".join(["retired words:", *found])


FUNCTION = "@decorator\ndef function():\n" + "    pass\n" * LINES_OF_A_FUNCTION


@pytest.mark.parametrize(
    ("text", "long"),
    [
        (FUNCTION, True),
        (FUNCTION.replace("    pass\n", "", 1), False),
        (f"# long: one step after the other\n{FUNCTION}", False),
        (FUNCTION.replace("def", "# long: one step after the other\ndef"), False),
        (f"# long:\n{FUNCTION}", True),
    ],
    ids=["long", "not long", "with its reason", "with its reason inside", "without a reason"],
)
def test_long_functions_are_found(text, long, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.project.test_house.ROOT", tmp_path)
    file = tmp_path / "file.py"
    file.write_text(text)
    assert bool(long_functions(file)) == long


def test_retired_words_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.project.test_house.ROOT", tmp_path)
    file = tmp_path / "file.md"
    file.write_text("It\nwas At\nrest, whole; who_steps restless. WHO rested?")
    assert retired_words(file) == [
        "file.md:2: At rest (write: frozen, or at equilibrium)",
        "file.md:3: WHO (write: it: a kernel is a thing)",
        "file.md:3: rested (write: frozen, or was at equilibrium)",
    ]


def test_torchs_private_api_has_one_door():
    private = re.compile(r"\b(torch|forward_ad)\._(?!_)\w+|\btorch\.\w+\._C\b")
    allowed = ROOT / "neq_kernels/_torch.py"
    found = [
        f"{place(file, number)}: {line.strip()}"
        for file in tracked(".py")
        if file.is_relative_to(ROOT / "neq") or file.is_relative_to(ROOT / "neq_kernels")
        if file != allowed
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if private.search(line)
    ]
    assert not found, "\n".join(["use neq_kernels/_torch.py:", *found])
