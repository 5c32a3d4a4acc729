"""Models of ways to compute a weight gradient on a GPU, beside those that the planner asks.

``dense`` and ``pack`` are in ``neq_kernels.wgrad.bounds``, whose words these use. Counts of
instructions were read in machine code for compute capability 9.0. A kernel of our own that no GPU
has run is taken to reach ``OWN_SHARE`` of what bounds it. For two designs there is a better guess:

- ``granular`` is a plain product in Triton. It reads its tiles without multicast, so the bytes from
  the second-level cache bound it at two thirds of a Hopper's tensor cores. That rate is one that
  kernels were seen to reach, so nothing is taken off once more.
- ``cluster``, for Hoppers, shares its tiles between multiprocessors as the vendor does. It is
  modelled twice: with the vendor's share of the tensor cores, 0.8, and with 0.7.

``gathering``, ``granular`` and ``cluster`` are not built: docs/notes/not-built.md and
docs/notes/scattered-product.md.
"""

from functools import partial
from math import prod
from typing import NamedTuple
from unittest import mock

import torch

from bench.lib.cards import CARDS
from bench.lib.problems import Problem
from neq_kernels.device.gpu import MATRIX_SHARE, Gpu
from neq_kernels.shapes import ceil_div
from neq_kernels.wgrad import bounds, planner
from neq_kernels.wgrad.bounds import DRIVER, Kernel, Layer, Plan, dense, pack
from neq_kernels.wgrad.geometry import Conv
from neq_kernels.wgrad.problem import BUCKETS

OWN_SHARE = 0.6
VENDORS_SHARE = 1.0  # Gpu's properties have what a vendor's kernels reach
BYTES = 2  # of an element
GRANULE = 16  # neurons
CLUSTER_COLUMNS = 1024  # below, dY's bytes bound all that scattered neurons can gain
# microseconds of the CPU (bench/launch_overhead.py)
GATHERING_HOST, NARROW_HOST, GROUPED_HOST, ZERO_HOST = 53.0, 18.0, 42.0, 5.0
CLUSTER_HOST = NARROW_HOST  # a compiled binding too


class Shape(NamedTuple):
    """What a layer's sizes leave out."""

    taps: int  # places of the kernel
    groups: int


def layer_of(problem: Problem, active: float, granule: int) -> Layer:
    """With a share of its neurons active; in granules if it has whole ones."""
    granule = 1 if problem.neurons % granule else granule
    k = max(granule, round(active * problem.neurons / granule) * granule)
    samples, columns = problem.dy[0] * prod(problem.dy[2:]), prod(problem.weight[1:])
    sizes = samples, problem.neurons, columns, prod(problem.x), BYTES
    return Layer(*sizes, problem.bias, min(k, problem.neurons), granule)


def posed(problem: Problem, active: float) -> planner.Problem:
    """The layer with a share of its neurons active, as the planner sees it on a GPU."""
    conv = None
    if problem.kernel:
        stride, padding, dilation = ((n, n) for n in (problem.stride, problem.padding, 1))
        conv = Conv(stride, padding, dilation, False, (0, 0), problem.groups)
    return planner.Problem(
        problem.op,
        "cuda",
        torch.bfloat16,
        problem.dy,
        problem.x,
        problem.weight,
        channels_last=conv is not None,
        conv=conv,
        bucket=ceil_div(max(1, round(active * problem.neurons)) * BUCKETS, problem.neurons),
        column_major=problem.column_major,
        bias=problem.bias,
    )


def planned(problem: Problem, active: float, card: str) -> str:
    """The planner's choice on a machine with this card, where nothing was measured."""
    with mock.patch.object(bounds, "gpus", return_value={CARDS[card]}):
        return planner.predict(posed(problem, active))


def own(*kernels: Kernel, host: float, share: float = OWN_SHARE) -> Plan:
    """Kernels of our own, which reach a share of what bounds them."""
    scaled = [Kernel(*(amount / share for amount in kernel)) for kernel in kernels]
    return Plan(scaled, host + len(kernels) * DRIVER)


def masked(layer: Layer, gpu: Gpu) -> Plan:
    """The dense gradient, then zeros in the frozen rows of dW and db, in one launch."""
    kernels, host = dense(layer, gpu)
    zeros = Kernel(memory=(1 - layer.active) * layer.dw_bytes)
    return Plan([*kernels, zeros], host + ZERO_HOST + DRIVER)


def _gathered(layer: Layer, rows: int, columns: int, slots: float) -> Kernel:
    """A product in tiles, each of which reads its own rows of dY, and whole sectors for them.

    ``slots``: of each of the four schedulers, for 32 samples of a tile.
    """
    tiles = ceil_div(layer.k, rows) * ceil_div(layer.columns, columns)
    sectors = layer.sectors(layer.k)
    dy = min(rows, layer.k) / layer.active * sectors  # elements that a tile reads of a sample
    return Kernel(
        flops=2 * layer.samples * tiles * rows * columns,
        slots=4 * slots * tiles * layer.samples / 32,
        memory=layer.x_bytes + sectors * layer.dy_bytes + layer.dw_bytes,
        cache=tiles * (dy + columns) * layer.samples * layer.size,
    )


def _finish(layer: Layer, columns: int, gpu: Gpu) -> Kernel:
    """Zeros in frozen rows. Of few tiles each is cut into parts, whose float32 sums are added."""
    tiles = ceil_div(layer.k, 128) * ceil_div(layer.columns, columns)
    if tiles >= gpu.processors:
        return Kernel(memory=(1 - layer.active) * layer.dw_bytes)
    parts = ceil_div(gpu.processors, tiles)
    return Kernel(memory=2 * 4 * parts * layer.k * layer.columns + layer.dw_bytes)


