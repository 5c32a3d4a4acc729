"""Triton kernels in tests: on a GPU where there is one, and anywhere in Triton's interpreter.

Triton decides at its import whether it interprets, so ``test_interpreter.py`` runs the files that
test kernels once more in a process that does. Its bfloat16 products are wrong; float16 and float32
stand for them.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
# of dY and X, then of the weight
DTYPES = [
    pytest.param((torch.float32, torch.float32), id="float32"),
    pytest.param((torch.float16, torch.float16), id="float16"),
    pytest.param((torch.float16, torch.float32), id="float16-weight_float32"),
]
if not INTERPRETED:
    DTYPES.append(pytest.param((torch.bfloat16, torch.bfloat16), id="bfloat16"))
    DTYPES.append(pytest.param((torch.bfloat16, torch.float32), id="bfloat16-weight_float32"))
