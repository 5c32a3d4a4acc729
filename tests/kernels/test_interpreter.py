"""The tests of Triton kernels, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "names",
    [
        ["wgrad/test_grouped"],
        ["test_addresses", "similarity/test_fused", "step/test_fused"],
    ],
    ids=" ".join,
)
def test_in_the_interpreter(names):
    files = [Path(__file__).parent / f"{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
