"""The weight gradients that real models compute, as data.

Shapes are those of the transformers library's models (google/vit, microsoft/swin, openai gpt2,
meta-llama, facebook/convnext and microsoft/resnet configurations); a test builds these models on
the meta device and compares. ResNet-32 is the CIFAR network of He et al. 2015, with the shortcuts
that have no parameters. Layers of a model that pose the same problem are listed once, with their
count.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple


@dataclass(frozen=True)
class Problem:
    """One layer's weight gradient. Sizes are those of one sample; the batch is the model's."""

    name: str
    inputs: int
    neurons: int
    pixels: tuple[int, ...]  # of the layer's input; the tokens of a linear layer
    kernel: int = 0  # 0: a linear layer
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True
    column_major: bool = False  # a linear weight stored as [inputs, neurons], as in GPT-2
    count: int = 1
    batch: int = 1

    @property
    def op(self) -> str:
        return "conv_wgrad" if self.kernel else "linear_wgrad"

    @property
    def x(self) -> tuple[int, ...]:
        if self.kernel:
            return (self.batch, self.inputs, *self.pixels)
        return (self.batch * prod(self.pixels), self.inputs)

    @property
    def dy(self) -> tuple[int, ...]:
        if self.kernel:
            reach = 2 * self.padding - self.kernel
            return (
                self.batch,
                self.neurons,
                *((p + reach) // self.stride + 1 for p in self.pixels),
            )
        return (self.batch * prod(self.pixels), self.neurons)

    @property
    def weight(self) -> tuple[int, ...]:
        """[neurons, inputs / groups, *kernel], also if it is column-major."""
        return (self.neurons, self.inputs // self.groups, *(self.kernel,) * (len(self.x) - 2))

    @property
    def layouts(self) -> tuple[str, ...]:
        """The ways to store its tensors: two for images, one for a matrix."""
        if self.kernel:
            return ("contiguous", "channels_last")
        return ("column_major",) if self.column_major else ("contiguous",)

    @property
    def shape(self) -> str:
        """For people: the layer's input, its neurons, and the geometry of a convolution."""
        sizes = f"{'x'.join(map(str, self.x))} -> {self.neurons}"
        if not self.kernel:
            return sizes
        stride = f"/{self.stride}" if self.stride > 1 else ""
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{sizes} {self.kernel}x{self.kernel}{stride}{groups}"


class Model(NamedTuple):
    cpu: int  # batch on a CPU: a dense gradient takes some 5 to 100 ms on two cores
    gpu: int  # batch on a GPU: enough to fill a large one
    layers: list[Problem]


def linear(
    name: str,
    tokens: int,
    inputs: int,
    neurons: int,
    count: int = 1,
    *,
    bias: bool = True,
    column_major: bool = False,
) -> Problem:
    return Problem(
        name, inputs, neurons, (tokens,), bias=bias, column_major=column_major, count=count
    )


def conv(
    name: str,
    size: int,
    inputs: int,
    neurons: int,
    kernel: int,
    stride: int = 1,
    count: int = 1,
    *,
    padding: int | None = None,
    groups: int = 1,
    bias: bool = False,
) -> Problem:
    """On a square image of ``size`` pixels a side, padded by half a kernel unless told."""
    padding = kernel // 2 if padding is None else padding
    pixels = (size, size)
    return Problem(
        name, inputs, neurons, pixels, kernel, stride, padding, groups, bias, count=count
    )


def patches(size: int, neurons: int) -> Problem:
    """The first layer of a vision transformer, on 224 x 224 RGB."""
    return conv("patches", 224, 3, neurons, size, size, padding=0, bias=True)


RESNET32 = [
    conv("conv1", 32, 3, 16, 3),
    conv("layer1", 32, 16, 16, 3, count=10),
    conv("layer2.0.conv1", 32, 16, 32, 3, 2),
    conv("layer2", 16, 32, 32, 3, count=9),
    conv("layer3.0.conv1", 16, 32, 64, 3, 2),
    conv("layer3", 8, 64, 64, 3, count=9),
    linear("fc", 1, 64, 10),
]

