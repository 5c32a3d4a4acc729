"""Tasks of examples/airbench.py that come after another, and streams of them."""

import json
from dataclasses import replace

import pytest
import torch

from examples import airbench
from examples.airbench_run import Run
from examples.airbench_settings import finished, left_by, lineage, predecessor, split
from examples.airbench_tasks import TASKS
from examples.cifar_data import load
from tests.support.airbench import TINY, same, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def first_of(settings, where):
    return predecessor(settings, where)[0]


def test_runs_start_from_a_few_others_in_turns(where):
    runs = [replace(TINY, task="second-half", seed=seed, pretrained=2) for seed in range(5)]
    assert [first_of(run, where).seed for run in runs] == [0, 1, 0, 1, 0]
    assert first_of(replace(TINY, task="second-half", seed=4), where).seed == 4


@pytest.mark.parametrize("task", ["second-half", "corrupted", "relabelled"])
def test_tasks_start_from_another(task, data, where):
    halves = task == "second-half"
    small = replace(TINY, task=task, pretrain_epochs=6, pretrain_images=None if halves else 512)
    big = load(None, 1200, 40)
    first, begin = predecessor(small, where)
    with pytest.raises(ValueError, match=f"dense-0 starts from {first.title}, which has not ended"):
        Run(small, big, where)
    begin.output.mkdir()
    before = Run(first, big, begin)
    before.go()
    run = Run(small, big, where)
    assert same(run, weights(before), "stem", "block")
    assert len(run.model.head[2].weight) == (5 if halves else 10)
    assert same(run, weights(before), "head") != halves
    assert torch.equal(run.normal.mean, before.normal.mean)
    assert 0 < run.go()["accuracy"] <= 1


def test_what_tasks_learn(data):
    learned = {name: task.data(data) for name, task in TASKS.items()}
    before, after = learned["first-half"], learned["second-half"]
    assert [len(part.classes) for part in (before, after)] == [5, 5]
    later = data.train.labels >= 5
    assert torch.equal(after.train.pixels, data.train.pixels[later])
    assert torch.equal(after.train.labels + 5, data.train.labels[later])
    assert torch.equal(before.train.labels, data.train.labels[~later])
    assert before.classes + after.classes == data.classes

    assert learned["scratch"] is data
    pixels = learned["corrupted"].test.pixels
    assert torch.equal(pixels[:, 1], 255 - data.test.pixels[:, 0])
    assert torch.equal(learned["corrupted"].test.labels, data.test.labels)
    assert torch.equal(learned["relabelled"].train.labels, (data.train.labels + 1) % 10)
    assert torch.equal(learned["relabelled"].train.pixels, data.train.pixels)


STREAM = replace(TINY, task="then-relabelled", epochs=2, pretrain_epochs=4, evaluated=15)
OWN = "second-half", "then-corrupted", "then-relabelled"


def stream(where, **settings):
    """The runs of a stream that is made now, from what it starts from to its last task."""
    settings = replace(STREAM, **settings)
    airbench.run_all([settings], where, None, None, 1)
    return lineage(settings, where)


def changed(before, after):
    return {
        name.split(".")[0]
        for name, t in after.model.items()
        if name.endswith(("weight", "bias", "mean", "var"))
        and not torch.equal(t, before.model[name])
    }


def test_each_task_of_a_stream_goes_on_from_the_one_before(where):
    left = [left_by(*run) for run in stream(where, arm="known", keep=True)]
    assert changed(*left[:2]) == {"block2", "block3", "head"}
    assert changed(*left[1:3]) == {"block1"}
    assert changed(*left[2:]) == {"head"}
    assert all(torch.equal(one.mean, left[0].mean) for one in left)
    assert [file.name for file in where.pretrained.glob("*.json")] == ["94-0.125-first-half-0.json"]


