"""Train an image classifier on several processes, with neurons at equilibrium frozen.

    python examples/imagenet.py                                        # made-up images, tiny model
    python examples/imagenet.py --data FOLDER --model resnet50         # one GPU
    torchrun --nproc-per-node 8 examples/imagenet.py --data FOLDER --model resnet50
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/imagenet.py --data FOLDER --model vit_large_patch16_224 --sharded --amp

FOLDER has train/<class>/ and val/<class>/ with images, as torchvision reads them. --model is a name
of torchvision or timm. Processes hold copies of it (DDP), which exchange the gradients of active
rows only, or with --sharded a part each (fully_shard). After each epoch a checkpoint is saved that
any number of processes can --resume.
"""

import argparse
import gc
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import neq
from bench.lib import cli
from examples.imagenet_parts import Data, datasets, network

WARMUP = 5  # epochs in which the learning rate rises


def units(model: nn.Module) -> Iterator[nn.Module]:
    """What ``fully_shard`` gathers at a time: what lies in its outermost sequences."""
    for child in model.children():
        if not isinstance(model, nn.Sequential | nn.ModuleList):
            yield from units(child)
        elif any(True for _ in child.parameters()):
            yield child


class Run:
    """A training, from its start or from its latest checkpoint."""

    def __init__(self, given: argparse.Namespace, device: torch.device) -> None:
        self.given, self.device = given, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        train, test, classes = datasets(given.data, given.size)
        self.train, self.test = self.loader(train, True), self.loader(test, False)
        torch.manual_seed(given.seed)
        self.inner = neq.convert(network(given.model, classes)).to(device)
        self.model = self.wrapped()
        self.optimizer = neq.optim.SGD(
            self.model.parameters(), lr=given.lr, momentum=0.9, weight_decay=given.decay
        )
        probe = next(iter(self.test))[0][: given.probe].to(device)
        self.control = neq.Controller(
            self.model,
            optimizer=self.optimizer,
            probe=probe.contiguous(memory_format=torch.channels_last),
            policy=neq.Equilibrium(share=given.frozen),
            epochs=given.epochs,
        )
        self.amp = torch.autocast(device.type, torch.bfloat16, enabled=given.amp)
        state = neq.distributed.TrainingState(self.model, self.optimizer, self.control)
        self.state = {"training": state}
        self.call = torch.compile(self.model) if given.compile else self.model

    def loader(self, data: Data, trains: bool) -> DataLoader[tuple[Tensor, Tensor]]:
        sampler: DistributedSampler[Any] = DistributedSampler(
            data, self.world, self.rank, shuffle=trains, seed=self.given.seed, drop_last=trains
        )
        return DataLoader(
            data,
            self.given.batch,
            sampler=sampler,
            num_workers=self.given.workers,
            drop_last=trains,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.given.workers > 0,
        )

    def wrapped(self) -> nn.Module:
        """The model as several processes train it."""
        if not self.given.sharded:
            self.inner.to(memory_format=torch.channels_last)  # fully_shard takes no such weights
            on = [self.device.index] if self.device.type == "cuda" else None
            ddp = DistributedDataParallel(self.inner, on, gradient_as_bucket_view=True)
            neq.distributed.send_active_rows(ddp)
            return ddp
        # autocast, for a MixedPrecisionPolicy leaves a batch norm's statistics as they are
        options = {"mesh": init_device_mesh(self.device.type, (self.world,))}
        for unit in units(self.inner):
            fully_shard(unit, **options)
        return fully_shard(self.inner, **options)

    def go(self) -> None:
        folder = self.given.output / "checkpoints"
        latest = neq.distributed.latest_checkpoint(folder) if self.given.resume else None
        if latest is not None:
            dcp.load(self.state, checkpoint_id=latest)
        for epoch in range(0 if latest is None else int(latest.name), self.given.epochs):
            loss = self.epoch(epoch)
            record = self.control.step()
            accuracy = self.accuracy()
            dcp.save(self.state, checkpoint_id=folder / str(epoch + 1))
            if self.rank == 0:
                print(f"{record}, loss {loss:.3f}, accuracy {accuracy:.2%}", flush=True)
                row = {"epoch": epoch + 1, "loss": loss, "accuracy": accuracy, **record.figures}
                with (self.given.output / "results.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                shutil.rmtree(folder / str(epoch - 1), ignore_errors=True)  # keeps the last two

    def epoch(self, epoch: int) -> float:
        """Train for an epoch. Returns the mean loss."""
        torch.manual_seed(self.given.seed + 1000 * epoch + self.rank)  # of augmentation and dropout
        self.train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        self.model.train()
        total, steps = torch.zeros((), device=self.device), len(self.train)
        for step, batch in enumerate(self.train):
            for group in self.optimizer.param_groups:
                group["lr"] = self.given.lr * schedule(epoch + step / steps, self.given.epochs)
            x, y = self.placed(batch)
            with self.amp:
                loss = F.cross_entropy(self.call(x), y, label_smoothing=0.1)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
        self.share_statistics()
        dist.all_reduce(total)
        return float(total) / steps / self.world

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Norms of all processes get the mean of their running statistics, to be tested alike."""
        for name, buffer in self.inner.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= self.world

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        found = torch.zeros(2, device=self.device)  # right ones, and all
        for batch in self.test:
            x, y = self.placed(batch)
            with self.amp:
                right = self.model(x).argmax(1) == y
            found += torch.stack([right.sum(), right.new_tensor(len(y), dtype=torch.int64)])
        dist.all_reduce(found)
        return float(found[0] / found[1])

    def placed(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = (t.to(self.device, non_blocking=True) for t in batch)
        return x.contiguous(memory_format=torch.channels_last), y


def schedule(epoch: float, epochs: int) -> float:
    """The learning rate's share: it rises in a line, then falls as a cosine."""
    rise = min(WARMUP, epochs / 4)
    if epoch < rise:
        return 0.01 + 0.99 * epoch / rise
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - rise) / (epochs - rise))


