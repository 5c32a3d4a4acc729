"""The trainers on two processes, launched as their users launch them."""

import json

import pytest

from tests.support.launch import TORCHRUN, launch

# --multi_gpu: with --cpu alone it starts a single process; the script asks for the CPU itself
LAUNCH = "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"
LAUNCH += ("--main_process_port=0",)


@pytest.mark.parametrize(
    ("launcher", "library"),
    [(TORCHRUN, "lightning"), (TORCHRUN, "transformers"), (LAUNCH, "accelerate")],
    ids=["lightning", "transformers", "accelerate"],
)
def test_ranks_agree_and_resume_with_the_same_bits(launcher, library, tmp_path):
    launch(launcher, "tests/support/trainers.py", library, tmp_path, folder=tmp_path)
    (whole, resumed), other = (
        json.loads((tmp_path / f"rank {rank}").read_text()) for rank in range(2)
    )
    assert [whole, resumed] == other
    assert whole == resumed
