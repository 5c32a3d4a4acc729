"""sdist, wheel and installation, without the network: torch comes from the current environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]

INSTALLED = ROOT / "tests/project/installed.py"
TABLE = "neq_kernels/wgrad/tables/a-device.json"
READ_TABLE = """
from neq_kernels.wgrad import tables
assert tables.shipped("A device", frozenset({"pack"})) == {"a problem": {64: "pack"}}
"""


def run(*command, env=None, **options):
    env = dict(os.environ if env is None else env)
    env.pop("PYTHONPATH", None)  # which may lead to this tree
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=env, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    tree, folder = (tmp_path_factory.mktemp(name) for name in ("tree", "sdist"))
    # what earlier builds left in the tree would find its way into this one
    left = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=left, dirs_exist_ok=True)
    (tree / TABLE).parent.mkdir(exist_ok=True)
    (tree / TABLE).write_text('{"A device": {"a problem": {"64": "pack"}}}')
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


def install_and_use(wheel, clean, cwd, *options):
    python, lend = clean
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    lend()
    run(python, "-c", READ_TABLE, cwd=cwd)
    return run(python, INSTALLED, *options, cwd=cwd).splitlines()


def belongs_in_a_wheel():
    """The packages' files, wherever a new one appears."""
    kept = {".py", ".pyi", ".typed", ".json"}
    files = (file for name in ("neq", "neq_kernels") for file in (ROOT / name).rglob("*"))
    return {file.relative_to(ROOT).as_posix() for file in files if file.suffix in kept}


def test_sdist_to_wheel_to_installation(sdist, clean, tmp_path):
    wheel = wheel_of(sdist, tmp_path / "wheels", os.environ | {"NEQ_CUDA": "0"})
    file, version, why_not = install_and_use(wheel, clean, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert version in wheel.name
    assert why_not == "None"
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    (extension,) = {name for name in packed if name.startswith("neq_kernels/_C.cpython-")}
    assert packed == belongs_in_a_wheel() | {extension, TABLE}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_without_a_compiler(sdist, clean, tmp_path):
    """From a folder, as by ``pip install .``: it works, and says what it lacks."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("neq-*")
    env = {name: value for name, value in os.environ.items() if name not in ("CXX", "CUDA_HOME")}
    wheel = wheel_of(source, tmp_path / "wheels", env | {"PATH": ""})
    *_, why_not = install_and_use(wheel, clean, tmp_path, "--uncompiled")
    assert "for want of a C++ compiler" in why_not
    assert f"no: {why_not}" in run(clean[0], "-m", "neq", "doctor", cwd=tmp_path)


def refusal(tmp_path, path, **env):
    """What setup.py says last when it can't build, with only ``path`` to find compilers on."""
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    build = [f"--build-{part}={tmp_path / part}" for part in ("lib", "temp")]
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *build],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=kept | {"PATH": str(path), "CXX": shutil.which("c++") or shutil.which("g++")} | env,
    )
    assert result.returncode != 0
    return result.stderr.splitlines()[-1]


def test_neq_cuda_takes_0_or_1(tmp_path):
    said = refusal(tmp_path, os.environ["PATH"], NEQ_CUDA="yes")
    assert said == "ValueError: NEQ_CUDA must be 0, 1 or unset, got 'yes'"


def test_cuda_insisted_on_without_nvcc(tmp_path):
    said = refusal(tmp_path, "", NEQ_CUDA="1", CUDA_HOME=str(tmp_path))
    assert said.endswith(f"NEQ_CUDA=1, but nvcc is neither on the PATH nor in {tmp_path}/bin")


@pytest.mark.parametrize(("wanted", "taken"), [("1", True), ("", False), ("0", False)])
def test_an_nvcc_where_cuda_usually_is(wanted, taken, tmp_path, monkeypatch):
    """What nothing names may be too old, so it serves only where CUDA is insisted on."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch(0o755)
    source = (ROOT / "setup.py").read_text().partition("\nif cxx() is None")[0]
    names = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec(compile(source, "setup.py", "exec"), names)
    names["USUAL_CUDA"] = str(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("NEQ_CUDA", wanted)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert names["nvcc"]() == (str(tmp_path / "bin/nvcc") if taken else None)


def test_cuda_insisted_on_without_a_compiler(tmp_path):
    said = refusal(tmp_path, "", NEQ_CUDA="1", CXX="")
    assert said.endswith("NEQ_CUDA=1, but there is no C++ compiler: put c++ on the PATH")


def test_an_nvcc_too_old_or_too_new(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_50\n")
    nvcc.chmod(0o755)
    said = refusal(tmp_path, tmp_path, NEQ_CUDA="1")
    assert said.endswith(f"{nvcc} knows none of sm_[80, 90, 100]; NEQ_CUDA=0 builds without it")


def test_an_extension_that_does_not_load(tmp_path):
    shutil.copytree(ROOT / "neq_kernels", tmp_path / "neq_kernels")
    for extension in (tmp_path / "neq_kernels").glob("_C.*"):
        extension.write_bytes(b"not a library")
    said = run(
        sys.executable,
        "-c",
        "from neq_kernels.device import extension;"
        "print(extension.__file__, extension.why_not('cpu'))",
        cwd=tmp_path,
    )
    assert said.startswith(str(tmp_path))
    assert "the extension neq_kernels._C does not load: " in said