def main(arguments: list[str] | None = None) -> None:
    parse = parser()
    given = parse.parse_args(arguments)
    alone = {"init_method": "tcp://localhost:0", "rank": 0, "world_size": 1}
    device = given.device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    dist.init_process_group(**({} if "RANK" in os.environ else alone))
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        Run(given, device).go()
    except (ValueError, OSError) as error:
        parse.error(str(error))
    finally:
        gc.collect()  # a group that the model holds beyond the interpreter's end aborts the process
        dist.destroy_process_group()


def parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    add: Any = parser.add_argument
    add("--model", default="tiny", metavar="NAME", help="(default: tiny)")
    add("--data", type=Path, metavar="FOLDER", help="(default: made up)")
    add("--size", type=cli.whole, default=224, help="of images (default: 224)")
    add("--sharded", action="store_true", help="fully_shard in place of DDP")
    add("--frozen", type=cli.share, default=0.5, help="share of the neurons (default: 0.5)")
    add("--probe", type=cli.whole, default=32, help="images in each process (default: 32)")
    add("--epochs", type=cli.whole, default=90, help="(default: 90)")
    add("--batch", type=cli.whole, default=64, help="in each process (default: 64)")
    add("--lr", type=cli.positive, default=0.2, help="(default: 0.2)")
    add("--decay", type=float, default=5e-5, help="of weights (default: 5e-5)")
    add("--amp", action="store_true", help="bfloat16")
    add("--compile", action="store_true", help="by torch.compile")
    add("--workers", type=int, default=0, help="that load images, in each process (default: 0)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/imagenet"), metavar="FOLDER")
    add("--resume", action="store_true", help="from the latest checkpoint in --output")
    cli.add_device(parser)
    return parser


if __name__ == "__main__":
    main()
