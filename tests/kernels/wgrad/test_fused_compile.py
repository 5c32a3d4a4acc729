"""Without a GPU: whatever the planner can ask of ``fused`` compiles, into the code that it should.

What launches the kernels is run, on tensors without memory where nothing asks for an address; the
launches only compile.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from bench.lib.problems import Problem, conv, linear, problems
from bench.lib.wgrad_contenders import active_count
from neq_kernels.wgrad import fused, planner
from neq_kernels.wgrad.geometry import Conv
from tests.support import sass
from tests.support.aot import BLOCK_BYTES, every_target, kernels, launches

WIDE, MMA = "cp.async.cg.shared.global", "mma.sync"  # a copy of 16 bytes; a product by a warp
LARGE_MMA = {80: MMA, 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # of tiles with 64 rows or more
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # the same, in machine code
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def no_gpu():
    """None that a machine may have decides what is compiled for others."""
    with mock.patch.object(fused, "archs", return_value=set()):
        yield


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
    if problem.column_major:
        weight = weight.t().contiguous().t()
    k = active_count(share, problem.neurons)
    planned = planner.problem_of(x, weight, problem.neurons, k, problem.bias, geometry)
    if not fused.supports(replace(planned, device="cuda")):
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
        names = "PAIRS", "EVEN", "BIAS", "SPLIT"
        others = {other: given[other] for other in names if other in given}
        others |= {"X": given["C"] % 16, "dW": (given["dw"].dtype, given["dw_strides"][-1] == 1)}
        pairs = {(tile, *other) for other in others.items()}
        wanted = not pairs <= self.seen
        self.seen |= pairs
        return wanted


def check(kernel, arch):
    """It multiplies on tensor cores, but never float32; what is aligned comes asynchronously, X
    16 bytes at a time, and so leaves dW or its parts; so many run at a time as were counted on.
    Tensor cores read what was fenced, and keep their registers to themselves.
    Else read as Triton wrote it: to take its machine code apart lasts as long as compiling."""
    if kernel.name == "finish":
        return
    given = kernel.arguments
    x, warps, large = given["x"], given["num_warps"], given["ROWS"] >= 64
    cores = x.dtype is not FLOAT32
    assert not kernel.asks("tf32"), kernel
    if fused.fenced(arch):
        assert not sass.unfenced(kernel.ptx), kernel
    if kernel.asks("wgmma.mma_async"):
        assert kernel.listing.count("HGMMA"), kernel
        assert not sass.touched_too_early(kernel.listing), kernel
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
    linear("transposed", 4099, 1024, 2048, column_major=True),
    linear("transposed, no bias", 4099, 2048, 4096, column_major=True, bias=False),
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
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        of_the_suite(dtype, *weight_dtypes)
        for weight_dtype in weight_dtypes:
            odd_ones(dtype, weight_dtype)

    compiled = kernels(arch, ask_all, *([] if every else [Covering()]))
    for kernel in compiled:
        check(kernel, arch)
    assert {kernel.name for kernel in compiled} == {"product", "finish"}
    products = [kernel.arguments for kernel in compiled if kernel.name == "product"]
    assert {given["ROWS"] for given in products} == ({32, 64, 128} if dtype is BFLOAT16 else {64})


@every_target
@pytest.mark.parametrize("problem", [linear("", 4096, 256, 256), conv("", 64, 64, 64, 3)], ids=str)
def test_tf32_is_refused(arch, problem, tf32_switch):
    """And what was planned before the switch was turned keeps all bits of its inputs."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for switch in switches:
        switch.fp32_precision = "ieee"
    given = asked(problem, 0.5, FLOAT32, FLOAT32)
    for switch in switches:
        switch.fp32_precision = "tf32"
    assert asked(problem, 0.5, FLOAT32, FLOAT32) is None
    assert asked(problem, 0.5, BFLOAT16, FLOAT32) is not None
    for kernel in kernels(arch, lambda: ask(*given)):
        assert not kernel.asks("tf32")
        check(kernel, arch)


@pytest.mark.parametrize("arch", [90, 100], ids="sm_{}".format)
@pytest.mark.parametrize(
    "problem", [linear("", 4096, 1024, 1024), conv("", 64, 256, 256, 3)], ids=str
)
def test_without_a_fence_it_is_refused(arch, problem):
    """Whatever Triton is at hand: it writes fences, or ``supports`` is false."""
    given = asked(problem, 0.5, BFLOAT16, BFLOAT16)
    product, *_ = kernels(arch, lambda: ask(*given))
    assert product.asks(LARGE_MMA[arch])
    with mock.patch.object(fused, "archs", return_value={80, arch}):
        supported = asked(problem, 0.5, BFLOAT16, BFLOAT16) is not None
    assert supported == fused.fenced(arch)
    assert not (supported and sass.unfenced(product.ptx))
    bare = product.ptx.replace("fence.proxy.async", "//")
    assert sass.unfenced(bare), "the check finds nothing where there is no fence"


