"""Small networks of many shapes, to be cut."""

import torch
import torch.nn.functional as F
from torch import nn

import neq


def perceptron():
    return nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    )


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, width)

    def forward(self, x):
        return x + self.b(self.act(self.a(x)))


class ResidualConv(nn.Module):
    """With a convolution on its shortcut."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.a, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.b, self.shortcut = nn.Conv2d(outputs, outputs, 1), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.norm(self.a(x)))) + self.shortcut(x))


def resnet():
    """[samples, 3, 8, 8] to 4 classes."""
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    model.blocks = nn.Sequential(ResidualConv(6, 6), ResidualConv(6, 8))
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.drop, model.head = nn.Dropout(0.5), nn.Linear(8, 4)
    return model


class UNet(nn.Module):
    """One skip from before the lowest level to after it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down, self.bottom = nn.Conv2d(4, 6, 2, stride=2), nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.Conv2d(10, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.encoder_outputs = 0

    def forward(self, x):
        fine = F.relu(self.stem(x))
        coarse = F.relu(self.bottom(F.relu(self.down(fine))))
        self.encoder_outputs = len((fine, coarse))
        return self.head(
            F.relu(self.up(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1)))
        )


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.images, self.words = nn.Linear(4, 3), nn.EmbeddingBag(9, 3)
        self.merge = nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, image, text):
        return self.head(self.merge(self.images(image) + self.words(text)))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Functional(nn.Module):
    """Its first layers are functions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4))
        self.scale, self.body = Scale(4), nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = F.linear(x, self.first).relu() * self.scale.weight
        return self.head(self.body(x))


class Tied(nn.Module):
    """A language model whose first and last layer share a weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Sequential(Residual(4), Residual(4))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.drop(self.embed(ids))))


class OneDropout(nn.Module):
    """One dropout module in many places, and a function that asks whether it is training."""

    def __init__(self):
        super().__init__()
        self.stem, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.body = nn.ModuleList([Residual(4), Residual(4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.dropout(self.stem(x), 0.3, self.training)
        for block in self.body:
            x = block(self.drop(x))
        return self.head(self.drop(x))


class Mask(nn.Module):
    def forward(self, x):
        return x > 0


class Masked(nn.Module):
    """A module returns something without a gradient."""

    def __init__(self):
        super().__init__()
        self.mask, self.body, self.head = Mask(), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        keep = self.mask(x)
        return self.head(self.body(x) * keep)


class Attending(nn.Module):
    """A module that returns a tuple, with None in it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x))


class SharedNorm(nn.Module):
    """One batch norm behind two layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.one, self.two = Normed(), Normed()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.two(self.one(x, self.norm), self.norm))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, norm):
        return F.relu(norm(self.linear(x)))


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 4


def frozen(depth=2, model=None, x=IMAGES):
    model = resnet() if model is None else model
    prefix = neq.Prefix(model, x)
    prefix.freeze(depth)
    return model, prefix


def outputs(model, name, x):
    """What a module of the model returns in a forward with gradients."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y))
    model(x)
    handle.remove()
    (y,) = seen
    return y


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def step(model, optimizer, x=IMAGES, set_to_none=True):
    optimizer.zero_grad(set_to_none)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
