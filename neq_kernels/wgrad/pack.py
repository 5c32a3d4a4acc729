"""Pack the active rows of dY, let the vendor compute their gradient, place it in dW.

On a GPU one launch places dW and db, with zeros elsewhere. A compact gradient needs no placing.

Rows are packed in whole granules, since a vendor's kernel takes as long for the next multiple of
its tile. The surplus rows are frozen ones: they are computed and then dropped.
"""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from neq_kernels import _torch
from neq_kernels.device import extension, names
from neq_kernels.device.extension import fresh_like
from neq_kernels.shapes import as_matrix, ceil_div
from neq_kernels.wgrad import bounds
from neq_kernels.wgrad.columns import pack_columns
from neq_kernels.wgrad.dense import channel_sum, compact, unit, vendor_conv_wgrad
from neq_kernels.wgrad.geometry import Conv, is_compact
from neq_kernels.wgrad.problem import Problem


class Processor(NamedTuple):
    """Rough speeds of a kind of CPU, from which to tell whether packing pays."""

    relative_time: float  # of a packed row; 1.0 is that of a row in the dense gradient
    # FLOPs done in the time for one byte:
    dy_flops: float  # to pack it in dY
    x_flops: float  # to read it in X, for fewer rows
    dw_flops: float  # to scatter it in dW
    call_flops: float  # FLOPs done in the time of the additional calls


# rows that the vendor's kernels compute in one piece
GRANULE = {"cpu": 16, "cuda": bounds.GRANULE}
PROCESSOR = Processor(1.1, 4, 8, 15, 40e6)  # docs/notes/cpu-wgrad.md#the-cost-models
# The FLOPs are the vendor's, which take twice the time there (native.COSTS): fewer fit in.
PROCESSORS = {("AMD", "AVX512"): Processor(1.1, 2, 4, 15, 20e6)}

# In 16 bits, matrix instructions of newer CPUs do so many times more FLOPs in the same time.
HALF_PRECISION_FLOPS = 6


def supports(problem: Problem) -> bool:
    """Linear layers and ungrouped convolutions; on a CPU depthwise convolutions too."""
    if problem.device not in GRANULE or problem.flops == 0:
        return False  # an empty batch
    if problem.conv is None or problem.groups == 1:
        return True
    # in other grouped convolutions, the active rows make groups of unequal sizes
    depthwise = problem.groups == problem.neurons == problem.x[1]
    return depthwise and not problem.conv.transposed and problem.device == "cpu"


def cost(problem: Problem) -> float:
    """The time to compute the packed rows, to pack dY and to scatter dW."""
    if problem.device == "cuda":
        return bounds.relative(problem, bounds.pack)
    cpu = PROCESSORS.get(names.processor(), PROCESSOR)
    share = _granules(problem.k, problem.neurons, problem.device) / problem.neurons
    scattering = 0.0 if problem.compact else cpu.dw_flops * prod(problem.weight)
    if problem.groups > 1:
        # X is packed too; the vendor's time is that to read both
        return 1.2 * share + 0.8 if problem.channels_last else 1.4 * share + 0.3
    moving = cpu.x_flops * prod(problem.x) + (1 + share) * (
        cpu.dy_flops * prod(problem.dy) + scattering
    )
    moving *= problem.dtype.itemsize
    if problem.dtype.itemsize < 4:
        moving *= HALF_PRECISION_FLOPS
    computing = cpu.relative_time * share * problem.flops
    return (computing + moving + cpu.call_flops) / unit(problem)


def _granules(k: int, most: int, device: str) -> int:
    """How many rows to pack for ``k`` active ones: ``most`` are all that the weight has."""
    granule = GRANULE[device]
    return min(ceil_div(k, granule) * granule, most)


def linear_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool
) -> tuple[Tensor, Tensor]:
    dy, x = as_matrix(dy), as_matrix(x)
    packed = _granules(k, len(weight), dy.device.type)
    dy_packed, db = pack_columns(dy, order[:packed], bias)  # [T, packed]
    # [packed, inputs], stored as the weight is
    dw = (x.t() @ dy_packed).t() if weight.stride(0) == 1 else dy_packed.t() @ x
    return _placed(weight, order, k, None, dw, db)


def conv_wgrad(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, k: int, bias: bool, conv: Conv
) -> tuple[Tensor, Tensor]:
    neurons = int(conv.transposed)  # the dimension that counts them
    packed = _granules(k, weight.shape[neurons], dy.device.type)
    dy_packed, db = _pack_channels(dy, order[:packed], bias)
    if conv.groups > 1:  # depthwise: a neuron reads the channel of X with the same number
        x, _ = _pack_channels(x, order[:packed], False)
        conv = conv._replace(groups=packed)
    dw = vendor_conv_wgrad(dy_packed, x, weight.narrow(neurons, 0, packed), conv)
    return _placed(weight, order, k, conv, dw, db)


def _pack_channels(t: Tensor, rows: Tensor, want_sums: bool) -> tuple[Tensor, Tensor | None]:
    """``t[:, rows]`` in the layout of t [N, channels, *pixels], and its sums [rows] if wanted."""
    channels_last = t.movedim(1, -1)
    if channels_last.is_contiguous():
        # the channels are adjacent: [T, channels] -> [T, rows]
        columns, sums = pack_columns(channels_last.flatten(0, -2), rows, want_sums)
        return columns.view(*channels_last.shape[:-1], len(rows)).movedim(-1, 1), sums
    packed = t.index_select(1, rows)
    return packed, channel_sum(packed, extension.sum_dtype(packed)) if want_sums else None


def _placed(
    weight: Tensor,
    order: Tensor,
    k: int,
    conv: Conv | None,
    dw_packed: Tensor,
    db_packed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dW and db from those of the packed rows, of which the first ``k`` are active."""
    neurons = int(conv is not None and conv.transposed)  # the dimension that counts them
    if is_compact(weight, len(order), conv):
        db = None if db_packed is None else db_packed[:k]
        return compact(weight, dw_packed.narrow(neurons, 0, k), db, neurons)
    placed = _placed_on_gpu(weight, order, k, neurons, dw_packed, db_packed)
    if placed is not None:
        return placed
    rows = order[:k]
    dw_active = dw_packed.narrow(neurons, 0, k).to(weight.dtype)
    dw = fresh_like(weight, weight.dtype).zero_().index_copy_(neurons, rows, dw_active)
    if db_packed is None:
        return dw, weight.new_empty(0)
    db = weight.new_zeros(len(order)).index_copy_(0, rows, db_packed[:k].to(weight.dtype))
    return dw, db


def _placed_on_gpu(
    weight: Tensor, order: Tensor, k: int, dim: int, dw_packed: Tensor, db_packed: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """dW and db by the compiled kernel; None if it can't. ``dim`` counts the neurons."""
    device = extension.gpu_of(weight)
    if device is None or not {weight.dtype, dw_packed.dtype} <= extension.DTYPES:
        return None
    dw = torch.empty_like(weight)
    db = weight.new_empty(0 if db_packed is None else len(order))
    to = dw, None if db_packed is None else db, dim, order.contiguous(), k, device
    done = extension._C.cuda_place_rows(dw_packed, db_packed, *to, _torch.current_stream(device))
    return (dw, db) if done else None
