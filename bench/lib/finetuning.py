"""Ways to fine-tune a model beside neq's, and the bytes of a step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from bench.lib.peak_memory import peak_bytes

KINDS = ("weights", "gradients", "optimizer")
STEPS_MEASURED = 3  # that step_bytes takes


def freeze_embeddings(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def freeze_lower_half(model: nn.Module, inputs: Any) -> None:
    """Freeze half of the blocks, from the input up."""
    blocks = neq.blocks(model, inputs)
    for name in (n for block in blocks[: (len(blocks) + 1) // 2] for n in block.parameters):
        model.get_parameter(name).requires_grad_(False)


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
    """Those of the weights, the gradients, the optimizer's state, and the peak of a step.

    The peak is that of the last of ``STEPS_MEASURED`` steps: weights, optimizer, and the most that
    torch allocates during the step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = 0

    def look(*args: Any) -> None:
        nonlocal gradients
        gradients = _size(p.grad for p in parameters if p.grad is not None)

    step()  # it makes the optimizer's state
    hook = optimizer.register_step_pre_hook(look)
    step()
    hook.remove()
    optimizer.zero_grad()
    weights = _size([*model.parameters(), *model.buffers()])
    entries = (t for state in optimizer.state.values() for t in state.values())
    state = _size(t for t in entries if isinstance(t, Tensor))
    peak = weights + state + peak_bytes(step, device)
    return {"weights": weights, "gradients": gradients, "optimizer": state, "peak": peak}


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())
