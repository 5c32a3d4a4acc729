"""Two processes under DDP and FSDP: no stall, and a single process's gradients."""

import time

import torch.multiprocessing as mp

from tests.support import ranks

SECONDS = 150


def test_every_scenario(tmp_path):
    """One test for all: see ``ranks.SCENARIOS``."""
    context = mp.start_processes(
        ranks.run_all,
        (str(tmp_path),),
        nprocs=ranks.WORLD,
        join=False,
        start_method="spawn",
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            process.kill()
    results = {}
    for scenario in ranks.SCENARIOS:
        for rank in range(ranks.WORLD):
            file = tmp_path / f"{scenario} {rank}"
            results[scenario, rank] = file.read_text() if file.exists() else "stalled"
    failed = {key: result for key, result in results.items() if result != "passed"}
    assert not failed, "\n".join(f"{key}:\n{result}" for key, result in failed.items())