@pytest.mark.parametrize("version", [(3, 6), (3, 7), (3, 8), (4, 0)], ids=str)
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 103, 120])
def test_which_triton_is_trusted_where(arch, version, tf32_switch):
    with (
        mock.patch.object(fused, "triton_version", return_value=version),
        mock.patch.object(fused, "archs", return_value={arch}),
    ):
        problem = linear("", 4096, 1024, 1024)
        trusted = version >= (3, 8) or not 90 <= arch < 120
        assert (asked(problem, 0.5, BFLOAT16, BFLOAT16) is not None) == trusted
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert asked(problem, 0.5, FLOAT32, FLOAT32) is not None  # without tensor cores


def test_registers_under_a_product_are_watched():
    """Without its waits, the code that is right has faults."""
    given = asked(linear("", 16384, 1024, 4096), 0.5, BFLOAT16, BFLOAT16)
    code = kernels(90, lambda: ask(*given))[0].listing
    assert code.count(sass.WAIT) >= 2
    assert not sass.touched_too_early(code)
    early = sass.touched_too_early(code.without(sass.WAIT))
    a = {number for i in code.instructions if "HGMMA" in i.text for number in i.reads - i.writes}
    assert a, "no product takes A from registers"
    assert len(early) > 10


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_scattered_16_bit_sums_take_the_way_of_parts_on_hopper(bias):
    """Converted at once, they were read under the last product: the check found it."""
    problem = linear("", 16384, 768, 3072, column_major=True, bias=bias)
    given = asked(problem, 0.75, BFLOAT16, BFLOAT16)
    product, *_ = kernels(90, lambda: ask(*given))
    assert product.arguments["SPLIT"]
    check(product, 90)


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


ONES = [  # (samples, inputs, neurons): what Triton takes for a constant, as it is 1
    (1, 1, 1), (1, 64, 64), (64, 1, 64), (64, 64, 1), (4096, 1, 1), (1, 1, 64), (1, 64, 1),
]  # fmt: skip
IMAGES_OF_ONE = [  # x, kernel, neurons: channels, neurons, rows, columns or outputs of one
    ((2, 1, 9, 9), 3, 64), ((2, 64, 9, 9), 3, 1), ((2, 64, 1, 1), 1, 64), ((2, 64, 3, 3), 3, 64),
    ((1, 1, 1, 1), 1, 1), ((2, 64, 1, 9), 1, 64), ((2, 64, 9, 1), 1, 64),
]  # fmt: skip


def compiles(call, dtype):
    """Without a spill where tensor cores compute."""
    if dtype is FLOAT32:
        with launches(90) as compiled:
            call()
    else:
        compiled = kernels(90, call)
    assert compiled
    for kernel in compiled:
        assert not (fused.fenced(90) and sass.unfenced(kernel.ptx)), kernel


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("sizes", ONES, ids=str)
def test_linear_sizes_of_one(sizes, dtype):
    T, inputs, n = sizes
    shapes = (T, n), (T, inputs), (n, inputs)
    dy, x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    for layer in (weight, weight.t().contiguous().t()):
        for bias in (True, False):
            compiles(lambda w=layer, b=bias: ask(dy, x, w, 1, b, None), dtype)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("sizes", IMAGES_OF_ONE, ids=str)
def test_conv_sizes_of_one(sizes, dtype):
    shape, side, n = sizes
    geometry = Conv((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    weight = torch.empty(n, shape[1], side, side, dtype=dtype, device="meta")
    dy, x = (
        torch.empty(s, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        for s in (geometry.output(shape, weight), shape)
    )
    for layer in (weight, weight.to(memory_format=torch.channels_last)):
        compiles(lambda w=layer: ask(dy, x, w, 1, True, geometry), dtype)


@pytest.mark.parametrize(("wider", "copied"), [(2**12, True), (2**10, False)])
def test_a_slice_whose_strides_32_bits_do_not_count_is_copied(wider, copied):
    """64 channels of images with many more; the sizes alone are small."""
    side = 2**10
    strides = side**2 * wider, 1, side * wider, wider
    x = torch.empty_strided((2, 64, side, side), strides, dtype=BFLOAT16, device="meta")
    dy = torch.empty_like(x, memory_format=torch.channels_last)
    weight = torch.empty(64, 64, 3, 3, dtype=BFLOAT16, device="meta")
    geometry = Conv((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    product, *_ = kernels(90, lambda: ask(dy, x, weight, 32, False, geometry))
    sizes, given = (2, side, side), product.arguments["x_strides"]
    assert (
        sum((size + 1) * stride for size, stride in zip(sizes[1:], given[1:], strict=True)) < 2**31
    )
    assert (given == strides[:1] + strides[2:]) != copied
