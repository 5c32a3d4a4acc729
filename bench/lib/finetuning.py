"""Ways to fine-tune a model beside neq's, and the bytes of a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.lib.peak_memory import peak_bytes

KINDS = ("weights", "gradients", "optimizer")


def freeze_embeddings(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def train_last_layers(model: nn.Module, share: float) -> None:
    """Of the parameters that train, freeze all but the last ones with this share of the weights."""
    last_first = [p for p in model.parameters() if p.requires_grad][::-1]
    wanted, trained = share * sum(p.numel() for p in last_first), 0
    for p in last_first:
        p.requires_grad_(trained < wanted)
        trained += p.numel()


def with_lora(model: nn.Module, rank: int, task_type: str | None = None) -> nn.Module:
    """peft's, on every linear layer. A classifier ("SEQ_CLS") trains as it is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type=task_type, r=rank, target_modules="all-linear")
    wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def with_adamw(model: nn.Module, rate: float) -> Optimizer:
    """torch's fused AdamW of what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, fused=True)


def step_bytes(
    model: nn.Module, optimizer: Optimizer, step: Callable[[], object], device: torch.device
) -> dict[str, int]:
    """Of the tensors that are there after a step; and the peak of a step.

    The peak is weights, optimizer, and the most that torch allocates during the step.
    """
    step()
    step()  # the first one makes the optimizer's state
    held = _held(model, optimizer)
    optimizer.zero_grad()
    return held | {"peak": held["weights"] + held["optimizer"] + peak_bytes(step, device)}


def _held(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    def size(tensors: Any) -> int:
        return sum(t.nbytes for t in {id(t): t for t in tensors}.values())

    parameters = [*model.parameters()]
    state = (t for entries in optimizer.state.values() for t in entries.values())
    return {
        "weights": size([*parameters, *model.buffers()]),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "optimizer": size(t for t in state if isinstance(t, Tensor)),
    }
