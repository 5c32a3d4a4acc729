"""examples/airbench.py: what a run is, that it resumes, and what is frozen in it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import neq
from examples import airbench
from examples.airbench_arms import RandomLayers
from examples.airbench_net import triangle
from examples.airbench_run import Run
from examples.airbench_settings import finished, split
from examples.airbench_views import Views
from neq.cost.step_times import Segment, StepTimes
from tests.support import ROOT
from tests.support.airbench import TINY, same, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_as_a_user_runs_it(tmp_path):
    command = (
        "examples/airbench.py --epochs 3.5 --width 0.25 --images 1000 --batch 100 --device cpu"
    )
    command = [*command.split(), *"--seeds 0 1 --jobs 2 --curve --output".split(), tmp_path]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    run["env"] = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, *command], **run)
    first, second = (json.loads((tmp_path / f"dense-{seed}.json").read_text()) for seed in (0, 1))
    assert f"dense-1: test {second['accuracy']:.2%}" in done.stdout
    assert first["accuracy"] > 0.4  # it learns: by chance it would be .1
    assert first["accuracy"] != second["accuracy"]
    assert first["environment"]["torch"] == torch.__version__
    assert first["environment"]["threads"] == 1  # of two for both
    assert first["steps"] == {
        "stem+block1+block2+block3+head": 30,  # for three epochs the stem's bias trains
        "block1+block2+block3+head": 5,
    }
    assert len(first["epochs"]) == 4
    assert all(0 <= epoch["accuracy"] <= 1 for epoch in first["epochs"])
    assert first["seconds"]["backward"] > first["seconds"]["optimizer"] > 0

    before = (tmp_path / "dense-0.json").read_bytes()
    subprocess.run([sys.executable, *command], **run)
    assert (tmp_path / "dense-0.json").read_bytes() == before  # it was not made again


def test_the_recipe(data, where):
    """A run is this loop: the published one, written out."""
    settings = replace(TINY, epochs=4)
    run, other = (Run(settings, data, where) for _ in range(2))
    model, slow = other.model, {k: t.clone() for k, t in other.model.state_dict().items()}
    scale = 1024 * (1 + 1 / (1 - 0.85))
    norms = [m.bias for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not b for b in norms)]
    rates = 64 * 11.5 / scale, 11.5 / scale
    optimizer = torch.optim.SGD(
        [
            {"params": params, "lr": rate, "weight_decay": 0.0153 * 20 / scale / rate}
            for params, rate in zip((norms, rest), rates, strict=True)
        ],
        momentum=0.85,
        nesterov=True,
    )
    model.train()
    for step in range(16):  # four of each epoch
        epoch, done = step // 4, step / 16
        model.stem[0].bias.requires_grad_(epoch < 3)
        if step % 4 == 0:
            before = weights(run)
            run.epoch(epoch, lambda: None)
            assert same(run, before, "stem.0.bias") == (epoch == 3)
            generator = torch.Generator().manual_seed(epoch)  # of seed 0
            order = torch.randperm(80, generator=generator)
        chosen = order[20 * (step % 4) :][:20]
        x = other.normal(other.views(chosen, epoch, generator))
        logits = model(x).log_softmax(1)
        smooth = torch.full((20, 10), 0.02)  # .2 of a label for all classes alike
        smooth[torch.arange(20), other.train.labels[chosen]] += 0.8
        optimizer.zero_grad()
        (-smooth * logits).sum().backward()
        factor = 0.2 + 0.8 * done / 0.23 if done < 0.23 else 1 - 0.93 * (done - 0.23) / 0.77
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        optimizer.step()
        if step in (4, 9, 14, 15):
            keep = 1 if step == 15 else 0.95**5 * ((step + 1) / 16) ** 3
            for name, fast in model.state_dict().items():
                if fast.is_floating_point() and not (epoch == 3 and name == "stem.0.bias"):
                    slow[name] = keep * slow[name] + (1 - keep) * fast
                    fast.copy_(slow[name])
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("arm", "freeze"),
    [
        ("dense", ()),
        ("scheduled", (0.4, 0.7)),
        ("policy", ()),
        ("head-then-all", (0.35,)),
        ("head-then-all", (0.7,)),
    ],
)
def test_a_stopped_run_goes_on(arm, freeze, data, where, tmp_path):
    settings = replace(TINY, arm=arm, freeze=freeze)
    whole = Run(settings, data, where._replace(output=tmp_path))
    wanted = whole.go()

    other = where._replace(output=tmp_path / "other")
    other.output.mkdir()
    stopped = Run(settings, data, other)
    for epoch in range(3):
        stopped.epochs.append(stopped.epoch(epoch, lambda: None))
    stopped._save()
    resumed = Run(settings, data, other)
    result = resumed.go()
    assert [e["loss"] for e in result["epochs"]] == [e["loss"] for e in wanted["epochs"]]
    assert result["accuracy"] == wanted["accuracy"]
    assert same(resumed, weights(whole), "")
    assert not [*other.output.glob("*.pt"), *other.output.glob("*.part")]
    assert finished(settings, other.output) == json.loads(json.dumps(result))


def test_another_runs_files_are_refused(data, where):
    run = Run(TINY, data, where)
    run._save()
    with pytest.raises(ValueError, match=r"dense-0.pt is of another run, with \{'epochs': 5\}"):
        Run(replace(TINY, epochs=6), data, where)
    run.go()
    file = where.output / "dense-0.json"
    with pytest.raises(ValueError, match=r"dense-0.json is of another run, with \{'width'"):
        finished(replace(TINY, width=1.0), where.output)
    older = json.loads(file.read_text())
    del older["settings"]["task"]  # a setting that a file does not know had its default
    file.write_text(json.dumps(older))
    assert finished(TINY, where.output) == older
    with pytest.raises(
        ValueError, match=r"with \{'task': 'scratch'\} instead of \{'task': 'corrupted'\}"
    ):
        finished(replace(TINY, task="corrupted"), where.output)


def test_scheduled_freezes_from_below(data, where):
    """A frozen block keeps its parameters and statistics to the bit, and saves no activation."""
    run = Run(replace(TINY, arm="scheduled", freeze=(0.4, 0.8)), data, where)
    saved = [("stem", "block1"), ("stem", "block1"), ("stem", "block1", "block2")]
    run.epoch(0, lambda: None)
    run.epoch(1, lambda: None)
    for epoch, parts in zip((2, 3, 4), saved, strict=True):
        before = weights(run)
        steps = run.epoch(epoch, lambda: None)["steps"]
        assert same(run, before, *parts)
        assert not same(run, before, "block3")
        trained = [p for p in ("block1", "block2", "block3", "head") if p not in parts]
        assert steps == {"+".join(trained): 4}
        run.accuracies(run.evaluated, several=False)  # leaves the model in eval
    run.model.train()
    run.enter(run.steps - 1)
    outputs = []
    run.model.block2.register_forward_hook(lambda layer, args, y: outputs.append(y))
    run.model(torch.randn(2, 3, 16, 16))
    assert not outputs[0].requires_grad


def test_only_some_parts_train(data, where):
    run = Run(replace(TINY, arm="only", parts=("block2",)), data, where)
    before = weights(run)
    result = run.go()
    assert same(run, before, "stem", "block1", "block3", "head")
    assert not same(run, before, "block2")
    assert result["steps"] == {"block2": 20}


def test_the_head_alone_and_then_everything(data, where):
    settings = replace(TINY, freeze=(0.45,))  # in the middle of the third epoch
    run = Run(replace(settings, arm="head-then-all"), data, where)
    dense = Run(settings, data, where)
    parts = "stem", "block1", "block2", "block3"
    begin = weights(run)
    steps = [run.epoch(epoch, lambda: None)["steps"] for epoch in range(2)]
    assert steps == 2 * [{"head": 4}]
    assert same(run, begin, *parts)
    assert not same(run, begin, "head")
    everything = "stem+block1+block2+block3+head"
    assert run.epoch(2, lambda: None)["steps"] == {"head": 1, everything: 3}
    assert not any(same(run, begin, part) for part in parts)
    dense.model.train()
    for mine, others in zip(run.model.modules(), dense.model.modules(), strict=True):
        assert mine.training == others.training
    trained = [[p.requires_grad for p in one.model.parameters()] for one in (run, dense)]
    assert trained[0] == trained[1]
    assert run.epoch(3, lambda: None)["steps"] == {"block1+block2+block3+head": 4}
    with pytest.raises(ValueError, match=r"head-then-all-0: freeze is one share, got \(0.4, 0.7\)"):
        Run(replace(TINY, arm="head-then-all"), data, where)


def test_random_rows(data, where):
    options = (("fraction", 0.5), ("warmup", 0))
    run = Run(replace(TINY, arm="policy", policy="Random", options=options), data, where)
    before = weights(run)
    run.epoch(0, lambda: None)
    changed = (run.model.block3[4].weight != before["block3.4.weight"]).flatten(1).any(1)
    assert torch.equal(changed, run.model.block3[4].active_mask) is False  # drawn anew by now
    assert changed.sum() == 16  # of 32


POLICY = replace(TINY, arm="policy", policy="BottomUp.scheduled")


def test_a_policy_freezes_from_below(data, where):
    """At the same times as the arm scheduled, and with one more block for each norm."""
    run = Run(replace(POLICY, options=(("epochs", 5), ("shares", (0.4, 0.4, 0.4)))), data, where)
    for epoch in range(2):
        assert run.epoch(epoch, lambda: None)["steps"] == {"stem+block1+block2+block3+head": 4}
    before = weights(run)
    result = run.epoch(2, lambda: None)
    assert same(run, before, "stem", "block1")
    assert not same(run, before, "block2")
    assert [*result["steps"]] == [
        "BottomUp.scheduled, 3 blocks frozen: stem+block1+block2+block3+head"
    ]


def test_a_cache_changes_nothing_but_the_time(data, where, tmp_path):
    options = (("epochs", 5), ("shares", (0.4, 0.4, 0.4)))
    plain = replace(POLICY, options=options, augment=False)
    runs = [Run(replace(plain, cached=cached), data, where) for cached in (False, True)]
    for epoch in range(5):
        results = [run.epoch(epoch, lambda: None) for run in runs]
        assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)
    assert runs[1].loader.hits == 2 * 4
    assert runs[1].loader.misses == 4


def test_a_cache_has_a_bank_of_draws(data, where):
    options = (("epochs", 99), ("shares", (1.0, 1.0, 1.0)))
    run = Run(replace(POLICY, options=options, cached=True, bank=2, epochs=99), data, where)

    def images():  # [epochs, images, 3, 16, 16]
        epochs = [[x for x, _ in run.loader.epoch(torch.arange(80))] for _ in range(8)]
        return torch.stack([torch.cat(batches) for batches in epochs])

    drawn = images()
    assert max(len(torch.unique(drawn[:, i], dim=0)) for i in range(80)) > 2
    run.arm.control.prefix.freeze(3)
    drawn = images()
    assert {len(torch.unique(drawn[:, i], dim=0)) for i in range(80)} <= {1, 2}


def test_only_policies_have_a_cache(data, where):
    with pytest.raises(ValueError, match="the arm scheduled has no cache"):
        Run(replace(TINY, arm="scheduled", cached=True), data, where)


def test_a_run_is_ended_before_its_schedule(data, where):
    run = Run(replace(TINY, stop=0.7), data, where)
    result = run.go()
    assert sum(result["steps"].values()) == 14  # of 20
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(
        run.optimizer.param_groups[0]["full_lr"] * triangle(13 / 20)
    )


def test_random_layers_keep_to_their_share_of_a_step():
    """Of four layers that take the same, a lower one costs more, since backward goes further."""
    segment = {"forward": 1.0, "dgrad": 1.0, "wgrad": 1.0}
    times = StepTimes(tuple(Segment(str(i), str(i), **segment) for i in range(4)))
    assert times.dense == 11
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
    control = neq.Controller(
        model, optimizer=(), policy=RandomLayers(0.7), example_inputs=torch.randn(4, 2)
    )
    control.step_times = lambda: times
    control.policy.attach(control)
    drawn = set()
    for _ in range(200):
        control.step()
        trained = "".join(n for n, g in control.layers.items() if g.first.active_fraction)
        assert times.ms(0, dict.fromkeys(trained, 1.0)) <= 0.7 * times.dense
        drawn.add(trained)
    assert drawn == {"1", "23"}  # 0 takes 8 already; beside 1 there is room for none


def test_split(data):
    wanted = replace(TINY, images=500, evaluated=None)
    train, test = split(data, wanted)
    assert torch.equal(train.pixels, data.train.pixels[:500])
    assert torch.equal(test.pixels, data.test.pixels)
    train, validation = split(data, replace(wanted, split="validation", images=None))
    assert torch.equal(train.pixels, data.train.pixels[:900])
    assert torch.equal(validation.pixels, data.train.pixels[900:])


def test_views():
    """Windows of the image with its border mirrored; one epoch the image, the next its mirror."""
    pixels = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    padded = F.pad(pixels.float(), (2,) * 4, "reflect").to(torch.uint8)
    views, chosen = Views(pixels, 0, augment=True), torch.arange(50)
    windows = {
        (top, left): padded[..., top : top + 8, left : left + 8]
        for top in range(5)
        for left in range(5)
    }
    flips, found = [], set()
    for epoch in range(4):
        out = views(chosen, epoch, torch.Generator().manual_seed(epoch))
        flip = torch.zeros(50, dtype=torch.bool)
        for i, view in enumerate(out):
            keys = [
                (key, mirrored)
                for key, all_of in windows.items()
                for mirrored in (False, True)
                if torch.equal(view, all_of[i].flip(2) if mirrored else all_of[i])
            ]
            ((key, flip[i]),) = keys
            found.add(key)
        flips.append(flip)
    assert len(found) == 25
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert 10 < flips[0].sum() < 40
    plain = Views(pixels, 0, augment=False)
    assert torch.equal(plain(chosen, 1, torch.Generator()), pixels)


def test_six_views(data, where):
    """The image counts half, moved by a pixel up left and down right a quarter; mirrored too."""
    run = Run(TINY, data, where)
    run.model.eval()
    x = torch.randn(4, 3, 16, 16)
    padded = F.pad(x, (1,) * 4, "reflect")
    views = [(x, 0.5), (padded[..., :16, :16], 0.25), (padded[..., 2:, 2:], 0.25)]
    with torch.no_grad():
        wanted = sum(w * (run.model(v) + run.model(v.flip(3))) for v, w in views)
        of_one, of_six = run._of_views(x, several=True)
        torch.testing.assert_close(of_one, run.model(x))
        torch.testing.assert_close(of_six, wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "nowhere: there is neither data_batch_1"),
        (["--images", "10", "--batch", "20"], "a batch of 20 from 10 images"),
    ],
)
def test_errors(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        airbench.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
