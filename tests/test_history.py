"""What is recorded of each epoch, where it goes, and what comes back."""

import io
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from tqdm import tqdm

import neq
from neq.history import (
    EpochRecord,
    History,
    LayerRecord,
    dense_seconds,
    read,
)


def record(epoch=1, trained=8, active=6, step_flops=6000.0, name="conv"):
    layers = (
        LayerRecord(name, "Conv2d", 8, trained, active, 0.5, 0.25, [0] * 13 + [8], 1000.0),
        LayerRecord("norm", "BatchNorm2d", 2, 2, 1, None, None, [], 0.0),
    )
    return EpochRecord(epoch, 2.0, 0.125, step_flops, layers)


def test_figures_by_hand():
    r = record(trained=4)
    assert (r.neurons, r.active) == (10, 7)
    assert r.frozen_share == pytest.approx(0.3)
    assert r.wgrad_saved == 0.25  # 2 of 8 in the next epoch
    assert r.step_saved == 500 / 6000  # 4 of 8 in the last one


def test_a_line_for_a_progress_bar():
    assert str(record(3, trained=4)) == (
        "epoch 3: saved 8.3% of a step's FLOPs (at most 16.7%); "
        "30.0% of neurons frozen in the next; probe 0.12 s"
    )
    timed = replace(record(3, trained=4), dense_seconds=2.5)
    assert "saved 8.3% of a step's FLOPs (at most 16.7%) and 20.0% of its time;" in str(timed)
    uncounted = EpochRecord(1, 1.0, 0.1, 0.0, record().layers[1:])
    assert str(uncounted) == "epoch 1: 50.0% of neurons frozen in the next; probe 0.10 s"
    assert repr(timed) == f"<{timed}>"
    assert repr([timed]) == f"[<{timed}>]"
    shown = io.StringIO()
    with tqdm(total=1, file=shown) as bar:
        bar.set_postfix_str(record(3))
    assert "epoch 3: saved" in shown.getvalue()


def test_what_freezing_saves_of_the_optimizers_step_counts():
    r = record(trained=4)
    conv = replace(r.layers[0], update_flops=200.0)
    r = replace(r, layers=(conv, r.layers[1]))
    assert r.step_saved == 600 / 6000
    assert r.step_saved_next == 300 / 6000
    assert r.step_saved_at_most == 1200 / 6000
    assert r.wgrad_saved == 0.25


def test_the_clock_says_nothing_rather_than_something_absurd():
    frozen, dense = record(trained=4), record(trained=8)
    assert (frozen.dense, dense.dense) == (False, True)
    for seconds, saved in ((2.5, 0.2), (1.5, 1 - 2 / 1.5), (None, None), (1.2, None), (0.01, None)):
        assert replace(frozen, dense_seconds=seconds).time_saved == pytest.approx(saved)
        assert replace(dense, dense_seconds=seconds).time_saved is None

    def epochs(*seconds, steps=10):
        return [replace(dense, seconds=s, steps=steps) for s in seconds]

    run = [*epochs(2.0, 9.0, 3.0), replace(frozen, seconds=1.0, steps=10)]
    assert dense_seconds(run, 10) == 3.0  # the median of those in which all trained
    assert dense_seconds(run, 11) is None  # an epoch of other length
    assert dense_seconds([], 10) is None
    assert dense_seconds(epochs(0.9), 10) is None  # too short to tell
    assert dense_seconds(epochs(5.0, steps=0), 0) is None  # no training at all
    assert dense_seconds(epochs(5.0, steps=None), None) == 5.0


def test_what_each_eps_would_freeze():
    speeds = [2, 0, 0, 0, 4, *[0] * 8, 2]  # below 1e-6, from 10^-4.5 to 1e-4, above 1
    layers = tuple(
        replace(layer, speeds=s) for layer, s in zip(record().layers, (speeds, []), strict=True)
    )
    r = replace(record(), layers=layers)
    assert r.neurons == 10
    shares = [r.would_freeze(eps) for eps in (0, 1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 1, 5)]
    assert shares == [0, 0, 0.2, 0.2, 0.6, 0.6, 0.6, 0.6]
    assert r.would_freeze(10**-4.25) == pytest.approx(0.4)  # halfway through the bin
    assert r.would_freeze(10**-4.5) == pytest.approx(0.2)


def test_a_file_of_an_earlier_version_is_read():
    fields = asdict(record())
    for name in ("steps", "dense_seconds"):
        del fields[name]
    for layer in fields["layers"]:
        del layer["update_flops"], layer["thawed"]
    assert EpochRecord.from_json(json.dumps(fields)) == record()


def test_file_holds_a_line_per_epoch_as_it_happens(tmp_path):
    history = History(tmp_path / "new" / "run.jsonl")
    for epoch in (1, 2, 3):
        history.append(record(epoch))
        lines = history.path.read_text().splitlines()
        assert len(lines) == epoch
    assert json.loads(lines[2])["epoch"] == 3
    assert json.loads(lines[2])["layers"][0]["name"] == "conv"
    assert read(history.path) == history.records == [record(1), record(2), record(3)]


