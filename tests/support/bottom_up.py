"""A training that only has blocks, optimizers and a loss, and velocities made up for it."""

from types import SimpleNamespace

import torch
from torch import nn

import neq
from neq.layers.active import as_mask

NAN = float("nan")


class Told:
    """What a policy is told, and asks: a network of three blocks and a head."""

    def __init__(self, policy, lr=0.1):
        torch.manual_seed(0)
        self.model = neq.convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
        self.optimizers = [torch.optim.SGD(self.model.parameters(), lr=lr)]
        self.blocks = [
            SimpleNamespace(name=str(i), parameters=(f"{i}.weight", f"{i}.bias")) for i in range(3)
        ]
        self.layers, self.loss, self.epoch = {}, None, 0
        self.policy = policy
        policy.attach(self)

    def motions(self, *speeds):
        """Of each block its neurons' velocities; of the last ones, none is given if they move."""
        speeds = [*speeds, *[[1.0] * 4] * (4 - len(speeds))]
        return [
            neq.Motion(
                str(i),
                self.model[i],
                torch.ones(4, dtype=torch.float64),
                torch.tensor([v] * 4 if isinstance(v, float) else v, dtype=torch.float64),
                torch.ones(4, dtype=torch.bool),
                i if i < 3 else None,
            )
            for i, v in enumerate(speeds)
        ]

    def after(self, *speeds, loss=None, steps=0):
        """The depth that is chosen after an epoch of so many steps, in which neurons moved so."""
        for _ in range(steps):
            self.step()
        self.epoch += 1
        if loss is not None:
            self.loss = loss
        return self.policy.depth(self.motions(*speeds), self.epoch)

    def step(self):
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        self.optimizers[0].step()

    def rows(self, *speeds):
        motions = self.motions(*speeds)
        chosen = self.policy.choose(motions, self.epoch)
        masks = [as_mask(rows, 4, "") for rows in chosen]
        return [mask.nonzero().flatten().tolist() for mask in masks]
