"""Without a GPU: whatever the planner can ask of ``fused`` compiles, into the code that it should.

What launches the kernels is run, on tensors without memory where nothing asks for an address; the
launches only compile.
"""

from dataclasses import replace
from math import inf

import pytest
import torch

from bench.contenders import active_count
from bench.problems import Problem, conv, linear, problems
from neq_kernels.wgrad import fused, planner
from neq_kernels.wgrad.geometry import Conv
from tests.support.aot import BLOCK_BYTES, every_target, kernels, launches

WIDE, MMA = "cp.async.cg.shared.global", "mma.sync"  # a copy of 16 bytes; a product by a warp
LARGE_MMA = {80: MMA, 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # of tiles with 64 rows or more
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the same, in machine code
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def asked(problem: Problem, share: float, dtype, weight_dtype):
    """What ``fused`` is given for it; None where the planner rules it out."""
    sizes = (problem.dy, dtype), (problem.x, dtype), (problem.weight, weight_dtype)
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in sizes]
    geometry = None
    if problem.kernel:
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
        sides = ((n, n) for n in (problem.stride, problem.padding, 1))
        geometry = Conv(*sides, False, (0, 0), problem.groups)
    dy, x, weight = tensors
    if problem.transposed:
        weight = weight.t().contiguous().t()
    k = active_count(share, problem.neurons)
    planned = planner.problem_of(x, weight, problem.neurons, k, geometry)
    if fused.cost(replace(planned, device="cuda")) == inf:
        return None
    return dy, x, weight, k, problem.bias, geometry


def ask(dy, x, weight, k, bias, geometry):
    rows = torch.empty(dy.shape[1], dtype=torch.int64, device="meta")
    if geometry is None:
        fused.linear_wgrad(dy, x, weight, rows, k, bias)
    else:
        fused.conv_wgrad(dy, x, weight, rows, k, bias, geometry)


def of_the_suite(dtype, *weight_dtypes):
    """Ask for the gradients of well-known networks, as ``bench/backward_speed.py`` does; the weight
    is float32 under autocast."""
    for problem in problems("full", "cuda"):
        for share in (0.75, 0.5, 0.25, 0.1):
            for weight_dtype in weight_dtypes:
                if given := asked(problem, share, dtype, weight_dtype):
                    ask(*given)


class Covering:
    """Wants so many launches that each tile is seen with each value of everything else that decides
    on the code: of the constants, whether what is read and written is aligned, and its dtype.
    Triton compiles several of a kind, as other sizes are multiples of 16, or 1."""

    def __init__(self):
        self.seen = set()

    def __call__(self, name, given):
        tile = name, given["ROWS"], given["COLUMNS"]
        names = "PAIRS", "EVEN", "BIAS", "SPLIT", "PRECISION"
        others = {other: given[other] for other in names if other in given}
        others |= {"X": given["C"] % 16, "dW": (given["dw"].dtype, given["dw_strides"][-1] == 1)}
        pairs = {(tile, *other) for other in others.items()}
        wanted = not pairs <= self.seen
        self.seen |= pairs
        return wanted


def check(kernel, arch):
    """It multiplies on tensor cores, float32 only by TF32; what is aligned comes asynchronously, X
    16 bytes at a time, and so leaves dW or its parts; so many run at a time as were counted on.
    Read as Triton wrote it: to take its machine code apart lasts as long as compiling."""
    if kernel.name == "finish":
        return
    given = kernel.arguments
    x, warps, large = given["x"], given["num_warps"], given["ROWS"] >= 64
    cores = x.dtype is not FLOAT32 or given["PRECISION"] == "tf32"
    assert bool(kernel.asks(LARGE_MMA[arch] if large else MMA)) == cores, kernel

    in_fours = given["PAIRS"] or x.dtype is FLOAT32  # dY
    in_pieces = not any(n % 16 for n in (given["C"], x.data_ptr(), *given["x_strides"]))
    assert bool(kernel.asks("cp.async", "0x4")) or not in_fours, kernel
    if in_pieces and x.dtype is not FLOAT32:  # of which wgmma takes X transposed, value by value
        assert kernel.asks(WIDE, "0x10"), kernel
    assert not (in_pieces and in_fours and kernel.asks("ld.global", "b16")), kernel
    if in_pieces and given["dw_strides"][-1] == 1:
        assert kernel.asks("st.global", "v4.b32"), kernel

    programs = fused.WARPS // warps
    assert programs * 32 * warps * kernel.registers <= 2**16, kernel
    assert programs * (kernel.shared + 1024) <= BLOCK_BYTES[arch] + 1024, kernel


