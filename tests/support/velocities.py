"""Policies, and velocities made up for them."""

import math

import torch
from torch import nn

import neq
from neq.layers.active import as_mask

NAN = math.nan


def motion(velocity, active=None, name="layer"):
    velocity = torch.tensor(velocity, dtype=torch.float64)
    active = torch.ones(len(velocity)) if active is None else torch.tensor(active)
    layer = neq.convert(nn.Sequential(nn.Linear(1, len(velocity))))[0]
    return neq.Motion(name, layer, torch.ones_like(velocity), velocity, active.bool())


def chosen_rows(policy, *motions, epoch=1):
    """The rows chosen in each layer."""
    chosen = policy.choose(motions, epoch)
    masks = [as_mask(rows, len(m), m.name) for rows, m in zip(chosen, motions, strict=True)]
    return [mask.nonzero().flatten().tolist() for mask in masks]


def controller(policy, model=None, **options):
    if model is None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    options = {"optimizer": (), "probe": torch.ones(2, 4), "leave_alone": ()} | options
    return neq.Controller(model, policy=policy, **options)
