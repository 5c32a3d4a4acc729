"""What a policy is told, asking it, and setting what it chose."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neq.layers.active import as_mask, at_most
from neq.layers.base import NeuronLayer
from neq.layers.groups import Group, LeaveAlone
from neq.measure.evaluating import Inputs
from neq.policies.base import Motion, Policy
from neq.policies.granules import of_neurons
from neq.prefix.blocks import NoCutError
from neq.prefix.prefix import Prefix
from neq.ranks import Ranks


def prefix_for(
    policy: Policy,
    model: nn.Module,
    layers: Mapping[str, Group],
    inputs: Inputs | None,
    leave_alone: LeaveAlone,
) -> Prefix | None:
    """What a policy can freeze whole; None if it freezes no prefix, or needs none and finds none.

    Args:
        policy: The policy.
        model: The model.
        layers: The groups that it chooses for, by name.
        inputs: The model's arguments, for one forward.
        leave_alone: As for ``neq.Controller``.

    Raises:
        ValueError: If there are no inputs, or the model can't be cut.
    """
    if not policy.freezes_prefix:
        return None
    if inputs is None:
        raise ValueError(
            f"{type(policy).__name__} freezes a prefix, which a forward has to find: give the "
            "Controller example_inputs, a batch like those of training"
        )
    mine = {layer for group in layers.values() for layer in group}
    alone = [m for m in model.modules() if isinstance(m, NeuronLayer) and m not in mine]
    try:
        # the classifier, which is left alone by default, comes after all blocks; of a language
        # model it may share the embedding's weight, and is frozen with it
        return Prefix(model, inputs, keep=() if leave_alone is None else alone)
    except NoCutError:
        if policy.needs_blocks:
            raise
        return None


def motions_of(
    groups: Iterable[Group], scores: Mapping[str, Tensor], active: Tensor, prefix: Prefix | None
) -> list[Motion]:
    """How the neurons of each group moved.

    Args:
        groups: The groups.
        scores: What was measured: by name, float64 [all neurons] each, group after group.
        active: Which neurons trained: bool [all neurons].
        prefix: What the policy can freeze whole.
    """
    groups = list(groups)
    sizes = [group.n_neurons for group in groups]
    by_name = {name: values.split(sizes) for name, values in scores.items()}
    return [
        Motion.of(
            group,
            {name: parts[i] for name, parts in by_name.items()},
            mask,
            None if prefix is None else prefix.block_of(group),
        )
        for i, (group, mask) in enumerate(zip(groups, active.split(sizes), strict=True))
    ]


def decide(
    policy: Policy,
    motions: Sequence[Motion],
    epoch: int,
    prefix: Prefix | None,
    ranks: Ranks,
    statistics: Iterable[Any] | None = None,
) -> None:
    """Ask a policy which neurons train, and set them. Rank 0's answer holds on every rank.

    Args:
        policy: The policy.
        motions: How the neurons of each group moved, or their granules.
        epoch: How many epochs are over.
        prefix: What it can freeze whole, if it does so.
        ranks: The processes that train copies of the model.
        statistics: Batches for the norms that are frozen with the prefix.

    Raises:
        ValueError: If the answer does not fit the model.
    """
    kind = type(policy).__name__
    blocks = () if prefix is None else prefix.blocks
    depth = policy.depth(motions, epoch) if blocks else 0
    if not 0 <= depth <= len(blocks):
        raise ValueError(f"{kind}.depth must be in [0, {len(blocks)}], got {depth}")
    chosen = list(policy.choose(motions, epoch))
    if len(chosen) != len(motions):
        raise ValueError(
            f"{kind}.choose must give rows for each of the {len(motions)} layers, got {len(chosen)}"
        )
    masks = [
        of_neurons(as_mask(rows, len(motion), f"{kind}.choose, layer {motion.name!r}"), motion)
        for motion, rows in zip(motions, chosen, strict=True)
    ]
    masks = _that_fit(kind, motions, masks)
    frozen = torch.arange(len(blocks)) < depth  # bool [blocks]
    # a policy that draws or times may choose differently on another rank
    decided = ranks.from_first(torch.cat([frozen, *masks]), motions[0].layer.weight.device)
    frozen, *masks = decided.split([len(blocks), *map(len, masks)])
    if prefix is not None and int(frozen.sum()) != prefix.depth:
        prefix.freeze(int(frozen.sum()), statistics=statistics)
    for motion, mask in zip(motions, masks, strict=True):
        inside = motion.block is not None and frozen[motion.block]
        if not inside and not torch.equal(motion.layer.active_mask.cpu(), mask):
            motion.layer.set_active(mask)


def _that_fit(kind: str, motions: Sequence[Motion], masks: Sequence[Tensor]) -> list[Tensor]:
    """A random choice of the neurons, where the capacity of a compact layer is too small.

    Args:
        kind: The policy's class, which chose the neurons.
        motions: Those of the layers.
        masks: bool [n_neurons] each.
    """
    leaves = [motion.layer.leaves for motion in motions]
    fitting = [
        mask if own is None else at_most(mask, own.capacity)
        for mask, own in zip(masks, leaves, strict=True)
    ]
    surplus = sum(int((a ^ b).sum()) for a, b in zip(masks, fitting, strict=True))
    if surplus and not any(own.too_small for own in leaves if own is not None):
        for own in leaves:
            if own is not None:
                own.too_small = True
        warnings.warn(
            f"{kind} chose {surplus} neurons more than the capacity of this compact model has room "
            "for: where it is so, a random choice of them trains",
            stacklevel=4,
        )
    return fitting
