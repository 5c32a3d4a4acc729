"""Triton kernels in tests: on a GPU where there is one, and anywhere in Triton's interpreter.

Triton decides at its import whether it interprets, so ``test_interpreter.py`` runs the files that
test kernels once more in a process that does. Its bfloat16 products are wrong; float16 and float32
stand for them.
"""

import os

import pytest
import torch

from tests.support.tensors import pair

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="is about a GPU")
DTYPES = [pair(torch.float32), pair(torch.float16), pair(torch.float16, torch.float32)]
if not INTERPRETED:
    DTYPES += [pair(torch.bfloat16), pair(torch.bfloat16, torch.float32)]
in_dtypes = pytest.mark.parametrize("dtypes", DTYPES)
