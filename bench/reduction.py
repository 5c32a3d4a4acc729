"""Bytes and time of DDP's reduction between two processes: all rows, and active rows only.

    python bench/reduction.py --rate 1gbit     # as root: two network namespaces and such a link
    python bench/reduction.py                  # over the loopback, as fast as the machine is

The gradients are GPT-2's, in buckets as DDP makes them. No model runs, so nothing hides the
reduction behind a backward pass. Contenders take turns: DDP's own hook, which sends everything, and
that of ``send_active_rows`` with a share f of the neurons of each layer active.

    bytes, time    of what DDP's own hook takes
    time / f       1 where time follows what is active
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results, two_processes
from bench.lib.environment import environment
from bench.lib.results import Result
from neq.distributed.active_rows import ActiveRows, _hook
from neq.layers.base import NeuronLayer

BUCKET = 25 * 2**20  # bytes, as in DDP


class Bucket:
    """As much of ``dist.GradBucket`` as hooks use."""

    def __init__(self, number: int, params: list[Tensor]) -> None:
        self._number, self._params = number, params
        self._buffer = torch.ones(sum(p.numel() for p in params))

    def index(self) -> int:
        return self._number

    def buffer(self) -> Tensor:
        return self._buffer

    def parameters(self) -> list[Tensor]:
        return self._params

    def gradients(self) -> list[Tensor]:
        parts = self._buffer.split([p.numel() for p in self._params])
        return [part.view(p.shape) for part, p in zip(parts, self._params, strict=True)]


def buckets_of(model: nn.Module) -> list[Bucket]:
    """From the last parameter to the first, as backward reaches them."""
    lists: list[list[Tensor]] = [[]]
    for p in reversed(list(model.parameters())):
        if lists[-1] and 4 * sum(q.numel() for q in [*lists[-1], p]) > BUCKET:
            lists.append([])
        lists[-1].append(p)
    return [Bucket(number, params) for number, params in enumerate(lists)]


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if given.rank is not None:
        work(given)
        return
    facts = environment(torch.device("cpu")) | {"rate": given.rate, "layers": given.layers}
    results.show_environment(facts)
    shared = {name: getattr(given, name) for name in ("layers", "width", "rounds")}
    shared["active"] = ",".join(map(str, given.active))
    links = ["lo", "lo"] if given.rate is None else ["neq0", "neq1"]
    with namespaces(given.rate) as prefixes:
        rows = two_processes.run(__file__, [{**shared, "link": link} for link in links], prefixes)
    results.save(rows, facts, given.json)
    results.show_table(table(rows))


@contextmanager
def namespaces(rate: str | None) -> Iterator[list[list[str]]]:
    """What to put before the commands of the two processes."""
    if rate is None:
        yield [[], []]
        return
    names = [f"neq-reduction-{rank}" for rank in range(2)]
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        ip("link", "add", "neq0", "type", "veth", "peer", "name", "neq1")
        for rank, name in enumerate(names):
            link = f"neq{rank}"
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.99.0.{rank + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            limit = ["rate", rate, "burst", "128kb", "latency", "50ms"]
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", "tbf", *limit)
        yield [["ip", "netns", "exec", name] for name in names]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def work(given: argparse.Namespace) -> None:
    """What each of the two processes does."""
    os.environ["GLOO_SOCKET_IFNAME"] = given.link
    torch.set_num_threads(1)
    store = f"file://{given.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=given.rank, world_size=2)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=given.layers, n_embd=given.width, n_head=given.width // 64)
    model = neq.convert(GPT2LMHeadModel(config))
    state, buckets = ActiveRows(DistributedDataParallel(model)), buckets_of(model)
    shares = [None, *given.active]
    seen: dict[Any, list[tuple[int, float]]] = {share: [] for share in shares}
    for number in range(1 + given.rounds):
        for share in shares:
            mask(model, share or 1.0)
            result = reduce(state, buckets, given.link, share is None)
            if number:  # the first warms up
                seen[share].append(result)
    if given.rank == 0:
        everything = sum(p.numel() for p in model.parameters())
        rows = []
        for share, each in seen.items():
            mask(model, share or 1.0)
            sent, seconds = (median(column) for column in zip(*each, strict=True))
            row: Result = {"active": share, "sent": sent, "seconds": seconds}
            row["spread"] = [min(s for _, s in each), max(s for _, s in each)]
            row["elements"] = active_elements(model) / everything
            rows.append(row)
        Path(given.folder, two_processes.ROWS).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def mask(model: nn.Module, share: float) -> None:
    """The same random neurons on both ranks."""
    torch.manual_seed(0)
    done = set()
    for layer in model.modules():
        if isinstance(layer, NeuronLayer) and id(layer.active) not in done:
            done.add(id(layer.active))
            layer.set_active(torch.randperm(layer.n_neurons)[: round(share * layer.n_neurons)])


def active_elements(model: nn.Module) -> int:
    found = {}
    for layer in model.modules():
        if isinstance(layer, NeuronLayer):
            for p in layer.parameters(recurse=False):
                found[p] = p.numel() // layer.n_neurons * layer.active.k
    return sum(found.values())


def reduce(
    state: ActiveRows, buckets: list[Bucket], link: str, all_rows: bool
) -> tuple[int, float]:
    """One reduction of all buckets: the bytes that this process sent, and the seconds."""
    counter = Path(f"/sys/class/net/{link}/statistics/tx_bytes")
    dist.barrier()
    sent, start = int(counter.read_text()), time.perf_counter()
    futures = [
        allreduce_hook(state.group, bucket) if all_rows else _hook(state, bucket)  # type: ignore[arg-type]
        for bucket in buckets
    ]
    for future in futures:
        future.wait()
    seconds = time.perf_counter() - start
    return int(counter.read_text()) - sent, seconds


def table(rows: list[Result]) -> Table:
    out = results.new_table(("",), ("f", "MB", "seconds", "bytes", "time", "time / f"))
    for row in rows:
        sent, seconds = (row[name] / rows[0][name] for name in ("sent", "seconds"))
        out.add_row(
            "all rows" if row["active"] is None else "active rows",
            f"{row['elements']:.3f}",
            f"{row['sent'] / 1e6:.1f}",
            f"{row['seconds']:.3f}",
            f"{sent:.1%}",
            f"{seconds:.1%}",
            f"{seconds / row['elements']:.2f}",
        )
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    cli.add_active(parser, default="1,.5,.25,.1")
    parser.add_argument("--rate", help="of the link, as tc takes it; needs root")
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2 (default: 12)")
    parser.add_argument("--width", type=int, default=768, help="of GPT-2 (default: 768)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    cli.add_json(parser)
    for name, kind in (("rank", int), ("folder", str), ("link", str)):  # of one of the processes
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
