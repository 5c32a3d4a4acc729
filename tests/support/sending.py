"""What several processes send under DDP: see ``processes``."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_wrapper,
    fp16_compress_wrapper,
)
from torch.nn.parallel import DistributedDataParallel

import neq
from tests.support.layers import Tiny, layers_of, trained_elements
from tests.support.ranks import Words, schedule

BATCH = 4  # per process


class Both(nn.Module):
    """Neurons along either dimension of a weight, tied weights, and parameters out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny, self.words = Tiny(), Words()
        self.tiny.norm = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return (self.tiny(x) * self.scale).square().sum() + self.words(tokens).square().mean()


def bf16_on_gloo(hook: Callable[..., object]) -> Callable[..., object]:
    """torch's, which DDP knows by its name and takes for NCCL only."""
    compressed = bf16_compress_wrapper(hook)
    return lambda state, bucket: compressed(state, bucket)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each reduction of gradients."""
    sent, all_reduce = [], dist.all_reduce

    def counts(tensor: Tensor, *args: object, **options: object) -> object:
        if tensor.is_floating_point():
            sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **options)

    with mock.patch.object(dist, "all_reduce", counts):
        yield sent


def train(
    rank: int, wrapper: Callable[..., object] | None = None, exact: bool = True, **options: object
) -> None:
    """The same gradients as when all is sent, and no byte for a frozen row.

    Args:
        rank: This process.
        wrapper: Compresses, beside neq's hook and beside torch's.
        exact: The same bits; among more than two, a sum depends on where in a message it is.
        **options: For DDP.
    """
    torch.manual_seed(0)
    mine = neq.convert(Both()).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(mine)
    both = [DistributedDataParallel(model, **options) for model in (mine, theirs)]
    neq.distributed.send_active_rows(both[0], wrapper)
    both[1].register_comm_hook(None, wrapper(allreduce_hook) if wrapper else allreduce_hook)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (mine, theirs)]
    size = 2 if wrapper else 4
    for step in range(6):
        torch.manual_seed(step * dist.get_world_size() + rank)
        x, tokens = torch.randn(BATCH, 3, 5, 5), torch.randint(9, (BATCH, 4))
        bytes_of = []
        for ddp, optimizer in zip(both, optimizers, strict=True):
            for index, layer in enumerate(layers_of(ddp)):
                layer.set_active(schedule(step, index, layer.n_neurons))
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            with counted() as sent:
                ddp(x, tokens).backward()
            bytes_of.append(sum(sent) // size)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **({"rtol": 0, "atol": 0} if exact else {}))
        trained = trained_elements(mine)
        everything = {p: torch.ones_like(p) for p in mine.parameters()}
        assert bytes_of == [
            sum(int(elements.sum()) for elements in which.values())
            for which in ({**everything, **trained}, everything)
        ]
        for optimizer in optimizers:
            optimizer.step()


def accumulate(rank: int) -> None:
    """What ``no_sync`` has added up is sent once."""
    torch.manual_seed(0)
    mine = neq.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    both = [DistributedDataParallel(m) for m in (mine, copy.deepcopy(mine))]
    neq.distributed.send_active_rows(both[0])
    torch.manual_seed(rank)
    x = torch.randn(2, BATCH, 6)
    for ddp in both:
        ddp.module[0].set_active([1, 5])
        with ddp.no_sync():
            ddp(x[0]).square().sum().backward()
        ddp(x[1]).square().sum().backward()
    for p, q in zip(*(ddp.parameters() for ddp in both), strict=True):
        assert torch.equal(p.grad, q.grad)


def look(rank: int) -> None:
    """What is held has gradients, and they are sent: signals are those of the whole batch."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    batches = torch.randn(4, dist.get_world_size() * BATCH, 6)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    signals = []
    for part in (mine, slice(None)):
        model = neq.convert(copy.deepcopy(start))
        policy, options = neq.HeadFirst(longest=1), {"example_inputs": batches[0]}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if part is not mine:  # a single process, as far as it knows
            options["process_group"] = dist.new_group([rank], use_local_synchronization=True)
        control = neq.Controller(model, policy=policy, optimizer=optimizer, **options)
        for _ in ("head", "look"):
            wrapped = DistributedDataParallel(model) if part is mine else model
            if part is mine:
                neq.distributed.send_active_rows(wrapped)
            for x in batches[:, part]:
                optimizer.zero_grad()
                wrapped(x).square().mean().backward()
                optimizer.step()
            control.step()
        signals.append(torch.tensor([*policy.signals.values()]))
    torch.testing.assert_close(*signals, rtol=1e-3, atol=1e-4)


def disagree(rank: int) -> None:
    """On a mask: an error on each rank, not a stall, though as many rows are active."""
    model = neq.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    ddp = DistributedDataParallel(model)
    neq.distributed.send_active_rows(ddp)
    model[1].set_active([1])
    model[0].set_active([rank])
    loss = ddp(torch.randn(BATCH, 6)).square().mean()
    with pytest.raises(ValueError, match="layer '0': the ranks disagree on which of its neurons"):
        loss.backward()


SCENARIOS = {
    2: {
        "active rows": train,
        "active rows, many buckets": partial(train, bucket_cap_mb=0.0001),
        "active rows, views": partial(train, gradient_as_bucket_view=True),
        "active rows, static graph": partial(train, static_graph=True),
        "active rows, fp16": partial(train, wrapper=fp16_compress_wrapper),
        "active rows, bf16": partial(train, wrapper=bf16_on_gloo),
        "active rows, accumulated": accumulate,
        "active rows, head first": look,
        "disagreement": disagree,
    },
    4: {"active rows": partial(train, exact=False)},
}
