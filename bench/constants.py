"""The constants of a GPU from which the roofline follows, measured: what to look at first.

    python bench/constants.py --json FILE

A vendor's product of dY and X in bfloat16, 16384 samples, as a weight gradient takes it; a copy in
memory, and one that the second-level cache holds; packing half of dY's neurons, scattered and in
granules of 16. Beside each is what bench/lib/cards.py or the GPU itself makes of it: modelled. A
copy reads and writes, and both count. On a CPU it runs too, on smaller tensors, with no model.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import cli, results
from bench.lib.cards import CARDS, card_of
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import cache_bytes, interleave
from neq_kernels.device.gpu import Gpu, gpu
from neq_kernels.wgrad.columns import pack_columns

WIDTHS = 1024, 4096  # neurons, and inputs
SAMPLES = 16384
GRANULE = 16
ON_A_CPU = 16  # times smaller, in samples

Call = Callable[[], object]
Amount = tuple[float, float, str]  # of a call; by the model, that of a microsecond; its unit


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    facts = environment(given.device)
    results.show_environment(facts)
    rows = measure(given.device, given.seconds)
    results.save(rows, facts, given.json)
    table = results.new_table(("what", "unit"), ("measured", "modelled", "share"))
    for row in rows:
        measured, modelled = row["measured"], row["modelled"]
        share = measured / modelled if modelled else None
        figures = (results.cell(value) for value in (measured, modelled or None, share))
        table.add_row(row["name"], row["unit"], *figures)
    results.show_table(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_device(parser)
    cli.add_seconds(parser, 5, "all of it")
    cli.add_json(parser)
    return parser.parse_args(arguments)


def measure(device: torch.device, seconds: float) -> list[Result]:
    """A row for each constant, in TFLOP/s or TB/s."""
    calls: dict[str, Call] = {}
    amounts: dict[str, Amount] = {}
    for name, call, amount in constants(device):
        calls[name], amounts[name] = call, amount
    turns = {name: (lambda turn, call=call: call()) for name, call in calls.items()}
    times = interleave(turns, device, seconds)
    return [
        {
            "name": name,
            "unit": amounts[name][2],
            # an amount of a microsecond is a millionth of that of a second, and tera is 1e12
            "measured": amounts[name][0] / times[name].p50 / 1e9,
            "modelled": amounts[name][1] / 1e6,
            "p20_ms": times[name].p20,
            "p50_ms": times[name].p50,
            "p80_ms": times[name].p80,
        }
        for name in calls
    ]


def constants(device: torch.device) -> Iterator[tuple[str, Call, Amount]]:
    """Names, calls, and what one call does."""
    of, samples = known(device), SAMPLES // (1 if device.type == "cuda" else ON_A_CPU)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).bfloat16()

    for width in WIDTHS:
        dy, x = random(samples, width), random(samples, width)  # [T, n] and [T, inputs]
        flops = 2.0 * samples * width**2, of.flops, "TFLOP/s"
        yield f"product, {width} neurons and inputs", lambda dy=dy, x=x: dy.t() @ x, flops
    # [T, n] of the last width, larger than any cache; and a piece of it that a cache holds twice
    fits = dy.flatten()[: min(dy.numel(), cache_bytes(device) // 8)]
    for name, t, speed in ("memory", dy, of.memory_bytes), ("cache", fits, of.cache_bytes):
        to, moved = torch.empty_like(t), 2.0 * t.nbytes
        yield f"copy, {name}", lambda t=t, to=to: to.copy_(t), (moved, speed, "TB/s")
    n, half = width, width // 2
    packed = 2.0 * samples * half * dy.element_size(), of.memory_bytes, "TB/s"  # half read, written
    scattered = torch.randperm(n, device=device)[:half].sort().values
    starts = GRANULE * torch.randperm(n // GRANULE, device=device)[: half // GRANULE].sort().values
    granules = (starts[:, None] + torch.arange(GRANULE, device=device)).flatten()
    for name, rows in ("scattered", scattered), (f"granules of {GRANULE}", granules):
        yield f"pack half, {name}", lambda rows=rows: pack_columns(dy, rows, True), packed


def known(device: torch.device) -> Gpu:
    """The GPU by its name, or as it describes itself; of a CPU nothing is known."""
    if device.type != "cuda":
        return Gpu(0, 0)
    card = card_of(torch.cuda.get_device_name(device))
    return CARDS[card] if card else gpu(device)


if __name__ == "__main__":
    main()