ODD = [  # what no well-known network asks for: sizes that are no multiples of 16, above all
    linear("few", 1000, 50, 30),
    linear("inputs", 40_000, 1000, 1024),
    linear("inputs, whole", 4099, 1000, 1024, bias=False),
    linear("neurons", 4099, 1024, 1023),
    linear("transposed", 4099, 1024, 2048, transposed=True),
    linear("transposed, no bias", 4099, 2048, 4096, transposed=True, bias=False),
    conv("inputs", 32, 24, 1024, 3, bias=True),
    conv("patches, no bias", 224, 3, 1024, 16, 16, padding=0),
]


def odd_ones(dtype, weight_dtype):
    for problem in ODD:
        dy, x, weight, k, bias, geometry = asked(problem, 0.5, dtype, weight_dtype)
        ask(dy, x, weight, k, bias, geometry)
        if geometry:
            ask(dy, x, weight.contiguous(), k, bias, geometry)
    # a dilated kernel; then images of one dimension
    dy, x, weight, k, bias, geometry = asked(conv("", 64, 64, 128, 3), 0.5, dtype, weight_dtype)
    ask(dy, x, weight, k, bias, geometry._replace(padding=(2, 2), dilation=(2, 2)))
    line = Conv((1,), (1,), (1,), False, (0,), 1)
    ask(*(t[:, :, 0] for t in (dy, x, weight)), k, True, line)
    # a linear layer's X and dY that are parts of wider ones
    dy, x, weight, k, bias, _ = asked(linear("", 4096, 1024, 1024), 0.5, dtype, weight_dtype)
    parts = (torch.cat([t, t[:, :1]], 1)[:, :-1] for t in (dy, x))
    ask(*parts, weight, k, bias, None)


@every_target
@pytest.mark.parametrize(
    ("dtype", "weight_dtypes"),
    [(BFLOAT16, (BFLOAT16, FLOAT32)), (FLOAT32, (FLOAT32,))],
    ids=["bfloat16", "float32"],
)
def test_all_that_can_be_asked_for(arch, dtype, weight_dtypes, tf32_switch):
    """In bfloat16 on sm_90 each kernel that Triton tells from the others, elsewhere as many as
    cover them: each takes a second to compile."""
    every = arch == 90 and dtype is BFLOAT16

    def ask_all():
        of_the_suite(dtype, *weight_dtypes)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        odd_ones(dtype, FLOAT32)

    compiled = kernels(arch, ask_all, *([] if every else [Covering()]))
    for kernel in compiled:
        check(kernel, arch)
    assert {kernel.name for kernel in compiled} == {"product", "finish"}
    products = [kernel.arguments for kernel in compiled if kernel.name == "product"]
    assert {given["ROWS"] for given in products} == {32, 64, 128}


@every_target
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_float32_follows_the_switch(arch, precision, tf32_switch):
    torch.backends.cuda.matmul.fp32_precision = precision
    given = asked(linear("", 4096, 256, 256), 0.5, FLOAT32, FLOAT32)
    product, _ = kernels(arch, lambda: ask(*given))
    assert product.arguments["PRECISION"] == precision
    check(product, arch)


@every_target
@pytest.mark.parametrize("share", [0.1, 0.7])
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [(linear("", 4096, 256, 256), BFLOAT16), (conv("", 64, 256, 256, 3), FLOAT16)],
    ids=["linear", "conv"],
)
def test_machine_code(arch, share, problem, dtype):
    """The assembler keeps to what it is asked for, in tiles of 32 and of 128 rows."""
    product, finish = kernels(arch, lambda: ask(*asked(problem, share, dtype, dtype)))
    assert product.count(TENSOR_CORES[arch] if product.arguments["ROWS"] > 32 else "HMMA")
    assert product.count("LDGSTS", "128") == product.asks(WIDE, "0x10")
    assert product.count("STG", "128")
    assert not product.count("LDG", "U16")
    assert finish.count("STG", "64")  # of four values: a warp writes a whole row of its tile
    assert finish.count("LDG", "128") == 4  # as many parts are under way at a time
    assert not finish.count("LDG", "U16")


def test_masks_and_batches_of_one_kind_compile_nothing_new():
    """Of samples there are a multiple of 16, or not."""
    with launches(90) as compiled:

        def count(*batches):
            for samples in batches:
                for share in (0.14, 0.17, 0.2, 0.25):  # of 256 neurons: 36 to 64, a tile's rows
                    ask(*asked(linear("", samples, 64, 256), share, FLOAT16, FLOAT16))
            return len(compiled)

        assert count(4096) == 2
        assert count(3008, 9600) == 2
        assert count(3000) == 3  # of the two kernels only the product counts samples
        assert count(4001, 9999) == 3
