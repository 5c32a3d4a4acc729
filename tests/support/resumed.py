"""A training that ``torch.distributed.checkpoint`` saves, and that any number of processes resume.

``torchrun`` runs this file with a folder and a number: the training is killed as many times, at
random points of a step or of a save, and goes on from its latest checkpoint. Without ``torchrun``
it does the same by itself, and forks processes, which need not import torch each time.
"""

import gc
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import neq
from neq.sharding import whole

BATCH, STEPS, EVERY, SAVED = 8, 12, 4, (3, 6, 8)  # 8 is right after a choice
LONG = 40  # steps of the training that is killed
FOLDER = "NEQ_TEST_FOLDER"  # where it is saved


class Training:
    """Divided between the processes if there are several, or replicated."""

    def __init__(self, replicated: bool = False) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size())
        torch.manual_seed(0)
        model = neq.convert(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)))
        self.model: nn.Module = model
        if replicated:
            self.model = DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=init_device_mesh("cpu", (self.world,)))
        self.optimizer = neq.optim.AdamW(model.parameters(), lr=0.05)
        self.control = neq.Controller(
            self.model,
            optimizer=self.optimizer,
            probe=self.own(torch.randn(BATCH, 6)),
            policy=neq.Equilibrium(share=0.4),
            every=EVERY,
        )
        state = neq.distributed.TrainingState(self.model, self.optimizer, self.control)
        self.state = {"training": state}

    def own(self, x: Tensor) -> Tensor:
        """This process's part of a batch."""
        return x.chunk(self.world)[self.rank]

    def step(self, number: int) -> None:
        x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(number))
        self.model(self.own(x)).square().sum(1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def outcome(self) -> dict[str, Tensor]:
        """All parameters, what the optimizer knows of them, and the mask."""
        found = {}
        for number, p in enumerate(self.model.parameters()):
            state = self.optimizer.state[p]
            for name, values in {"p": p.detach(), **state}.items():
                found[f"{number} {name}"] = whole(values)
        return {**found, "mask": self.control.layers["0"].mask, **self.control.scores}


def save(rank: int) -> None:
    """A whole training, saved at three places."""
    training, folder = Training(), Path(os.environ[FOLDER])
    for number in range(STEPS):
        training.step(number)
        if number + 1 in SAVED:
            dcp.save(training.state, checkpoint_id=folder / str(number + 1))
    outcome = training.outcome()
    assert 0 < training.control.record.frozen_share < 1
    if rank == 0:
        torch.save(outcome, folder / "outcome.pt")


def load(rank: int, at: int, exact: bool, replicated: bool = False) -> None:
    """The rest of it comes to the same end."""
    training, folder = Training(replicated), Path(os.environ[FOLDER])
    dcp.load(training.state, checkpoint_id=folder / str(at))
    for number in range(at, STEPS):
        training.step(number)
    theirs = torch.load(folder / "outcome.pt")
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    roughly = {"rtol": 1e-3, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(training.outcome(), theirs, **(exactly if exact else roughly))


def statistics(rank: int, replicated: bool) -> None:
    """Each process goes on with the running statistics that it had."""
    torch.manual_seed(0)
    norms = (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(3))
    model = neq.convert(nn.Sequential(*norms, nn.Linear(6, 2)))
    if replicated:
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = neq.optim.SGD(model.parameters(), lr=0.05)
    control = neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5), every=2)
    state = {"training": neq.distributed.TrainingState(model, optimizer, control)}
    folder = Path(os.environ[FOLDER]) / f"statistics {replicated}"
    outcomes = []
    for number in (*range(6), *range(3, 6)):
        if number == 3:
            (dcp.load if outcomes else dcp.save)(state, checkpoint_id=folder)
        x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(10 * number + rank))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 5:
            outcomes.append([whole(t).clone() for t in model.state_dict().values()])
    assert all(map(torch.equal, *outcomes))


def _load(exact: bool, *places: int, **options: bool) -> dict[str, object]:
    return {f"from {at} {options}": partial(load, at=at, exact=exact, **options) for at in places}


# Between two choices the outputs of the other processes are not those of this one's samples.
SCENARIOS = {
    1: _load(False, 8) | _load(False, 8, replicated=True),
    2: {
        "whole": save,
        **_load(True, *SAVED),
        **_load(False, 8, replicated=True),
        "statistics, replicated": partial(statistics, replicated=True),
        "statistics, divided": partial(statistics, replicated=False),
    },
    4: _load(False, 8),
}


def until_killed(folder: Path, kills: int) -> None:
    """Train, and save after each second step. At a random point a process is killed."""
    done = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    # a store of its own, since gloo finds the addresses of killed processes in torchrun's
    store = f"file://{folder}/store {done}"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    training = Training()
    latest = neq.distributed.latest_checkpoint(folder)
    start = 0
    if latest is not None:
        dcp.load(training.state, checkpoint_id=latest)
        start = int(latest.name)
    chance = random.Random(done)
    dies = done < kills and training.rank == chance.randrange(training.world)
    step, in_save = min(start + chance.randrange(4), LONG - 1), chance.random() < 0.5
    for number in range(start, LONG):
        if dies and number == step and not in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        training.step(number)
        if number % 2:
            if dies and number >= step:
                killed_while_saving()
            dcp.save(training.state, checkpoint_id=folder / str(number + 1))
    outcome = training.outcome()
    if training.rank == 0:
        torch.save({**outcome, "restarts": torch.tensor(done)}, folder / "outcome.pt")
    # the model holds groups of its own, and one that outlives the interpreter aborts the process
    del training
    gc.collect()
    dist.destroy_process_group()


def killed_while_saving() -> None:
    """The next file that is opened to be written is the last."""
    from torch.distributed.checkpoint import filesystem

    def dies(self: object, path: str | os.PathLike[str], mode: str) -> object:
        if "w" in mode:
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return create(self, path, mode)

    create = filesystem.FileSystem.create_stream
    filesystem.FileSystem.create_stream = dies  # type: ignore[method-assign]


def restarted(folder: Path, kills: int) -> None:
    """As ``torchrun`` does it, with forked processes."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=kills,
        start_method="fork",
    )
    elastic_launch(config, until_killed)(folder, kills)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = until_killed if "RANK" in os.environ else restarted
    run(Path(sys.argv[1]), int(sys.argv[2]))
