"""The Triton kernels of ``fused.py``: a matrix product that gathers its rows as it reads them.

dW[rows] = dY[:, rows]ᵀ X is computed in tiles of ROWS active neurons by COLUMNS weights. A tile
walks the samples in steps of DEPTH, with a few steps under way at a time. An asynchronous copy
moves 4 bytes or more. So for a 16-bit dY the aligned pair that holds an active neuron is copied,
and its half is picked between shared memory and the tensor cores.

The sum over samples is long and dW is small, so the sum is cut into parts. ``product`` leaves one
partial dW per part. ``finish`` adds them up, always in the same order, and scatters the result.
With one part ``product`` scatters by itself. In both cases the tiles behind the last active neuron
write the zeros of the frozen ones.
"""

import triton
import triton.language as tl


# other masks need no other kernel
# long: one loop and its set-up
@triton.jit(do_not_specialize=["k"])
def product(
    dy,  # [T, n], neurons adjacent; T counts the output's pixels: image, row, column
    #      PAIRS: int32 [T, n / 2], two neurons in each
    x,  # [images, H, W, C], channels adjacent; EVEN: pixels are those of dy, x_strides[2] apart
    order,  # int64 [n]: a permutation of the neurons, the active ones first
    dw,  # [n, kernel height, kernel width, C]; SPLIT: float32 [parts, padded, columns]
    db,  # [n]; SPLIT: float32 [parts, padded]
    T,
    n,
    k,  # active neurons; padded is k rounded up to ROWS
    C,
    columns,  # weights of one neuron: kernel height * kernel width * C, channels fastest
    part,  # samples in one part, a multiple of DEPTH
    dy_stride,  # between samples
    x_strides,  # between images, rows, columns
    dw_strides,  # between neurons, kernel rows, kernel columns, channels
    x_size,  # H, W
    out_size,  # dy's rows and columns
    kernel_width,
    stride,
    padding,
    dilation,  # each of rows, columns
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # one register each; surplus lanes gather values that are never stored
    row = tl.load(order + tl.minimum(j, n - 1)).to(tl.int32)
    step = tl.arange(0, DEPTH)
    start = tl.program_id(2) * tl.full((), part, tl.int64)
    left = tl.minimum(T - start, part).to(tl.int32)
    if tl.program_id(0) * ROWS >= k:
        left = 0  # only frozen neurons: nothing to add up

    dy_step = DEPTH * tl.full((), dy_stride, tl.int64)
    dy_at = dy + (start + step)[:, None] * dy_stride + (row // 2 if PAIRS else row)[None, :]
    if EVEN:
        x_step = DEPTH * tl.full((), x_strides[2], tl.int64)
        x_at = x + (start + step)[:, None] * x_strides[2] + column[None, :]
    else:
        # a sample is a pixel (image, y, x) of the output, advanced by carries instead of divisions
        height, width = out_size
        pixel = (start + step).to(tl.int32)
        out_x = pixel % width
        out_y = pixel // width % height
        image = pixel // width // height
        tap = column // C
        tap_y = tap // kernel_width * dilation[0]
        tap_x = tap % kernel_width * dilation[1]
        tap_at = tap_y * x_strides[1] + tap_x * x_strides[2] + column % C

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.zeros((DEPTH, ROWS), tl.float32)
    for done in range(0, left, DEPTH):
        there = (step < left - done)[:, None] & (column < columns)[None, :]
        if EVEN:
            read = tl.load(x_at, mask=there, other=0.0)  # [DEPTH, COLUMNS]
            x_at += x_step
        else:
            in_y = out_y * stride[0] - padding[0]
            in_x = out_x * stride[1] - padding[1]
            pixel_at = image.to(tl.int64) * x_strides[0] + in_y * x_strides[1] + in_x * x_strides[2]
            # as unsigned numbers, places before the image are far behind it
            there &= (in_y[:, None] + tap_y[None, :]).to(tl.uint32) < x_size[0]
            there &= (in_x[:, None] + tap_x[None, :]).to(tl.uint32) < x_size[1]
            read = tl.load(x + (pixel_at[:, None] + tap_at[None, :]), mask=there, other=0.0)
            out_x += DEPTH % width
            carry = (out_x >= width).to(tl.int32)
            out_x -= carry * width
            out_y += DEPTH // width % height + carry
            carry = (out_y >= height).to(tl.int32)
            out_y -= carry * height
            image += DEPTH // width // height + carry
        gathered = tl.load(dy_at, mask=(step < left - done)[:, None], other=0)  # [DEPTH, ROWS]
        dy_at += dy_step
        if PAIRS:
            half = gathered >> (row % 2 * 16)[None, :]
            gathered = half.to(tl.int16).to(x.dtype.element_ty, bitcast=True)
        total = tl.dot(tl.trans(gathered), read, total, input_precision="ieee")
        if BIAS:
            if tl.program_id(1) == 0:
                sums += gathered

    if SPLIT:
        padded = (k + ROWS - 1) // ROWS * ROWS
        kept = j < padded
        to = (tl.program_id(2) * padded + j).to(tl.int64)
        dw_at = (to * columns)[:, None] + column[None, :]
    else:
        kept = j < n
        to = row
        dw_at = _weight_at(row, column, C, kernel_width, dw_strides)
        total = tl.where((j < k)[:, None], total, 0.0)
    stored = kept[:, None] & (column < columns)[None, :]
    tl.store(dw + dw_at, total.to(dw.dtype.element_ty), mask=stored)
    if BIAS:
        if tl.program_id(1) == 0:
            bias = tl.where(j < k, tl.sum(sums, 0), 0.0)
            tl.store(db + to, bias.to(db.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["k", "parts", "padded"])  # masks change these
def finish(
    partial_dw,  # float32 [parts, padded, columns]
    partial_db,  # float32 [parts, padded]
    order,  # int64 [n]
    dw,  # [n, kernel height, kernel width, C]
    db,  # [n]
    n,
    k,
    parts,
    padded,
    C,
    columns,
    dw_strides,
    kernel_width,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,  # how many parts to read at a time, so that not each is waited for
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(order + j, mask=j < n)
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
    tl.store(dw + dw_at, total.to(dw.dtype.element_ty), mask=(j < n)[:, None] & inside)
    if BIAS:
        if tl.program_id(1) == 0:
            bias = tl.zeros((ROWS,), tl.float32)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS)
                there = (part < parts)[:, None] & (j < k)[None, :]
                at = part[:, None] * padded + j[None, :]
                bias += tl.sum(tl.load(partial_db + at, mask=there, other=0.0), 0)
            tl.store(db + row, bias.to(db.dtype.element_ty), mask=j < n)


@triton.jit
def _weight_at(row, column, C, kernel_width, strides):
    """Where weights lie: [rows, columns]. A column is (kernel row, kernel column, channel)."""
    tap = column // C
    along = tap // kernel_width * strides[1] + tap % kernel_width * strides[2]
    return (row.to(tl.int64) * strides[0])[:, None] + (along + column % C * strides[3])[None, :]
