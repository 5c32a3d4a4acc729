"""The network and the optimizer's recipe of airbench93 and airbench94 (Keller Jordan, 2024)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neq

WIDTHS = {"94": (64, 256, 256), "93": (64, 128, 128)}  # channels of the three blocks
PARTS = "stem", "block1", "block2", "block3", "head"
WHITENED = 24  # each of the 12 directions of a patch of 2 x 2 pixels, and its negative

LR, MOMENTUM, WEIGHT_DECAY = 11.5, 0.85, 0.0153  # the rate and the decay are for 1024 images
NORM_BIAS_LR = 64  # times the rate
# momentum adds up gradients: 1 / (1 - m) of each, and Nesterov's step another one
KILOSTEP = 1024 * (1 + 1 / (1 - MOMENTUM))


def network(net: str, width: float, classes: int) -> nn.Sequential:
    """A stem that whitens patches, three blocks of two convolutions, and a linear head.

    net: its channels, "94" or "93"; width: a factor for them.
    """
    channels = [WHITENED, *(max(1, round(width * n)) for n in WIDTHS[net])]
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Conv2d(3, WHITENED, 2), nn.GELU())
    model.stem[0].weight.requires_grad = False
    nn.init.zeros_(model.stem[0].bias)
    for i, part in enumerate(PARTS[1:-1]):
        model.add_module(part, _block(channels[i], channels[i + 1]))
    model.head = nn.Sequential(
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes, bias=False), Scale()
    )
    return model.to(memory_format=torch.channels_last)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(_conv(inputs, outputs), nn.MaxPool2d(2), _norm(outputs), nn.GELU()),
        *(_conv(outputs, outputs), _norm(outputs), nn.GELU()),
    )


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])  # the first outputs start as copies of the inputs
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)  # torch's: the weight of the new
    norm.weight.requires_grad = False
    return norm


class Scale(nn.Module):
    """Logits that start small."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 9


@torch.no_grad()
def whiten(stem: nn.Conv2d, images: Tensor) -> None:
    """Give the stem the directions in which patches of these images vary, scaled to vary by one.

    images: normalised, [n, 3, height, width]
    """
    patches = F.unfold(images, stem.kernel_size).transpose(1, 2).flatten(0, 1)  # [n, 12]
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # in columns
    filters = (directions / (variances + 5e-4).sqrt()).T.flip(0)  # the largest variance first
    stem.weight.copy_(torch.cat((filters, -filters)).view_as(stem.weight))


def groups(model: nn.Module, batch: int, lr: float) -> list[dict[str, object]]:
    """The optimizer's groups, for a loss that is a sum over the batch. lr: a factor for the rate.

    Weight decay is decoupled: a step takes the same share of a weight whatever its rate.
    """
    biases = {module.bias for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = WEIGHT_DECAY * batch / KILOSTEP
    rates = {True: lr * LR / KILOSTEP * NORM_BIAS_LR, False: lr * LR / KILOSTEP}
    return [
        {
            "params": [p for p in trained if (p in biases) == is_bias],
            "lr": rate,
            "full_lr": rate,
            "weight_decay": decay / rate,
        }
        for is_bias, rate in rates.items()
    ]


def triangle(done: float) -> float:
    """The rate's factor when this share of the run is done: up from .2, then down to .07."""
    peak = 0.23
    if done < peak:
        return 0.2 + 0.8 * done / peak
    return 1 - 0.93 * (done - peak) / (1 - peak)


class Lookahead:
    """Slow copies of the weights and of the norms' statistics, that the fast ones return to.

    Published, it moves all of them. Here it leaves alone what does not train: of a frozen row or a
    frozen norm the slow copy becomes the fast one, so nothing moves it, not even later.
    """

    def __init__(self, model: nn.Module) -> None:
        self.slow = {name: t.clone() for name, t in _floats(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, keep: float) -> None:
        """keep: the weight of the slow copies."""
        trains = dict(_trains(model))
        for name, fast in _floats(model):
            slow, train = self.slow[name], trains[name]
            if isinstance(train, Tensor):
                slow.copy_(torch.where(train, slow.lerp(fast, 1 - keep), fast))
            elif train:
                slow.lerp_(fast, 1 - keep)
            else:
                slow.copy_(fast)
                continue
            fast.copy_(slow)

    @staticmethod
    def keep(done: float) -> float:
        """What to give to ``update`` when this share of the run is done."""
        return float(0.95**5 * done**3)


def _floats(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, t) for name, t in model.state_dict().items() if t.is_floating_point())


def _trains(model: nn.Module) -> Iterable[tuple[str, Tensor | bool]]:
    """For each name in the state: does it train? Of a layer by rows a mask."""
    for path, module in model.named_modules():
        by_rows = isinstance(module, neq.NeuronLayer) and module.active_fraction < 1
        for name, p in module.named_parameters(path, recurse=False):
            rows: Tensor | bool = True
            if by_rows:
                mask = module.active_mask
                rows = module.spread(mask) if p is module.weight else mask
            yield name, rows if p.requires_grad else False
        for name, _ in module.named_buffers(path, recurse=False):
            yield name, module.training and not (by_rows and module.active_fraction == 0)
