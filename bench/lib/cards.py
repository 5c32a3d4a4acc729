"""GPUs by name, as far as arithmetic about kernels needs them. Nothing here was measured by neq.

Multiprocessors, rates of tensor cores and memory bandwidths are NVIDIA's: its white papers on the
A100, Hopper and Ada architectures, the data sheets of H100, H200 and HGX B200. The clock is the one
at which the stated rate is reached. Of the second-level cache NVIDIA states 5120 bytes per clock
for the A100. The other figures are assumptions, after published microbenchmarks: 5.5 to 7 TB/s on
an H100, 5 TB/s on an RTX 4090. They are the first to be measured.

That products reach 0.8 of the tensor cores' rate and copies 0.9 of the bandwidth (Gpu's properties)
is what one H200 did: 769 to 798 TFLOP/s of 989 for 8192 x 8192 x 8192 in bfloat16, 4.3 TB/s of 4.8.
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
