"""That an installed neq works, and that its compiled kernels share torch's pool of threads.

A program: tests/project/test_packaging.py runs it, and cibuildwheel for every wheel.
"""

import argparse
from pathlib import Path

import torch

import neq
from neq_kernels.device import extension

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--uncompiled", action="store_true", help="there need be no compiled kernels")
args = parser.parse_args()

assert Path(neq.__file__).parents[1] != Path(__file__).resolve().parents[2], "neq is of this tree"

why_not = extension.why_not("cpu")
assert why_not is None or args.uncompiled, why_not
maps = Path("/proc/self/maps").read_text().splitlines()
pools = {line.split()[-1] for line in maps if "libgomp" in line}
assert len(pools) == 1, f"not one pool of threads: {pools}"

model = neq.convert(torch.nn.Linear(4, 6))
model.set_active([1, 4])
model(torch.ones(3, 4)).sum().backward()
assert model.weight.grad.sum(1).tolist() == [0, 12, 0, 0, 12, 0], model.weight.grad

print(neq.__file__, neq.__version__, why_not, sep="\n")
