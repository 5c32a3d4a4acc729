"""bench/problems.py: the shapes are those of the networks."""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from bench.lib import networks
from bench.lib.problems import MODELS, QUICK, problems


def test_suites():
    full = problems("full", "cpu")
    assert len({problem.name for problem in full}) == len(full)
    assert [problem.name for problem in problems("quick", "cpu")] == QUICK
    on_gpu = problems("full", "cuda")
    assert [p.name for p in on_gpu] == [p.name for p in full]
    assert all(big.batch > small.batch for big, small in zip(on_gpu, full, strict=True))


def test_resnet32_has_as_many_weights_as_in_the_paper():
    assert sum(p.count * prod(p.weight) for p in MODELS["resnet32"].layers) // 10_000 == 46


CONFIGS = {
    **networks.CONFIGS,
    "convnext-t": transformers.ConvNextConfig,
    "vit-b": transformers.ViTConfig,
    "vit-l": lambda: transformers.ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "llama-8b": lambda: transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=8,
    ),
}


def shapes_of(model, inputs):
    """The weight gradients that the model computes, by running it without computing anything."""
    seen = Counter()

    def note(layer, given, y):
        (x,) = given
        weight = layer.weight
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.stride, layer.padding, layer.groups)
        else:
            transposed = isinstance(layer, Conv1D)
            weight = weight.t() if transposed else weight
            x, y, geometry = x.flatten(0, -2), y.flatten(0, -2), (transposed,)
        seen[x.shape, y.shape, weight.shape, layer.bias is not None, geometry] += 1

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | Conv1D):
            layer.register_forward_hook(note)
    model(inputs)
    return seen


def shape_of(problem):
    geometry = (problem.column_major,)
    if problem.kernel:
        geometry = ((problem.stride,) * 2, (problem.padding,) * 2, problem.groups)
    return problem.x, problem.dy, problem.weight, problem.bias, geometry


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"resnet32"}))
def test_the_shapes_are_those_of_the_models(name):
    config, size = (
        CONFIGS[name](),
        next(p for p in problems("full", "cpu") if p.name.startswith(name)),
    )
    config.num_labels = 1000
    if name.startswith(("gpt2", "llama")):
        kind = (
            transformers.AutoModelForCausalLM if name.startswith("gpt2") else transformers.AutoModel
        )
        inputs = torch.zeros(3, *size.pixels, dtype=torch.long, device="meta")
    else:
        kind = transformers.AutoModelForImageClassification
        inputs = torch.zeros(3, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = kind.from_config(config)
    ours = Counter()
    for problem in problems("full", "cpu"):
        if problem.name.startswith(f"{name}/"):
            ours[shape_of(replace(problem, batch=3))] += problem.count
    assert ours == shapes_of(model, inputs)
