"""The trainers on two processes, launched as their users launch them."""

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# --multi_gpu: with --cpu alone it starts a single process; the script asks for the CPU itself
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--main_process_port=0"]


@pytest.mark.parametrize(
    ("launcher", "library"),
    [(TORCHRUN, "lightning"), (TORCHRUN, "transformers"), (LAUNCH, "accelerate")],
    ids=["lightning", "transformers", "accelerate"],
)
def test_ranks_agree_and_resume_with_the_same_bits(launcher, library, tmp_path):
    script = str(ROOT / "tests/support/trainers.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, script, library, str(tmp_path)]
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    (whole, resumed), other = (
        json.loads((tmp_path / f"rank {rank}").read_text()) for rank in range(2)
    )
    assert [whole, resumed] == other
    assert whole == resumed
