# Addresses are those of Tensor.data_ptr(); 0 for sums or db asks for none.

from collections.abc import Sequence

class DType:
    float32: DType
    float64: DType
    bfloat16: DType
    float16: DType

class Isa:
    best: Isa
    avx512: Isa
    avx2: Isa
    portable: Isa

has_cuda: bool

def cpu_prefer_large_pages(begin: int, bytes: int) -> None: ...
def cpu_row_similarity(
    dtype: DType,
    y: int,
    strides: Sequence[int],
    dtype_: DType,
    y_: int,
    strides_: Sequence[int],
    sizes: Sequence[int],
    out: int,
    isa: Isa,
    threads: int,
) -> None: ...
def cpu_has_isa(isa: Isa) -> bool: ...
def cpu_linear_wgrad(
    dtype: DType,
    dy: int,
    dy_size: Sequence[int],
    dy_strides: Sequence[int],
    x: int,
    x_size: Sequence[int],
    x_strides: Sequence[int],
    dw: int,
    dw_size: Sequence[int],
    dw_strides: Sequence[int],
    db: int,
    rows: int,
    k: int,
    threads: int,
    split_for: int,
) -> None: ...
def cpu_conv_wgrad(
    dtype: DType,
    dy: int,
    dy_size: Sequence[int],
    dy_strides: Sequence[int],
    x: int,
    x_size: Sequence[int],
    x_strides: Sequence[int],
    dw: int,
    dw_size: Sequence[int],
    dw_strides: Sequence[int],
    db: int,
    rows: int,
    k: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    isa: Isa,
    threads: int,
    split_for: int,
) -> None: ...
def cpu_pack_columns(
    dtype: DType,
    dy: int,
    samples: int,
    neurons: int,
    stride: int,
    rows: int,
    k: int,
    packed: int,
    sums: int,
    threads: int,
) -> None: ...
def cpu_sgd_rows(
    dtype: DType,
    all: list[tuple[int, ...]],  # of 10
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    begin: bool,
    threads: int,
) -> None: ...
def cpu_adamw_rows(
    dtype: DType,
    all: list[tuple[int, ...]],  # of 10
    counts: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    threads: int,
) -> None: ...
def cuda_conv_wgrad(
    dtype: DType,
    dy: int,
    dy_size: Sequence[int],
    dy_strides: Sequence[int],
    x: int,
    x_size: Sequence[int],
    x_strides: Sequence[int],
    weight_dtype: DType,
    dw: int,
    dw_size: Sequence[int],
    dw_strides: Sequence[int],
    db: int,
    rows: int,
    k: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: Sequence[int],
    octets: int,
    slices: int,
    parts: int,
    partial_dw: int,
    partial_db: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_pack_scratch_bytes(dtype: DType, samples: int, k: int) -> int: ...
def cuda_pack_columns(
    dtype: DType,
    dy: int,
    samples: int,
    neurons: int,
    stride: int,
    rows: int,
    k: int,
    packed: int,
    sums: int,
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
