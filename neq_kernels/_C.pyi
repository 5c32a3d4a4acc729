# Addresses are those of Tensor.data_ptr(); 0 for sums asks for none.

class DType:
    float32: DType
    float64: DType
    bfloat16: DType
    float16: DType

has_cuda: bool

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
    all: list[tuple[int, ...]],  # of 9
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
    all: list[tuple[int, ...]],  # of 9
    counts: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    threads: int,
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