RESNET18 = [
    conv("conv1", 224, 3, 64, 7, 2),
    conv("layer1", 56, 64, 64, 3, count=4),
    conv("layer2.0.conv1", 56, 64, 128, 3, 2),
    conv("layer2", 28, 128, 128, 3, count=3),
    conv("layer2.shortcut", 56, 64, 128, 1, 2),
    conv("layer3.0.conv1", 28, 128, 256, 3, 2),
    conv("layer3", 14, 256, 256, 3, count=3),
    conv("layer3.shortcut", 28, 128, 256, 1, 2),
    conv("layer4.0.conv1", 14, 256, 512, 3, 2),
    conv("layer4", 7, 512, 512, 3, count=3),
    conv("layer4.shortcut", 14, 256, 512, 1, 2),
    linear("fc", 1, 512, 1000),
]

RESNET50 = [
    conv("conv1", 224, 3, 64, 7, 2),
    conv("layer1.0.conv1", 56, 64, 64, 1),
    conv("layer1.conv1", 56, 256, 64, 1, count=2),
    conv("layer1.conv2", 56, 64, 64, 3, count=3),
    conv("layer1.conv3", 56, 64, 256, 1, count=4),  # and the shortcut
    conv("layer2.0.conv1", 56, 256, 128, 1),
    conv("layer2.0.conv2", 56, 128, 128, 3, 2),
    conv("layer2.conv1", 28, 512, 128, 1, count=3),
    conv("layer2.conv2", 28, 128, 128, 3, count=3),
    conv("layer2.conv3", 28, 128, 512, 1, count=4),
    conv("layer2.shortcut", 56, 256, 512, 1, 2),
    conv("layer3.0.conv1", 28, 512, 256, 1),
    conv("layer3.0.conv2", 28, 256, 256, 3, 2),
    conv("layer3.conv1", 14, 1024, 256, 1, count=5),
    conv("layer3.conv2", 14, 256, 256, 3, count=5),
    conv("layer3.conv3", 14, 256, 1024, 1, count=6),
    conv("layer3.shortcut", 28, 512, 1024, 1, 2),
    conv("layer4.0.conv1", 14, 1024, 512, 1),
    conv("layer4.0.conv2", 14, 512, 512, 3, 2),
    conv("layer4.conv1", 7, 2048, 512, 1, count=2),
    conv("layer4.conv2", 7, 512, 512, 3, count=2),
    conv("layer4.conv3", 7, 512, 2048, 1, count=3),
    conv("layer4.shortcut", 14, 1024, 2048, 1, 2),
    linear("fc", 1, 2048, 1000),
]


