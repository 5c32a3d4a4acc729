import subprocess
import sys

import torch

import neq
from neq import doctor
from neq_kernels.device import extension as compiled
from neq_kernels.wgrad import planner


def test_command():
    run = subprocess.run(
        [sys.executable, "-m", "neq", "doctor"], capture_output=True, text=True, check=True
    )
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    assert ["neq", neq.__version__] in lines
    assert ["torch", torch.__version__] in lines
    sections = [line[0] for line in lines if len(line) == 1]
    assert sections == ["versions", "devices", "backends"]


def test_no_command_shows_the_commands():
    run = subprocess.run([sys.executable, "-m", "neq"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "COMMAND" in run.stderr


def test_gives_the_reason(monkeypatch):
    monkeypatch.setattr(compiled, "devices", frozenset())
    monkeypatch.setattr(compiled, "_reason", "the dog ate it")
    backends = doctor.backends()
    assert planner.BACKENDS.keys() <= backends.keys()
    assert backends["dense"] == backends["pack"] == "yes"
    assert backends["native"] == backends["compiled, cpu"] == "no: the dog ate it"
    assert backends["compiled, cuda"] == "no: the dog ate it"


def test_says_why_triton_is_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert doctor.backends()["grouped"].startswith("no: triton does not import: ")


def test_says_what_the_cuda_kernels_lack(monkeypatch):
    monkeypatch.setattr(compiled, "devices", frozenset({"cpu"}))
    monkeypatch.setattr(compiled, "_reason", "no nvcc")
    assert doctor.backends()["narrow"] == doctor.backends()["compiled, cuda"] == "no: no nvcc"


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    versions = doctor.versions()
    assert versions["c++"] == versions["nvcc"] == "not found"
    assert versions["torch"] == torch.__version__


def test_render_aligns():
    text = doctor.render({"a": {"long name": "x", "b": "y"}})
    assert text == "a\n  long name  x\n  b          y"
