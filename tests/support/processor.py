"""The vector instructions that this CPU has and a kernel is compiled for."""

import pytest

from neq_kernels.device.extension import _C

ISAS = [name for name in ("avx512", "avx2", "portable") if _C.cpu_has_isa(getattr(_C.Isa, name))]
on_isas = pytest.mark.parametrize("isa", ISAS)
