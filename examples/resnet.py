"""Residual networks as He et al. published them in 2015."""

from collections import OrderedDict
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A basic block; ``shortcut`` A subsamples and pads with zeros, B projects."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2
        self.project: nn.Module = nn.Identity()
        if shortcut == "B" and stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.project, self.pad = nn.Sequential(conv, nn.BatchNorm2d(outputs)), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = self.project(x)
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


def resnet(
    stem: Mapping[str, nn.Module], widths: tuple[int, ...], blocks: int, shortcut: str, classes: int
) -> nn.Sequential:
    modules, inputs = dict(stem), widths[0]
    for number, width in enumerate(widths, start=1):
        stage = []
        for i in range(blocks):
            stage.append(Block(inputs, width, 2 if i == 0 and number > 1 else 1, shortcut))
            inputs = width
        modules[f"layer{number}"] = nn.Sequential(*stage)
    modules |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    modules["fc"] = nn.Linear(inputs, classes)
    model = nn.Sequential(OrderedDict(modules))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def resnet32(classes: int = 10) -> nn.Sequential:
    """For CIFAR: 31 convolutions of 3x3, shortcuts without parameters."""
    stem = {"conv1": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": nn.BatchNorm2d(16)}
    return resnet(stem | {"relu": nn.ReLU()}, (16, 32, 64), 5, "A", classes)


def resnet18(classes: int = 1000) -> nn.Sequential:
    """For ImageNet."""
    stem = {"conv1": nn.Conv2d(3, 64, 7, 2, 3, bias=False), "bn1": nn.BatchNorm2d(64)}
    pool = {"relu": nn.ReLU(), "maxpool": nn.MaxPool2d(3, 2, 1)}
    return resnet(stem | pool, (64, 128, 256, 512), 2, "B", classes)
