"""examples/finetune_text.py: it learns, compares equal steps, and resumes."""

import json

import pytest
import torch
import transformers

from examples import finetune_text
from examples.text_data import load

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:neq.compact", "ignore:.* more than the capacity"),
]

CLASSIFIER = 4 * (2 * 32 + 2)  # bytes: it trains whole, without a leaf
TINY = "--packages json email --limit 24 --test-limit 8 --batch 8 --length 16 --device cpu".split()


@pytest.fixture
def tiny(monkeypatch):
    """The same kind of model, with random weights."""

    def pretrained(classes):
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            num_labels=classes,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config), tokenizer

    tokenizer = finetune_text.pretrained(2)[1]
    monkeypatch.setattr(finetune_text, "pretrained", pretrained)
    monkeypatch.setattr(finetune_text, "LORA_RANK", 2)
    monkeypatch.setattr(finetune_text, "DEFAULT_LR", 1e-2)


@pytest.fixture
def run(tmp_path):
    def run(*arguments, output=tmp_path / "out"):
        finetune_text.main([*TINY, "--output", str(output), *arguments])
        return json.loads((output / "results.json").read_text())["results"]

    return run


def test_the_pretrained_model(run):
    (row,) = run(*"--epochs 1 --seeds 0 --limit 8 --way compact-random-0.1".split())
    assert row["weights"] > 22e6 * 4
    assert row["gradients"] < 0.12 * 11e6 * 4  # the embeddings are frozen


@pytest.mark.usefixtures("tiny")
def test_every_way(run, capsys):
    rows = run("--epochs", "1", "--seeds", "0")
    by_way = {row["way"]: row for row in rows}
    assert [*by_way] == [*finetune_text.WAYS]
    full = by_way["full"]
    for way, row in by_way.items():
        assert 0 <= row["accuracy"] <= 1
        assert row["activations"] > 0
        if way != "full":
            assert row["gradients"] < full["gradients"], way
        if way.startswith("compact"):
            assert row["optimizer"] == 2 * row["gradients"] < 0.15 * full["optimizer"], way
            assert row["weights"] == full["weights"] + row["gradients"] - CLASSIFIER
    assert "compact-random-0.1" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_it_learns_and_resumes(run, tmp_path):
    options = ("--way", "compact-random-0.25", "--seeds", "3")
    straight = run("--epochs", "3", *options)
    assert straight[-1]["loss"] < straight[0]["loss"]
    run("--epochs", "1", *options, output=tmp_path / "other")
    resumed = run("--epochs", "3", *options, output=tmp_path / "other")
    for a, b in zip(straight, resumed, strict=True):
        assert (a["accuracy"], a["loss"]) == (b["accuracy"], b["loss"])
    with pytest.raises(ValueError, match="is of another run"):
        run("--epochs", "3", "--batch", "4", *options, output=tmp_path / "other")


def test_modules_are_either_trained_on_or_tested_with(monkeypatch):
    texts = {}

    def tokenizer(given, **options):
        texts[len(texts)] = set(given)
        return {"input_ids": torch.zeros(len(given), options["max_length"])}

    found = load(tokenizer, ("json", "email"), 30, 30, 8)
    assert not texts[0] & texts[1]
    assert not any("json" in text.lower() for part in texts.values() for text in part)
    assert set(found.train.labels.tolist()) == set(found.test.labels.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="no package 'unheard_of' is installed"):
        load(tokenizer, ("unheard_of",))
