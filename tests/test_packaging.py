"""sdist, wheel and installation, without the network: torch comes from the current environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]

USE = """
import torch, neq
from neq_kernels import compiled
model = neq.convert(torch.nn.Linear(4, 6))
model.set_active([1, 4])
model(torch.ones(3, 4)).sum().backward()
assert model.weight.grad.sum(1).tolist() == [0, 12, 0, 0, 12, 0], model.weight.grad
print(neq.__file__, neq.__version__, compiled.why_not("cpu"), sep="\\n")
"""


def run(*command, **options):
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    tree, folder = (tmp_path_factory.mktemp(name) for name in ("tree", "sdist"))
    # what earlier builds left in the tree would find its way into this one
    left = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=left, dirs_exist_ok=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, tree)
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def clean(tmp_path):
    """The Python of a new environment, and a function that then lends it this one's packages."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"

    def lend():
        purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        (Path(purelib.strip()) / "lent.pth").write_text(sysconfig.get_path("purelib"))

    return python, lend


def wheel_of(source, folder, env):
    run(*PIP, "wheel", *OFFLINE, "-w", folder, source, env=env)
    (wheel,) = folder.iterdir()
    return wheel


def install_and_use(wheel, clean, cwd):
    python, lend = clean
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    lend()
    return run(python, "-c", USE, cwd=cwd).splitlines()


def test_sdist_to_wheel_to_installation(sdist, clean, tmp_path):
    wheel = wheel_of(sdist, tmp_path / "wheels", os.environ | {"NEQ_CUDA": "0"})
    file, version, why_not = install_and_use(wheel, clean, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert version in wheel.name
    assert why_not == "None"


def test_without_a_compiler(sdist, clean, tmp_path):
    """From a folder, as by ``pip install .``: it works, and says what it lacks."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("neq-*")
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME")}
    wheel = wheel_of(source, tmp_path / "wheels", env | {"PATH": ""})
    *_, why_not = install_and_use(wheel, clean, tmp_path)
    assert "for want of a C++ compiler" in why_not
    assert f"no: {why_not}" in run(clean[0], "-m", "neq", "doctor", cwd=tmp_path)
