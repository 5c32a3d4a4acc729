"""Benchmarks in small."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from bench.networks import LAYOUTS, Network, images, text
from bench.problems import Problem

CPU = torch.device("cpu")


class TinyClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.fc = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, pixel_values, labels):
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = F.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return {"loss": F.cross_entropy(self.fc(F.relu(self.hidden(x))), labels)}


def tiny_gpt2():
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=6, use_cache=False,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


IMAGES = Network(TinyClassifier, partial(images, 8, 5), 4, 4, "SGD", LAYOUTS)

TEXT = Network(tiny_gpt2, partial(text, 6, 20), 2, 2, "AdamW")


PROBLEMS = [
    Problem("tiny/linear", 6, 8, (5,), batch=2),
    Problem("tiny/transposed", 6, 8, (5,), transposed=True, bias=False),
    Problem("tiny/conv", 3, 8, (7, 6), 3, stride=2, padding=1, batch=2, count=3),
    Problem("tiny/depthwise", 8, 8, (5, 5), 3, padding=1, groups=8, bias=False, batch=2),
]


def results_of(bench, folder, *arguments):
    """Runs a benchmark with some arguments; its rows."""
    file = folder / "results.json"
    bench.main(["--device", "cpu", "--seconds", "0.001", "--json", str(file), *arguments])
    return json.loads(file.read_text())["results"]


def assert_refused(parse, arguments, message, capsys):
    """As a command does: with its usage and exit status 2."""
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
