"""A network with a frozen prefix, and data for it."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neq

SAMPLES, BATCH = 20, 8


class Net(nn.Module):
    """Code of its own between modules, in place too, an output that is no tensor, a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.drop = nn.Dropout(0.5)
        self.pair = Pair()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.breaks = False

    def forward(self, x, *, scale=1.0):
        x = self.drop(self.stem(x))
        if self.breaks:
            raise TypeError
        x += 1
        x = F.relu(x, inplace=True)
        x = self.pair(x * scale)["y"]
        x = x + F.relu(self.conv(x))
        return self.head(x.mean((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.conv.register_forward_hook(self.count)
        self.runs = 0

    @torch.compiler.disable
    def count(self, module, args, output):
        self.runs += 1

    def forward(self, x):
        return {"y": self.conv(x), "none": None, "number": 3}


def net():
    torch.manual_seed(0)
    return Net()


def images(count=SAMPLES):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 3, 6, 6), torch.arange(count) % 4)


def loader_of(data=None, **options):
    return DataLoader(images() if data is None else data, batch_size=BATCH, **options)


def frozen(model=None):
    model = net() if model is None else model
    prefix = neq.Prefix(model, torch.randn(2, 3, 6, 6), at=["pair"])
    prefix.freeze(1)
    return model, prefix


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(model, loader, epochs=3):
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return [step(model, optimizer, x, y) for _ in range(epochs) for x, y in loader]