def test_a_resumed_run_goes_on_where_it_was_saved(tmp_path):
    path = tmp_path / "run.jsonl"
    first = History(path)
    for epoch in (1, 2, 3, 4):
        first.append(record(epoch, active=2))
    resumed = History(path)
    resumed.append(record(3))  # saved after epoch 2: epochs 3 and 4 are of a run given up
    resumed.append(record(4))
    expected = [record(1, active=2), record(2, active=2), record(3), record(4)]
    assert read(path) == resumed.records == expected


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        history = History(path)
        for epoch in (1, 2):
            history.append(record(epoch))
    assert len(read(path)) == 2


def test_a_file_that_is_no_history_is_not_overwritten(tmp_path):
    path = tmp_path / "thesis.txt"
    for text in ("dear reader\n", "[1]\n", '{"epoch": 1}\n', '{"epoch": 1, "layers": [{}]}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"thesis.txt, line 1: not a record"):
            History(path).append(record())
        assert path.read_text() == text


class TensorBoard:
    def __init__(self):
        self.calls = {}

    def add_scalar(self, tag, value, step):
        self.calls[tag, step] = value


class WandB:
    """Drops what is logged for a step before its own, which the user's loop has brought to 900."""

    def __init__(self):
        self.calls, self.step = {}, 900

    def log(self, figures, step=None):
        if step is None or step >= self.step:
            epoch = figures["neq/epoch"]
            self.calls |= {(tag, epoch): value for tag, value in figures.items()}
            self.step += 1


@pytest.mark.parametrize("writer", [TensorBoard, WandB])
def test_writers_get_the_figures(writer):
    writer = writer()
    History(writer=writer).append(record(5))
    assert writer.calls["neq/frozen_share", 5] == pytest.approx(0.3)
    assert writer.calls["neq/wgrad_saved", 5] == 0.25
    assert writer.calls["neq/probe_seconds", 5] == 0.125
    assert writer.calls["neq/step_saved", 5] == 0.0
    assert ("neq/time_saved", 5) not in writer.calls
    assert writer.calls["neq/frozen_share/conv", 5] == 0.25
    assert writer.calls["neq/frozen_share/norm", 5] == 0.5
    History(writer=writer).append(replace(record(6, trained=4), dense_seconds=2.5))
    assert writer.calls["neq/time_saved", 6] == pytest.approx(0.2)
    assert writer.calls["neq/frozen_share", 6] == pytest.approx(0.3)


def test_history_refuses_other_writers():
    with pytest.raises(TypeError, match=r"add_scalar\(tag, value, step\).*got list"):
        History(writer=[])


def test_the_controller_records_what_happened(tmp_path):
    path = tmp_path / "run.jsonl"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    policy = neq.Fixed({"0": [1]})
    control = neq.Controller(
        model, probe=torch.randn(2, 3, 6, 6), policy=policy, optimizer=(), history=path
    )
    first, second = control.step(), control.step()
    assert read(path) == control.history.records == [first, second]
    (layer,) = second.layers
    assert (layer.name, layer.kind, layer.neurons) == ("0", "Conv2d", 4)
    assert [r.layers[0].trained for r in (first, second)] == [4, 1]
    assert [r.layers[0].active for r in (first, second)] == [1, 1]
    assert (layer.phi, layer.speed) == (1.0, 0.0)  # nothing was trained
    assert layer.wgrad_flops == 2 * 2 * 16 * 4 * 27  # two samples of the probe
    assert second.wgrad_saved == 0.75
    # forward and wgrad of both layers, dgrad of the last one, and the optimizer's step
    assert second.step_flops > 2 * layer.wgrad_flops
    assert first.seconds >= 0
    assert first.probe_seconds > 0


def test_flops_are_those_of_the_example_inputs():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    options = {"probe": neq.WeightProbe(), "policy": neq.Everything(), "optimizer": ()}
    assert neq.Controller(model, **options).step().layers[0].wgrad_flops == 0
    control = neq.Controller(model, **options, example_inputs=torch.ones(7, 3))
    assert control.step().layers[0].wgrad_flops == 2 * 7 * 12


@pytest.mark.parametrize(("kind", "saves"), [(torch.optim.SGD, False), (neq.optim.SGD, True)])
def test_updates_count_where_the_optimizer_skips_frozen_rows(kind, saves):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = kind(model.parameters(), lr=0.1)
    control = neq.Controller(
        model, optimizer=optimizer, probe=torch.ones(5, 3), policy=neq.Everything()
    )
    layer = control.step().layers[0]
    assert layer.wgrad_flops == 2 * 5 * 12
    assert layer.update_flops == (2 * 16 if saves else 0)


def test_records_know_steps_and_dense_epochs(monkeypatch):
    clock = iter([0.0, 3.0, 8.0, 9.0, 9.0])
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    control = neq.Controller(model, optimizer=optimizer, policy=neq.Random(0.5), warmup=2)
    monkeypatch.setattr("neq.controller.time.perf_counter", lambda: next(clock))
    control._since = 0.0
    monkeypatch.setattr("neq.controller.Stopwatch", lambda device: Instant())
    records = []
    for steps in (2, 2, 2, 3):
        for _ in range(steps):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        records.append(control.step())
    assert [r.steps for r in records] == [2, 2, 2, 3]
    assert [r.seconds for r in records] == [0.0, 3.0, 5.0, 1.0]
    assert [r.dense_seconds for r in records] == [None, 1.5, 1.5, None]
    assert control.history.records == records


class Instant:
    def seconds(self):
        return 0.0
