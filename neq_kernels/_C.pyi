# The functions check devices, dtypes and sizes of tensors, and on the CPU the range of rows and
# orders. rows [k] are the indices of the active neurons; order [n] is the permutation of all, with
# the k active ones first.

from collections.abc import Sequence

from torch import Tensor

class Isa:
    best: Isa
    avx512: Isa
    avx2: Isa
    portable: Isa

has_cuda: bool

def cpu_has_isa(isa: Isa) -> bool: ...
def cpu_prefer_large_pages(t: Tensor) -> None: ...
def cpu_zero_rows(t: Tensor, rows: Tensor, dim: int, threads: int) -> bool: ...
def cpu_pack_columns(
    dy: Tensor, rows: Tensor, packed: Tensor, sums: Tensor | None, threads: int
) -> None: ...
def cpu_row_similarity(y: Tensor, y_: Tensor, out: Tensor, isa: Isa, threads: int) -> None: ...
def cpu_linear_wgrad(
    dy: Tensor,
    x: Tensor,
    dw: Tensor,
    db: Tensor,
    order: Tensor,
    k: int,
    threads: int,
    split_for: int,
) -> None: ...
def cpu_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    dw: Tensor,
    db: Tensor,
    order: Tensor,
    k: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    isa: Isa,
    threads: int,
    split_for: int,
) -> None: ...

# lists: params, grads, momentum_buffers (or []), orders, counts
def cpu_sgd_rows(
    lists: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    threads: int,
) -> None: ...

# lists: params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs (or []), steps, orders, counts
def cpu_adamw_rows(
    lists: tuple[
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
        list[Tensor],
    ],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    threads: int,
) -> None: ...
def cuda_pack_scratch_bytes(dy: Tensor, k: int) -> int: ...
def cuda_pack_columns(
    dy: Tensor,
    rows: Tensor,
    packed: Tensor,
    sums: Tensor | None,
    scratch: Tensor,
    device: int,
    stream: int,
) -> None: ...
def cuda_zero_rows(
    dw: Tensor, dim: int, db: Tensor | None, rows: Tensor, device: int, stream: int
) -> bool: ...
def cuda_place_rows(
    rows: Tensor,
    sums: Tensor | None,
    dw: Tensor,
    db: Tensor | None,
    dim: int,
    order: Tensor,
    k: int,
    device: int,
    stream: int,
) -> bool: ...
def cuda_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    dw: Tensor,
    db: Tensor,
    order: Tensor,
    k: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: Sequence[int],
    octets: int,
    slices: int,
    parts: int,
    partial_dw: Tensor,
    partial_db: Tensor,
    device: int,
    stream: int,
) -> None: ...
