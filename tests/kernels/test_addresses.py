"""The check of addresses in Triton's interpreter finds what it is there for."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support import addresses


@triton.jit
def double(x, out, n, row, read, written):
    """``x`` and ``out`` [rows, n], ``row`` apart; ``read`` and ``written`` columns too many."""
    column = tl.arange(0, 16)
    at = tl.program_id(0) * row + column
    value = tl.load(x + at, mask=column < n + read, other=0.0)
    tl.store(out + at, 2 * value, mask=column < n + written)


@triton.jit
def number(address, out):
    tl.store(out, tl.load(address.to(tl.pointer_type(tl.float32))))


def run(columns, wide, read=0, written=0):
    x, out = (torch.ones(3, wide)[:, :columns] for _ in "xo")
    double[3,](x, out, columns, wide, read, written)
    return out


@pytest.mark.parametrize("wide", [7, 9], ids=["whole", "slice"])
def test_what_is_right_passes(wide):
    assert (run(7, wide) == 2).all()


@pytest.mark.parametrize("wide", [7, 9], ids=["whole", "slice"])
@pytest.mark.parametrize("fault", ["read", "written"])
def test_one_too_many_is_found(wide, fault):
    """Beyond the tensor, and in a slice also beyond a row of it."""
    what = "reads" if fault == "read" else "writes"
    with pytest.raises(Exception, match=f"{what} 1 of 8 values outside"):
        run(7, wide, **{fault: 1})


def test_numbers_are_no_addresses_unless_they_are_lent():
    x, out = torch.full((), 3.0), torch.zeros(())
    with pytest.raises(Exception, match="reads 1 of 1 values outside"):
        number[1,](x.data_ptr(), out)
    with addresses.lent([x]):
        number[1,](x.data_ptr(), out)
    assert out == 3


def test_a_value_across_two_elements_is_outside():
    elements = addresses.Elements([torch.zeros(4, dtype=torch.int16)])
    first = elements.starts[:1]
    assert elements.hold(first, 2).all()
    assert not elements.hold(first, 4).any()
    assert not elements.hold(first - 1, 1).any()
