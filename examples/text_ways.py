"""Ways to fine-tune a model, for examples/finetune_text.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from bench.lib.finetuning import (
    freeze_embeddings,
    freeze_lower_half,
    train_last_layers,
    with_adamw,
    with_lora,
)

Inputs = Mapping[str, Tensor]  # some training samples, as the model takes them
LORA_RANK = 16
LIKE_LORA = 0.08  # the share at which compact has LoRA's peak memory
SHARES = 0.25, 0.1
GRANULES = 1, 16
BUDGET = 0.6  # of a dense step's time, about what freezing half takes
FAST_HEAD = 30.0  # a classifier's rate, as a multiple of the others'
PROBE = 8  # training samples
DECISIONS = 8  # of a policy, in one run
POLICIES: dict[str, Callable[[float, int], neq.Policy]] = {
    "equilibrium": lambda share, seed: neq.Equilibrium(share=1 - share),  # that it freezes
    "lowest": lambda share, seed: neq.LowestVelocity(share),
    "random": neq.Random,
}


@dataclass
class Learner:
    """A model, and what trains it."""

    model: nn.Module
    optimizer: Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def step(self, batch: Inputs) -> Tensor:
        """Returns the loss."""
        self.optimizer.zero_grad()
        loss: Tensor = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def trained(self) -> int:
        """How many elements of parameters train at the moment."""
        layers = [m for m in self.model.modules() if isinstance(m, neq.NeuronLayer)]
        shares = {id(p): _share(layer) for layer in layers for p in layer.parameters(recurse=False)}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return round(sum(p.numel() * shares.get(id(p), 1.0) for p in trained if p.requires_grad))


def steps_of_a_decision(steps: int) -> int:
    """How many steps a policy waits for a decision, in a run of so many."""
    return max(1, steps // DECISIONS)


def _share(layer: neq.NeuronLayer) -> float:
    """Of the elements of a layer's parameters, the share that trains."""
    if layer.leaves is None:
        return layer.active_fraction
    return layer.active.k / max(1, layer.layout("weight").size)  # the rest of the leaf is zeros


@dataclass(frozen=True)
class Way:
    """How to train.

    Attributes:
        prepare: Takes a model and inputs, and returns the model that trains.
        policy: Makes the policy of a Controller for a seed and so many steps; None: no Controller.
        steps: The share of all steps that are taken. The learning rate's schedule ends there.
        head_rate: The classifier's learning rate, as a multiple of the others'.
        granule: How many neighbouring neurons the Controller decides on together.
    """

    prepare: Callable[[nn.Module, Inputs], nn.Module]
    policy: Callable[[int, int], neq.Policy] | None = None
    steps: float = 1.0
    head_rate: float = 1.0
    granule: int = 1

    def learner(self, model: nn.Module, rate: float, steps: int, batch: Inputs) -> Learner:
        """What trains for so many steps with such batches. The policy draws from torch's seed."""
        model = self.prepare(model, batch)
        optimizer = with_adamw(model, rate)
        if self.head_rate != 1:
            _set_apart(optimizer, model.get_submodule("classifier"), self.head_rate * rate)
        if self.policy is not None:
            neq.Controller(
                model,
                optimizer=optimizer,
                probe={key: t[:PROBE] for key, t in batch.items()},
                example_inputs=batch,
                policy=self.policy(torch.initial_seed(), steps),
                every=steps_of_a_decision(steps),
                on_thaw="reset",
                granule=self.granule,
            )
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min((done + 1) / warmup, (steps - done) / (steps - warmup + 1))
        )
        return Learner(model, optimizer, schedule)


def _set_apart(optimizer: Optimizer, module: nn.Module, rate: float) -> None:
    """Give a module's parameters a learning rate of their own."""
    own, [group] = [*module.parameters()], optimizer.param_groups
    group["params"] = [p for p in group["params"] if p not in {*own}]
    optimizer.add_param_group({"params": own, "lr": rate})


def _whole(model: nn.Module, inputs: Inputs) -> nn.Module:
    return model


def _compact(share: float, model: nn.Module, inputs: Inputs) -> nn.Module:
    freeze_embeddings(model)
    return neq.compact(model, capacity=share)


def _layers(share: float, model: nn.Module, inputs: Inputs) -> nn.Module:
    freeze_embeddings(model)
    train_last_layers(model, share)
    return model


def _half(model: nn.Module, inputs: Inputs) -> nn.Module:
    freeze_lower_half(model, inputs)
    return model


def _converted(model: nn.Module, inputs: Inputs) -> nn.Module:
    freeze_embeddings(model)
    return neq.convert(model)


def _lora(model: nn.Module, inputs: Inputs) -> nn.Module:
    return with_lora(model, LORA_RANK, "SEQ_CLS")


def _compact_way(policy: str, share: float) -> Way:
    return Way(partial(_compact, share), lambda seed, steps: POLICIES[policy](share, seed))


def _granular_way(share: float, granule: int) -> Way:
    policy = POLICIES["equilibrium"]
    return Way(_converted, lambda seed, steps: policy(share, seed), granule=granule)


def _budget(seed: int, steps: int) -> neq.Budget:
    return neq.Budget(share=BUDGET, unit="step_ms", importance="gradient")


def _head_first(seed: int, steps: int) -> neq.HeadFirst:
    return neq.HeadFirst(longest=1, epoch_steps=steps)


WAYS: dict[str, Way] = {
    "full": Way(_whole),
    "full-0.7": Way(_whole, steps=0.7),  # ends when compact and LoRA do
    **{
        f"compact-{policy}-{share:g}": _compact_way(policy, share)
        for share in SHARES
        for policy in POLICIES
    },
    **{
        f"compact-{policy}-{LIKE_LORA:g}": _compact_way(policy, LIKE_LORA)
        for policy in ("equilibrium", "random")
    },
    "lora": Way(_lora),
    **{f"layers-{share:g}": Way(partial(_layers, share)) for share in SHARES},
    "half": Way(_half),
    "bottom-up": Way(_converted, lambda seed, steps: neq.BottomUp()),
    f"budget-{BUDGET:g}": Way(_converted, _budget),
    "head-first": Way(_converted, _head_first),
    f"full-head-{FAST_HEAD:g}": Way(_whole, head_rate=FAST_HEAD),
    f"head-first-head-{FAST_HEAD:g}": Way(_converted, _head_first, head_rate=FAST_HEAD),
}
# the same shares of the neurons, chosen one by one and in granules
GRANULAR: dict[str, Way] = {
    f"equilibrium-{share:g}-granule-{granule}": _granular_way(share, granule)
    for share in SHARES
    for granule in GRANULES
}
