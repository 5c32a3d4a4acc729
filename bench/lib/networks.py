"""Models for whole training steps: the transformers library's, with random weights; ResNet-32.

Each takes its batch as keywords and returns something with a "loss". No model has dropout or drops
paths: two steps on one batch compute the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from examples.resnet import resnet32

Batch = dict[str, Tensor]


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]  # of so many samples
    # samples on a CPU: a step takes about half a second on two cores; 0: the network is too large
    cpu: int
    gpu: int  # samples on a GPU of 141 GB
    optimizer: str  # in torch.optim, and in neq.optim
    layouts: tuple[str, ...] = ("contiguous",)  # of its images, worth trying


class Classifier(nn.Module):
    """The loss of a model that maps images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.model(pixel_values), labels)}


CONFIGS: dict[str, Callable[[], Any]] = {
    "resnet18": lambda: transformers.ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]
    ),
    "resnet50": transformers.ResNetConfig,
    "swin-t": lambda: transformers.SwinConfig(drop_path_rate=0.0),
    "swin-b": lambda: transformers.SwinConfig(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], drop_path_rate=0.0
    ),
    "vit-s": lambda: transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536
    ),
    "gpt2": lambda: _gpt2(),
    "gpt2-medium": lambda: _gpt2(n_embd=1024, n_layer=24, n_head=16),
    "llama-1b": lambda: transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    ),
}


def _gpt2(**sizes: int) -> Any:
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2Config(**sizes, **no_dropout)


def cifar_classifier() -> nn.Module:
    return Classifier(resnet32())


def classifier(name: str) -> nn.Module:
    config = CONFIGS[name]()
    config.num_labels = 1000
    return transformers.AutoModelForImageClassification.from_config(config)


def language_model(name: str) -> nn.Module:
    config = CONFIGS[name]()
    config.use_cache = False  # keys and values are kept to generate text
    return transformers.AutoModelForCausalLM.from_config(config)


def images(size: int, classes: int, count: int) -> Batch:
    return {
        "pixel_values": torch.randn(count, 3, size, size),
        "labels": torch.randint(classes, (count,)),
    }


def text(tokens: int, vocabulary: int, count: int) -> Batch:
    ids = torch.randint(vocabulary, (count, tokens))
    return {"input_ids": ids, "labels": ids}


def _vision(name: str, cpu: int, gpu: int, *others: Any) -> Network:
    return Network(partial(classifier, name), partial(images, 224, 1000), cpu, gpu, *others)


def _language(name: str, tokens: int, vocabulary: int, cpu: int, gpu: int) -> Network:
    build, batch = partial(language_model, name), partial(text, tokens, vocabulary)
    return Network(build, batch, cpu, gpu, "AdamW")


LAYOUTS = ("contiguous", "channels_last")
NETWORKS = {
    "resnet32": Network(cifar_classifier, partial(images, 32, 10), 100, 1024, "SGD", LAYOUTS),
    "resnet18": _vision("resnet18", 8, 256, "SGD", LAYOUTS),
    "resnet50": _vision("resnet50", 4, 256, "SGD", LAYOUTS),
    "swin-t": _vision("swin-t", 3, 128, "AdamW"),
    "vit-s": _vision("vit-s", 4, 256, "AdamW"),
    "gpt2": _language("gpt2", 256, 50_257, 1, 64),
    "swin-b": _vision("swin-b", 0, 128, "AdamW"),
    "gpt2-medium": _language("gpt2-medium", 512, 50_257, 0, 32),
    "llama-1b": _language("llama-1b", 512, 128_256, 0, 32),
}
QUICK = ("resnet32", "resnet18", "vit-s")


def networks(suite: str, device: str) -> dict[str, Network]:
    """The networks of the suite "quick" or "full" that a "cpu" or "cuda" device can train."""
    return {
        name: network
        for name, network in NETWORKS.items()
        if (suite == "full" or name in QUICK) and (device == "cuda" or network.cpu)
    }