def convnext(width: int, depths: tuple[int, ...]) -> list[Problem]:
    """For its depthwise convolutions."""
    layers = [patches(4, width)]
    for stage, depth in enumerate(depths):
        w, size = width << stage, 56 >> stage
        if stage:
            layers.append(
                conv(f"stage{stage}.down", 2 * size, w // 2, w, 2, 2, padding=0, bias=True)
            )
        layers += [
            conv(f"stage{stage}.dwconv", size, w, w, 7, count=depth, groups=w, bias=True),
            linear(f"stage{stage}.pwconv1", size * size, w, 4 * w, depth),
            linear(f"stage{stage}.pwconv2", size * size, 4 * w, w, depth),
        ]
    return [*layers, linear("classifier", 1, w, 1000)]


def swin(width: int, depths: tuple[int, ...]) -> list[Problem]:
    layers = [patches(4, width)]
    for stage, depth in enumerate(depths):
        w, tokens = width << stage, (56 >> stage) ** 2
        if stage:
            layers.append(linear(f"stage{stage}.merge", tokens, 2 * w, w, bias=False))
        layers += transformer(f"stage{stage}.", tokens, w, 4 * w, depth)
    return [*layers, linear("classifier", 1, w, 1000)]


def vit(width: int, depth: int) -> list[Problem]:
    blocks = transformer("", 197, width, 4 * width, depth)
    return [patches(16, width), *blocks, linear("classifier", 1, width, 1000)]


def transformer(stage: str, tokens: int, width: int, mlp: int, depth: int) -> list[Problem]:
    return [
        linear(f"{stage}attention", tokens, width, width, 4 * depth),  # query, key, value, output
        linear(f"{stage}mlp.up", tokens, width, mlp, depth),
        linear(f"{stage}mlp.down", tokens, mlp, width, depth),
    ]


def gpt2(width: int, depth: int) -> list[Problem]:
    tokens = 512
    return [
        linear("c_attn", tokens, width, 3 * width, depth, column_major=True),
        linear("attn.c_proj", tokens, width, width, depth, column_major=True),
        linear("mlp.c_fc", tokens, width, 4 * width, depth, column_major=True),
        linear("mlp.c_proj", tokens, 4 * width, width, depth, column_major=True),
        linear("lm_head", tokens, width, 50257, bias=False),
    ]


def llama(width: int, mlp: int, keys: int, depth: int) -> list[Problem]:
    tokens = 256
    return [
        linear("q_proj, o_proj", tokens, width, width, 2 * depth, bias=False),
        linear("k_proj, v_proj", tokens, width, keys, 2 * depth, bias=False),
        linear("gate_proj, up_proj", tokens, width, mlp, 2 * depth, bias=False),
        linear("down_proj", tokens, mlp, width, depth, bias=False),
    ]


MODELS = {
    "resnet32": Model(100, 1024, RESNET32),
    "resnet18": Model(8, 256, RESNET18),
    "resnet50": Model(4, 256, RESNET50),
    "convnext-t": Model(4, 128, convnext(96, (3, 3, 9, 3))),
    "swin-t": Model(4, 128, swin(96, (2, 2, 6, 2))),
    "swin-b": Model(4, 128, swin(128, (2, 2, 18, 2))),
    "vit-s": Model(8, 256, vit(384, 12)),
    "vit-b": Model(4, 128, vit(768, 12)),
    "vit-l": Model(2, 64, vit(1024, 24)),
    "gpt2": Model(1, 32, gpt2(768, 12)),
    "gpt2-medium": Model(1, 32, gpt2(1024, 24)),
    "llama-1b": Model(1, 64, llama(2048, 8192, 512, 16)),
    "llama-8b": Model(1, 64, llama(4096, 14336, 1024, 32)),
}

# One of each kind: narrow and wide, large images and small, 3x3, 1x1 and strided, few inputs and
# many, tall and flat products.
QUICK = [
    "resnet32/layer1",
    "resnet32/layer3",
    "resnet50/conv1",
    "resnet50/layer1.conv3",
    "resnet50/layer2.conv2",
    "resnet50/layer3.shortcut",
    "resnet50/layer4.conv2",
    "swin-t/stage0.mlp.up",
    "swin-t/stage2.merge",
    "vit-s/mlp.down",
    "gpt2/c_attn",
    "gpt2/mlp.c_fc",
    "llama-1b/gate_proj, up_proj",
]


def problems(suite: str, device: str) -> list[Problem]:
    """The suite "quick" or "full": problems named model/layer, sized for a "cpu" or "cuda"."""
    everything = list(_all(device))
    if suite == "full":
        return everything
    return [problem for problem in everything if problem.name in QUICK]


def _all(device: str) -> Iterator[Problem]:
    for name, model in MODELS.items():
        batch = model.gpu if device == "cuda" else model.cpu
        for layer in model.layers:
            yield replace(layer, name=f"{name}/{layer.name}", batch=batch)
