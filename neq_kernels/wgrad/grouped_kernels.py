"""The Triton kernels of ``grouped.py``: each value of dY meets its few inputs.

A neuron of a grouped convolution has so few weights that a thread holds a sum for each of them. A
lane is one neuron at one pixel of a tile. It reads its value of dY once. Then it reads, tap by tap,
the values of X that this pixel saw. Neighbouring pixels saw nearly the same values, so most of them
come from the first-level cache. Neighbouring lanes read neighbouring memory, along the neurons or
along the pixels.

The sum over pixels is cut into parts. ``finish`` adds them up, always in the same order,
and scatters them; behind the last active neuron it writes the zeros of the frozen ones. A compact
gradient has the active rows side by side, so there it scatters nothing.
"""

import triton
import triton.language as tl


# other masks and batches need no other kernel
# long: one loop and its set-up
@triton.jit(do_not_specialize=["T", "n", "k", "padded", "part"])
def correlate(
    dy,  # [images, n, height, width]
    x,  # [images, groups * INPUTS, H, W]
    order,  # int64 [n]: a permutation of the neurons, the active ones first
    dw,  # float32 [parts, padded, HEIGHT * WIDTH * INPUTS], inputs fastest
    db,  # float32 [parts, padded]
    T,  # pixels of dy
    n,
    k,  # active neurons
    padded,  # k rounded up to NEURONS
    part,  # pixels in one part, a multiple of PIXELS
    of_group,  # neurons in a group
    dy_strides,
    x_strides,
    x_size,  # H, W
    out_size,  # height, width
    stride,
    padding,
    dilation,  # each of rows, columns
    HEIGHT: tl.constexpr,  # of the convolution's kernel
    WIDTH: tl.constexpr,
    INPUTS: tl.constexpr,  # channels that a neuron reads
    BIAS: tl.constexpr,
    NEURONS: tl.constexpr,  # of a tile
    PIXELS: tl.constexpr,  # of a tile
    CHANNELS_LAST: tl.constexpr,
):
    lane = tl.arange(0, NEURONS * PIXELS)
    j = tl.program_id(0) * NEURONS + (lane % NEURONS if CHANNELS_LAST else lane // PIXELS)
    step = lane // NEURONS if CHANNELS_LAST else lane % PIXELS
    row = tl.load(order + tl.minimum(j, n - 1))
    start = tl.program_id(1) * tl.full((), part, tl.int64)
    left = tl.minimum(T - start, part).to(tl.int32)
    # a sample is a pixel (image, y, x) of the output, advanced by carries instead of divisions
    height, width = out_size
    pixel = (start + step).to(tl.int32)
    out_x = pixel % width
    out_y = pixel // width % height
    image = (pixel // width // height).to(tl.int64)
    dy_at = dy + row * dy_strides[1]
    x_at = x + row // of_group * INPUTS * x_strides[1]

    totals = (tl.zeros((NEURONS * PIXELS,), tl.float32),) * (HEIGHT * WIDTH * INPUTS)
    sums = tl.zeros((NEURONS * PIXELS,), tl.float32)
    for done in range(0, left, PIXELS):
        there = (step < left - done) & (j < k)
        at = image * dy_strides[0] + out_y * dy_strides[2] + out_x * dy_strides[3]
        value = tl.load(dy_at + at, mask=there, other=0.0).to(tl.float32)
        in_y = out_y * stride[0] - padding[0]
        in_x = out_x * stride[1] - padding[1]
        at = image * x_strides[0] + in_y * x_strides[2] + in_x * x_strides[3]
        more = ()
        for i in tl.static_range(HEIGHT * WIDTH * INPUTS):
            y = i // (WIDTH * INPUTS) * dilation[0]
            x_ = i // INPUTS % WIDTH * dilation[1]
            # as unsigned numbers, places before the image are far behind it
            inside = there & ((in_y + y).to(tl.uint32) < x_size[0])
            inside &= (in_x + x_).to(tl.uint32) < x_size[1]
            tap_at = y * x_strides[2] + x_ * x_strides[3] + i % INPUTS * x_strides[1]
            read = tl.load(x_at + (at + tap_at), mask=inside, other=0.0).to(tl.float32)
            more += (totals[i] + value * read,)  # type: ignore[assignment]
        totals = more
        if BIAS:
            sums += value
        out_x += PIXELS % width
        carry = (out_x >= width).to(tl.int32)
        out_x -= carry * width
        out_y += PIXELS // width % height + carry
        carry = (out_y >= height).to(tl.int32)
        out_y -= carry * height
        image += PIXELS // width // height + carry

    j = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    to = (tl.program_id(1) * padded + j).to(tl.int64)
    for i in tl.static_range(HEIGHT * WIDTH * INPUTS):
        total = _of_each_neuron(totals[i], NEURONS, PIXELS, CHANNELS_LAST)
        tl.store(dw + to * (HEIGHT * WIDTH * INPUTS) + i, total)
    if BIAS:
        tl.store(db + to, _of_each_neuron(sums, NEURONS, PIXELS, CHANNELS_LAST))


@triton.jit
def _of_each_neuron(
    total, NEURONS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Lanes summed to [NEURONS]."""
    if CHANNELS_LAST:
        return tl.sum(tl.reshape(total, (PIXELS, NEURONS)), 0)
    return tl.sum(tl.reshape(total, (NEURONS, PIXELS)), 1)


@triton.jit(do_not_specialize=["m", "k", "parts", "padded"])  # masks change these
def finish(
    partial_dw,  # float32 [parts, padded, columns]
    partial_db,  # float32 [parts, padded]
    order,  # int64 [n]
    dw,  # [m, kernel height, kernel width, C]
    db,  # [m]
    m,  # n, or fewer of a compact gradient
    k,
    parts,
    padded,
    C,
    columns,
    dw_strides,
    kernel_width,
    BIAS: tl.constexpr,
    COMPACT: tl.constexpr,
    PARTS: tl.constexpr,  # how many parts to read at a time, so that not each is waited for
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = j if COMPACT else tl.load(order + j, mask=j < m)
    inside = (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (j < k)[None, :]
        at = (part[:, None] * padded + j[None, :]).to(tl.int64)[:, :, None] * columns
        at += column[None, None, :]
        read = tl.load(partial_dw + at, mask=there[:, :, None] & inside[None, :, :], other=0.0)
        total += tl.sum(read, 0)
    dw_at = _weight_at(row, column, C, kernel_width, dw_strides)
    tl.store(dw + dw_at, total.to(dw.dtype.element_ty), mask=(j < m)[:, None] & inside)
    if BIAS:
        if tl.program_id(1) == 0:
            bias = tl.zeros((ROWS,), tl.float32)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS)
                there = (part < parts)[:, None] & (j < k)[None, :]
                at = part[:, None] * padded + j[None, :]
                bias += tl.sum(tl.load(partial_db + at, mask=there, other=0.0), 0)
            tl.store(db + row, bias.to(db.dtype.element_ty), mask=j < m)


@triton.jit
def _weight_at(row, column, C, kernel_width, strides):
    """Where weights lie: [rows, columns]. A column is (kernel row, kernel column, channel)."""
    tap = column // C
    along = tap // kernel_width * strides[1] + tap % kernel_width * strides[2]
    return (row.to(tl.int64) * strides[0])[:, None] + (along + column % C * strides[3])[None, :]
