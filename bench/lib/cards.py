"""GPUs by name, as far as arithmetic about kernels needs them. Nothing here was measured by neq.

Multiprocessors, rates of tensor cores and memory bandwidths are NVIDIA's: its white papers on the
A100, Hopper and Ada architectures, the data sheets of H100, H200 and HGX B200. The clock is the one
at which the stated rate is reached. Of the second-level cache NVIDIA states 5120 bytes per clock
for the A100. The other caches' rates are assumptions, and the first to be measured; microbenchmarks
of an H100 are at chipsandcheese.com/p/nvidias-h100-funny-l2-and-tons-of-bandwidth.

That products reach 0.8 of the tensor cores' rate (Gpu's properties) is near the best that others
measured in bfloat16: 792 of 989 TFLOP/s on an H100, 268 of 312 on an A100, and 1745 of 2250 on a
B200 (github.com/stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS").
That copies reach 0.9 of the bandwidth is an assumption. One account of reading matrices has 2.8
TB/s of an H100's 3.35, which is 0.84: mikamirai.com/blog/gpu-memory-bandwidth.
"""

from neq_kernels.device.gpu import CACHE, PRODUCTS, Gpu


def _card(arch: int, processors: int, clock: float, memory: float, products: int = 0) -> Gpu:
    return Gpu(arch, processors, clock, memory, products or PRODUCTS[arch], CACHE[arch])


CARDS = {
    "A100": _card(80, 108, 1.41, 2.04),
    "H100": _card(90, 132, 1.83, 3.35),
    "H200": _card(90, 132, 1.83, 4.8),
    "B200": _card(100, 148, 1.85, 8.0),
    "RTX 4090": _card(89, 128, 2.52, 1.01, products=256),
}


def card_of(name: str) -> str | None:
    """The card in a GPU's full name, such as NVIDIA H200."""
    return next((card for card in CARDS if card in name), None)
