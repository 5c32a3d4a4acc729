"""Runs scenarios in several processes, which see each other by gloo.

The scenarios lie in modules of their own, apart from the tests, which the processes could not
import. A group of processes runs all of a module, since each spends seconds on importing torch.
"""

import gc
import os
import time
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def failures(module: str, world: int, folder: Path, seconds: int) -> dict[tuple[str, int], str]:
    """What went wrong in which scenario of ``module.SCENARIOS[world]`` on which rank."""
    arguments = module, world, str(folder)
    context = mp.start_processes(
        _run_all, arguments, nprocs=world, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            process.kill()
    failed = {}
    for scenario in import_module(module).SCENARIOS[world]:
        for rank in range(world):
            file = folder / f"{scenario} {rank}"
            result = file.read_text() if file.exists() else "stalled"
            if result != "passed":
                failed[scenario, rank] = result
    return failed


def _run_all(rank: int, module: str, world: int, folder: str) -> None:
    """Each scenario leaves a file that says how it went."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    for name, scenario in import_module(module).SCENARIOS[world].items():
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store of {name} on {world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        # A scenario without a collective call could close a group that the other rank still joins.
        dist.barrier()
        try:
            scenario(rank)
            result = "passed"
        except Exception:
            result = traceback.format_exc()
        Path(folder, f"{name} {rank}").write_text(result)
        gc.collect()  # a group that garbage holds beyond the interpreter's end aborts the process
        dist.destroy_process_group()
