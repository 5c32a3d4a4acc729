"""ResNets for small images, as He et al. published them in 2015."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A basic block. Its shortcut has no parameters: it subsamples and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


def resnet32(classes: int = 10) -> nn.Sequential:
    """31 convolutions of 3x3 and a linear layer."""
    return resnet(32, 3, classes)


def resnet(depth: int, channels: int, classes: int) -> nn.Sequential:
    """depth: 6 n + 2, of three stages of n blocks. channels: of an image."""
    more = (depth - 2) // 6 - 1  # blocks of a stage behind its first
    model = nn.Sequential()
    model.conv1, model.bn1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
    model.relu = nn.ReLU()
    model.layer1 = nn.Sequential(Block(16, 16, 1), *(Block(16, 16, 1) for _ in range(more)))
    model.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(more)))
    model.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(more)))
    model.pool, model.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.fc = nn.Linear(64, classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model
