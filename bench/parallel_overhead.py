"""What neq costs under DDP and fully_shard while all neurons are active.

    python bench/parallel_overhead.py

Two processes train GPT-2's architecture on a CPU, a thread each, over the loopback. Contenders take
turns at a training step:

    plain              the model as it is
    converted          masked layers, all of whose neurons are active
    send_active_rows   the same, and neq's communication hook (DDP only)

Each time is a share of the plain model's in the same round. The plain model is there twice: what
its second copy takes is the noise.

    time   of the slower process, by the clock on the wall
    cpu    of both, without other processes on the machine
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli, results, two_processes
from bench.lib.environment import environment
from bench.lib.results import Result
from bench.lib.timing import Times, keep_freed

Taken = dict[str, list[tuple[float, float]]]

PLAIN, AGAIN = "plain", "plain again"
WAYS = {
    "DDP": (PLAIN, AGAIN, "converted", "send_active_rows"),
    "fully_shard": (PLAIN, AGAIN, "converted"),
}


def network(given: argparse.Namespace) -> nn.Module:
    config = GPT2Config(
        n_layer=given.layers, n_embd=given.width, n_head=given.width // 64, vocab_size=1000,
        n_positions=given.tokens, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def stepper(way: str, contender: str, given: argparse.Namespace) -> Callable[[Tensor], None]:
    """A training step of one contender."""
    torch.manual_seed(0)
    model = network(given)
    if contender not in (PLAIN, AGAIN):
        neq.convert(model)
    if way == "DDP":
        model = DistributedDataParallel(model)
        if contender == "send_active_rows":
            neq.distributed.send_active_rows(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(way: str, given: argparse.Namespace) -> Taken:
    """The seconds of each step by contender: the slower process's, and of both processors."""
    tokens = torch.randint(1000, (given.batch, given.tokens))
    steps = {name: stepper(way, name, given) for name in WAYS[way]}
    taken: Taken = {name: [] for name in steps}
    order, shuffle = [*steps], Random(0).shuffle
    for number in range(1 + given.rounds):
        for name in order:
            dist.barrier()
            clock, cpu = time.perf_counter(), time.process_time()
            steps[name](tokens)
            slower = torch.tensor(time.perf_counter() - clock)
            both = torch.tensor(time.process_time() - cpu)
            dist.all_reduce(slower, dist.ReduceOp.MAX)
            dist.all_reduce(both)
            if number:  # the first warms up
                taken[name].append((float(slower), float(both)))
        shuffle(order)
    return taken


def rows_of(way: str, taken: Taken) -> list[Result]:
    rows = []
    for name, seconds in taken.items():
        row: Result = {"way": way, "contender": name, "rounds": len(seconds)}
        pairs = zip(zip(*seconds, strict=True), zip(*taken[PLAIN], strict=True), strict=True)
        for kind, (own, plain) in zip(("time", "cpu"), pairs, strict=True):
            row[f"{kind}_ms"] = 1e3 * median(own)
            shares = Times.of([a / b for a, b in zip(own, plain, strict=True)])
            row |= {f"{kind}_{at}": value for at, value in shares._asdict().items()}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if given.rank is not None:
        work(given)
        return
    facts = environment(torch.device("cpu"))
    facts |= {name: getattr(given, name) for name in ("layers", "width", "batch", "tokens")}
    results.show_environment(facts)
    names = "layers", "width", "batch", "tokens", "rounds"
    options = {name: getattr(given, name) for name in names}
    rows = two_processes.run(__file__, [options, options])
    results.save(rows, facts, given.json)
    results.show_table(table(rows))


def work(given: argparse.Namespace) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    keep_freed()
    store = f"file://{given.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=given.rank, world_size=2)
    torch.manual_seed(given.rank)
    rows = [row for way in WAYS for row in rows_of(way, measure(way, given))]
    if given.rank == 0:
        Path(given.folder, two_processes.ROWS).write_text(json.dumps(rows))
    gc.collect()  # a group that garbage holds beyond the interpreter's end aborts the process
    dist.destroy_process_group()


def table(rows: list[Result]) -> Table:
    shares = [f"{kind}_{at}" for kind in ("time", "cpu") for at in Times._fields]
    names = [name.replace("_", " ") for name in ("time_ms", "cpu_ms", *shares)]
    out = results.new_table(("way", "contender"), names)
    for row in rows:
        milliseconds = (results.milliseconds(row[name]) for name in ("time_ms", "cpu_ms"))
        cells = (f"{row[name]:.3f}" for name in shares)
        out.add_row(row["way"], row["contender"], *milliseconds, *cells)
    return out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--layers", type=cli.whole, default=4, help="of GPT-2 (default: 4)")
    parser.add_argument("--width", type=cli.whole, default=256, help="of GPT-2 (default: 256)")
    parser.add_argument("--batch", type=cli.whole, default=4, help="in a process (default: 4)")
    parser.add_argument("--tokens", type=cli.whole, default=128, help="(default: 128)")
    parser.add_argument("--rounds", type=cli.whole, default=60, help="(default: 60)")
    cli.add_json(parser)
    for name, kind in (("rank", int), ("folder", str)):  # of one of the processes
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
