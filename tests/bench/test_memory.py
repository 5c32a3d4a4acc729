"""bench/memory.py: peaks of memory, and memory that stays."""

import subprocess
import sys

import pytest
import torch

from bench.lib import peak_memory as memory
from tests.support import ROOT
from tests.support.benches import CPU

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_peak_is_exact():
    held = []

    def call():
        held.append(torch.ones(2 << 20))  # 8 MiB
        torch.ones(4 << 20)  # 16 MiB, freed at once
        torch.ones(1 << 20)

    assert memory.peak_bytes(call, CPU) == 24 << 20
    assert memory.peak_bytes(lambda: None, CPU) == 0


FREED = """
import resource
import torch
import neq  # as every benchmark does: its small objects leave holes for those of a call
from bench.lib.timing import interleave

def pages(turn=0):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages())
interleave({"call": pages}, torch.device("cpu"), 0.001)
print(pages())
"""


def test_what_is_freed_stays_while_steps_are_timed():
    run = subprocess.run(
        [sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    otherwise, timed = map(int, run.stdout.split())
    assert otherwise > 1000
    assert timed < 100
