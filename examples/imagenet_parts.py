"""Models by name and images by folder, for examples/imagenet.py."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from examples.cifar_data import Normal, made_up
from examples.resnet import Block

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels

Data = Dataset[tuple[Tensor, Tensor]]


def network(name: str, classes: int) -> nn.Module:
    """A new model of torchvision or timm, or a tiny one of our own.

    Raises:
        ValueError: If no installed library has it.
    """
    if name == "tiny":
        blocks = Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Linear(16, classes))
    if find_spec("torchvision"):
        from torchvision import models

        if name in models.list_models(module=models):
            found: nn.Module = models.get_model(name, num_classes=classes)
            return found
    if find_spec("timm"):
        import timm

        if timm.is_model(name):
            return timm.create_model(name, num_classes=classes)
    installed = [library for library in ("torchvision", "timm") if find_spec(library)]
    raise ValueError(
        f"--model {name}: neither tiny nor a model of torchvision or timm, of which "
        f"{' and '.join(installed) or 'none'} is installed"
    )


def datasets(folder: Path | None, size: int) -> tuple[Data, Data, int]:
    """What to train on, what to test with, and the number of classes.

    Raises:
        ValueError: If there is a folder to be read and no torchvision, or it lacks images.
    """
    if folder is None:
        data = made_up(256, 64)
        normal = Normal(data.train.pixels)
        parts = [TensorDataset(normal(part.pixels), part.labels) for part in data[2:]]
        return parts[0], parts[1], len(data.classes)
    if not find_spec("torchvision"):
        raise ValueError(f"--data {folder} needs torchvision: pip install torchvision")
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
    random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *last])
    central = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *last])
    train, test = ImageFolder(folder / "train", random), ImageFolder(folder / "val", central)
    return train, test, len(train.classes)
