"""Triton kernels in tests: on a GPU where there is one, and anywhere in Triton's interpreter.

Triton decides at its import whether it interprets, so ``test_interpreter.py`` runs the files that
test kernels once more in a process that does. Its bfloat16 products are wrong; float16 and float32
stand for them.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
