"""examples/finetune_text.py: it learns, compares equal steps, and resumes."""

import json
import math

import pytest
import torch
import transformers

import neq
from examples import finetune_text, text_report, text_ways
from examples.text_data import Texts, load

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
    monkeypatch.setattr(text_ways, "LORA_RANK", 2)


@pytest.fixture
def run(tmp_path):
    def run(*arguments, output=tmp_path / "out"):
        finetune_text.main([*TINY, "--output", str(output), *arguments])
        return json.loads((output / "results.json").read_text())["results"]

    return run


def test_the_pretrained_model(run):
    options = "--seeds 0 --rates 1e-3 --limit 8 --way compact-random-0.1"
    (row,) = run(*options.split())
    assert row["weights"] > 22e6 * 4
    assert row["gradients"] < 0.12 * 11e6 * 4  # the embeddings are frozen


@pytest.mark.usefixtures("tiny")
def test_every_way(run, capsys, tmp_path):
    rows = run("--seeds", "0", "--rates", "1e-3")
    by_way = {row["way"]: row for row in rows}
    assert [*by_way] == [*text_ways.WAYS]
    full = by_way["full"]
    assert by_way["full-0.7"]["steps"] == round(0.7 * full["steps"])
    for way, row in by_way.items():
        assert 0 <= row["accuracy"] <= 1
        assert row["peak"] > row["weights"] + row["gradients"] + row["optimizer"]
        if not way.startswith("full"):
            assert row["steps"] == full["steps"]
            assert row["gradients"] < full["gradients"], way
        if way.startswith("compact-random"):
            assert row["optimizer"] == pytest.approx(2 * row["gradients"], rel=0.02)
            assert row["weights"] == full["weights"] + row["gradients"] - CLASSIFIER
        if way.startswith(("compact", "half", "layers", "lora")):
            assert row["trained"] < 0.6 * full["trained"], way
            assert 4 * row["trained"] <= row["gradients"], way
    assert "compact-random-0.1" in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 0


@pytest.mark.usefixtures("tiny")
def test_granules_train_as_many_neurons_as_single_ones(run, monkeypatch):
    granules, controller = {}, neq.Controller

    def watched(*args, **kwargs):
        control = controller(*args, **kwargs)
        return granules.setdefault(kwargs["granule"], control)

    monkeypatch.setattr(neq, "Controller", watched)
    rows = run("--way", *text_ways.GRANULAR, "--seeds", "0", "--rates", "1e-3", "--epochs", "2")
    assert [row["way"] for row in rows] == [*text_ways.GRANULAR]
    assert {*granules} == {1, 16}
    groups = granules[16].layers.values()
    masks = [layer.active_mask for group in groups for layer in group]
    assert any(0 < mask.float().mean() < 1 for mask in masks)
    for mask in masks:
        assert all(len(part.unique()) == 1 for part in mask.split(16))


@pytest.mark.usefixtures("tiny")
def test_a_classifier_with_a_rate_of_its_own():
    model, _ = finetune_text.pretrained(2)
    learner = text_ways.WAYS["full-head-30"].learner(model, 1e-3, 100, {})
    others, own = learner.optimizer.param_groups
    assert own["lr"] == pytest.approx(30 * others["lr"])
    assert own["params"] == [model.classifier.weight, model.classifier.bias]
    assert len(others["params"]) + 2 == len([*model.parameters()])


@pytest.mark.usefixtures("tiny")
def test_bytes_are_those_of_steps_in_which_a_policy_chooses(run, monkeypatch):
    taken, measured = [], []
    step = text_ways.Learner.step

    def counted(learner, batch):
        taken.append(learner)
        return step(learner, batch)

    def made_up(model, optimizer, step, device):
        for _ in range(finetune_text.STEPS_MEASURED):
            step()
        measured.append(sum(learner is taken[-1] for learner in taken))
        return dict.fromkeys(text_report.BYTES, 10 - abs(len(measured) - 2))

    monkeypatch.setattr(text_ways.Learner, "step", counted)
    monkeypatch.setattr(finetune_text, "step_bytes", made_up)
    (row,) = run(*"--seeds 0 --rates 1e-3 --way compact-random-0.1 --epochs 16".split())
    assert row["steps"] // text_ways.DECISIONS == 6
    assert measured == [6, 12, 18]
    assert row["peak"] == 10  # of the largest


@pytest.mark.usefixtures("tiny")
def test_it_learns_and_resumes(run, monkeypatch, tmp_path):
    options = ("--way", "compact-random-0.25", "--rates", "3e-3")
    (short,) = run("--seeds", "3", *options)
    (longer,) = run("--seeds", "3", "--epochs", "20", *options, output=tmp_path / "longer")
    assert longer["training_losses"][-1] < 0.5 < short["training_losses"][-1]
    assert run("--seeds", "3", "4", *options)[0] == short
    with pytest.raises(ValueError, match="has runs with other settings"):
        run("--seeds", "3", "--batch", "4", *options)
    monkeypatch.setattr(Texts, "checksum", lambda self: 0)
    with pytest.raises(ValueError, match="has runs with other texts"):
        run("--seeds", "5", *options)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("best", [1e-3, 1e-2, 1e-5])
def test_rates_are_tuned_beyond_the_ends_of_the_grid(run, monkeypatch, best):
    """On texts that are not tested with, with a seed that is not reported."""
    tried = []

    def made_up(self, part, way, seed, rate):
        tried.append((part, seed))
        same = dict.fromkeys((*text_report.BYTES, "seconds", "trained"), 1)
        return same | {"accuracy": 0.5, "loss": abs(math.log(rate / best))}

    monkeypatch.setattr(finetune_text.Study, "_run", made_up)
    rows = run("--seeds", "1", "2", "--way", "lora")
    assert [row["rate"] for row in rows if row["part"] == "test"] == [best, best]
    assert {*tried} == {("tune", 50), ("test", 1), ("test", 2)}


def test_modules_are_either_trained_on_or_tested_with(monkeypatch):
    texts = {}

    def tokenizer(given, **options):
        texts[len(texts)] = set(given)
        return {"input_ids": torch.zeros(len(given), options["max_length"])}

    found = load(tokenizer, ("json", "email"), 30, 30, 8)
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert not any("json" in text.lower() for part in texts.values() for text in part)
    assert (
        set(found.train.labels.tolist())
        == set(found.test.labels.tolist())
        == set(found.tune.labels.tolist())
        == {0, 1}
    )
    with pytest.raises(ValueError, match="no package 'unheard_of' is installed"):
        load(tokenizer, ("unheard_of",))
