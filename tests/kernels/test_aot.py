"""tests/support/aot.py notices what no kernel of ours may have."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support.aot import kernels


@triton.jit
def multiply(a, b, c):
    i = tl.arange(0, 64)
    places = i[:, None] * 64 + i
    tl.store(c + places, tl.dot(tl.load(a + places), tl.load(b + places)))


def call():
    a, b = (torch.empty(64, 64, dtype=torch.bfloat16) for _ in range(2))
    multiply[1,](a, b, torch.empty(64, 64), enable_fp_fusion=True)


def test_asynchronous_products_are_refused():
    with pytest.raises(AssertionError, match="asynchronous products: multiply"):
        kernels(90, call)


def test_others_are_not():
    (kernel,) = kernels(80, call)
    assert kernel.asks("mma.sync")
