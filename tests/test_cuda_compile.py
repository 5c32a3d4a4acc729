"""Without a GPU: the CUDA sources compile for every target, silently, and keep to registers."""

import re
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc/cuda").glob("*.cu"))


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(source, target, tmp_path):
    command = ["nvcc", "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler=-Wall"]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v"]
    command += ["-c", str(source), "-o", str(tmp_path / "out.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    spills = re.findall(
        r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stdout + run.stderr
    )
    assert spills
    assert set(spills) == {("0", "0")}
