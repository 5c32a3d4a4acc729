"""A small network, and epochs of training it under a Controller."""

import torch
import torch.nn.functional as F
from torch import nn

import neq


class Net(nn.Module):
    """Convolution, norms, tokens, a layer used twice, one unused, dropout, and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.tokens = nn.Linear(6, 6)
        self.layernorm = nn.LayerNorm(6)
        self.unused = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True).flatten(2).transpose(1, 2)
        x = self.tokens(F.gelu(self.tokens(x)))
        return self.head(self.drop(self.layernorm(x)).mean(1))


def data(samples=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 6, 6, generator=generator)
    return x, torch.randint(4, (samples,), generator=generator)


def build(policy=None, optimizer=torch.optim.SGD, seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    arguments = {"lr": 0.05, "weight_decay": 1e-2}
    if optimizer is torch.optim.SGD:
        arguments["momentum"] = 0.9
    optimizer = optimizer(model.parameters(), **arguments)
    options.setdefault("probe", data()[0][:6])
    policy = neq.Equilibrium(0.03) if policy is None else policy
    return model, optimizer, neq.Controller(model, policy=policy, optimizer=optimizer, **options)


def train(model, optimizer, epochs=1, control=None):
    x, labels = data()
    records = []
    for _ in range(epochs):
        model.train()
        for batch in range(0, len(x), 8):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch : batch + 8]), labels[batch : batch + 8]).backward()
            optimizer.step()
        if control is not None:
            records.append(control.step())
    return records


def masks(control):
    return {name: first.active_mask.clone() for name, (first, *_) in control.layers.items()}