@pytest.mark.parametrize(("task", "rate"), [("scratch", 1), ("corrupted", 0.3), ("relabelled", 3)])
def test_known_parts_have_a_rate(task, rate, data, where):
    settings = replace(TINY, task=task, pretrain_epochs=2, pretrain_images=512, lr=2.0)
    airbench.run_all([settings], where, None, None, 1)
    dense, known = (Run(replace(settings, arm=arm), data, where) for arm in ("dense", "known"))
    for one, other in zip(dense.optimizer.param_groups, known.optimizer.param_groups, strict=True):
        assert other["full_lr"] == pytest.approx(rate * one["full_lr"])


def test_what_a_stream_costs(where):
    stream(where, name="parts", arm="known")
    last, *earlier = (
        json.loads((where.output / f"parts{task}-0.json").read_text())
        for task in ("", "-then-corrupted", "-second-half")
    )
    assert last["steps"] == {"block2+block3+head": 8, "block1": 8, "head": 8}
    assert earlier[1]["steps"] == {"block2+block3+head": 8}
    for phase, seconds in last["seconds"].items():
        own = sum(epoch["seconds"][phase] for epoch in last["epochs"])
        assert seconds == pytest.approx(own + earlier[0]["seconds"][phase])
        assert earlier[0]["seconds"][phase] >= earlier[1]["seconds"][phase]


def test_what_a_stream_keeps(where):
    """Of a body that never changes, everything; else what old heads make of the new body."""
    *_, (settings, _) = stream(where, name="head", arm="only", parts=("head",))
    head = finished(settings, where.output)
    assert [*head["learned"]] == [*OWN]
    assert [*head["kept"]] == ["first-half", *OWN]
    assert head["learned"] == {task: head["kept"][task] for task in OWN}


@pytest.mark.parametrize(
    ("arm", "policy", "options"),
    [
        ("dense", "BottomUp", ()),
        ("policy", "HeadFirst", ()),
        ("policy", "BottomUp.scheduled", (("epochs", 2), ("shares", (0.5, 0.5, 0.5)))),
    ],
)
def test_old_heads_on_the_new_body(arm, policy, options, where):
    arm = {"arm": arm, "policy": policy, "options": options}
    first, *_, (settings, _) = stream(where, keep=True, evaluated=None, **arm)
    result = finished(settings, where.output)
    assert result["learned"]["then-relabelled"] == result["kept"]["then-relabelled"]
    run = Run(first[0], load(None), where)
    before, now = left_by(*first).model, left_by(settings, where).model
    run.model.load_state_dict({k: (before if "head" in k else now)[k] for k in before})
    _, images = split(TASKS["first-half"].data(run.data), settings)
    assert [result["kept"]["first-half"]] == run.accuracies(images, several=False)


def test_a_stream_whose_weights_are_gone(data, where):
    *_, (second, _), _, (last, _) = stream(where, name="dense")
    gone = where.output / "dense-second-half-0-start.pt"
    gone.unlink()
    message = f"dense-0 starts from {gone}, which is gone: delete {second.title}.json"
    with pytest.raises(ValueError, match=message):
        Run(last, data, where)


def test_lines_of_a_stream_are_made_seed_by_seed(where, capsys):
    """What is there already is not made again."""
    command = "--task then-corrupted --images 80 --batch 20 --epochs 1 --evaluated 15 --width .125"
    command = [*command.split(), *"--pretrain-epochs 1 --device cpu --seeds 0 1".split()]
    airbench.main([*command, "--output", str(where.output)])
    text = capsys.readouterr().out
    made = [line.split(":")[0] for line in text.splitlines() if ": test" in line]
    order = [f"dense{task}-{seed}" for seed in (0, 1) for task in ("-second-half", "")]
    assert made[:6] == [f"94-0.125-first-half-{seed}" for seed in (0, 1)] + order
    assert text.count("  learned: second-half ") == text.count("  kept: first-half ") == 2

    (where.output / "dense-1.json").unlink()
    airbench.main([*command, "--output", str(where.output), "--jobs", "2"])
    made = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert made[0] == "dense-1"
    assert "dense-second-half-1" not in made