def gathering(layer: Layer, shape: Shape, gpu: Gpu) -> Plan | None:
    """A product that gathers scattered rows in pairs, and picks them in registers."""
    if shape.groups > 1:
        return None
    # with a bias there are no registers for the wider tile
    wide = not layer.bias and layer.columns > 128 and gpu.arch >= 90
    slots = {(True, False): 322, (False, False): 304, (True, True): 622, (False, True): 454}
    kernel = _gathered(layer, 128, 256 if wide else 128, slots[wide, shape.taps > 1])
    return own(kernel, _finish(layer, 256 if wide else 128, gpu), host=GATHERING_HOST)


def granular(layer: Layer, shape: Shape, gpu: Gpu) -> Plan | None:
    """A product for granules: dY comes in pieces of 16 bytes, as X does."""
    if shape.groups > 1 or layer.granule < GRANULE:
        return None
    columns = 256 if layer.columns > 128 else 128
    kernel, finish = _gathered(layer, 128, columns, 200), _finish(layer, columns, gpu)
    return own(kernel, finish, host=GATHERING_HOST, share=VENDORS_SHARE)


def cluster(layer: Layer, shape: Shape, gpu: Gpu, share: float = VENDORS_SHARE) -> Plan | None:
    """A product of warps with roles. Four multiprocessors share what they read, two and two.

    For 64 samples of a tile, a multiprocessor gathers half of its 128 rows: each value is loaded,
    half of them are joined, and 16 bytes are sent to two of them.
    """
    if shape.groups > 1 or gpu.arch != 90 or layer.columns < CLUSTER_COLUMNS:
        return None
    values = 64 * 64 / 32  # for a lane
    slots = values * (1 + 1 + 1 / 2 + 2 / 8)  # loads, addresses, joins, sends
    whole = _gathered(layer, 128, 256, slots / 4 / 2)  # of each scheduler, for 32 samples
    kernel = whole._replace(cache=whole.cache / 2)
    return own(kernel, _finish(layer, 256, gpu), host=CLUSTER_HOST, share=share)


def narrow(layer: Layer, shape: Shape, gpu: Gpu) -> Plan | None:
    """X and dY once for all taps and 32 rows.

    For 16 pixels of one to four octets of rows a warp takes 60, 85, 107 or 129 instructions, and to
    copy 512 bytes 25.
    """
    channels = layer.columns // shape.taps
    fits = shape.groups == 1 and 1 < shape.taps <= 36 and max(channels, layer.neurons) <= 128
    if not fits or channels % 8 or layer.neurons % 8:
        return None
    of_rows = ceil_div(layer.k, 32)
    octets = ceil_div(layer.k, 8 * of_rows)
    slices = ceil_div(channels, 16)
    depth = ceil_div(slices, ceil_div(slices, 36 // shape.taps))  # slices of a block
    blocks = of_rows * ceil_div(slices, depth)
    warps = min(w for w in (1, 2, 4) if 9 * w >= shape.taps * depth)
    moved = layer.x_bytes + layer.dy_bytes
    loop = (60, 85, 107, 129)[octets - 1]
    sums = 2 * gpu.processors / blocks * layer.k * layer.columns * 4  # of all parts, in float32
    kernel = Kernel(
        slots=blocks * (layer.samples / 16 * warps * loop + moved / 512 * 25),
        memory=moved + sums,
        cache=blocks * moved,
    )
    return own(kernel, Kernel(memory=sums + layer.dw_bytes), host=NARROW_HOST)


def grouped(layer: Layer, shape: Shape, gpu: Gpu) -> Plan | None:
    """For 32 values of dY a warp takes 80 instructions, and 8 for each weight of a neuron."""
    if shape.groups == 1 or layer.columns > 64:
        return None
    kernel = Kernel(
        slots=layer.samples * layer.k / 32 * (80 + 8 * layer.columns),
        memory=layer.sectors(layer.k) * (layer.dy_bytes + layer.x_bytes),
    )
    return own(kernel, Kernel(memory=layer.dw_bytes), host=GROUPED_HOST)


NOT_BUILT = {
    "gathering": gathering,
    "granular": granular,
    "cluster": cluster,
    "cluster at .7": partial(cluster, share=0.7 / MATRIX_SHARE),
}
OWN = {"narrow": narrow, "grouped": grouped, **NOT_BUILT}


def plans(problem: Problem, active: float, granule: int, gpu: Gpu) -> dict[str, Plan]:
    """By the name of the backend or design; "dense" has no frozen rows."""
    layer = layer_of(problem, active, granule)
    shape = Shape(prod(problem.weight[2:]), problem.groups)
    found = {"dense": dense(layer, gpu), "masked": masked(layer, gpu)}
    if shape.groups == 1:
        found["pack"] = pack(layer, gpu)
    of_own = {name: design(layer, shape, gpu) for name, design in OWN.items()}
    return found | {name: plan for name, plan in of_own.items() if plan is not None}


def floor(problem: Problem, active: float, granule: int, gpu: Gpu) -> float:
    """Microseconds that no kernel beats: each byte and each product once, in one launch."""
    layer = layer_of(problem, active, granule)
    kernel = Kernel(
        flops=2 * layer.samples * layer.k * layer.columns,
        memory=layer.x_bytes + layer.sectors(layer.k) * layer.dy_bytes + layer.dw_bytes,
    )
    return kernel.time(gpu)[0]
