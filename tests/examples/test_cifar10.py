"""examples/cifar10.py: what it loads, that it resumes, and that what it compares is comparable."""

import json
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import neq
from examples import cifar10, cifar_controls, cifar_report
from examples.cifar_data import augment, in_turns, load, made_up
from neq import history
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "--limit 40 --test-limit 20 --batch 20 --probe 10 --epochs 3 --device cpu".split()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the example on a few made-up images, without the pictures; its results."""
    monkeypatch.setattr(cifar10.report, "write", lambda records, file: None)
    monkeypatch.setattr(cifar_report, "plot", lambda runs, title, file: None)

    def run(*arguments, output=tmp_path / "out"):
        cifar10.main([*TINY, "--output", str(output), *arguments])
        return json.loads((output / "results.json").read_text())

    return run


def test_as_a_user_runs_it(tmp_path):
    command = "examples/cifar10.py --epochs 2 --limit 2000 --device cpu --output".split()
    done = subprocess.run(
        [sys.executable, *command, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text = done.stdout
    assert "made-up patterns: 2000 to train on, 1000 to test" in text
    assert all(f"equilibrium, seed 0: epoch {epoch}: " in text for epoch in (1, 2))
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("equilibrium  ")]
    assert line.split()[1:3] == ["1", "2"]  # runs, epochs

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["torch"] == torch.__version__
    (result,) = results["results"]
    first, second = result["epochs"]
    assert [row["lr"] for row in (first, second)] == [0.1, pytest.approx(0.01)]
    assert second["loss"] < first["loss"]  # it learns
    assert first["wgrad"] == first["flops"] == 1  # everything trains in the first epoch
    assert first["published_mflops"] == pytest.approx(138.936 / 4, rel=1e-3)  # a quarter of 32 x 32
    assert first["seconds"]["backward"] > first["seconds"]["optimizer"] > 0
    assert len(history.read(tmp_path / "equilibrium-0.jsonl")) == 2
    for name in ("accuracy", "equilibrium-0"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500


def test_the_comparison(run, tmp_path):
    results = run("--compare", *"--eps 0.3 --epochs 4 --stop-at 0.01".split())
    rows = {result["policy"]: result["epochs"] for result in results["results"]}
    records, random = (
        history.read(tmp_path / f"out/{name}-0.jsonl")
        for name in ("equilibrium", "random-equal-flops")
    )
    # some are frozen, and as many where chance decides, epoch by epoch and layer by layer
    assert 0.05 < min(row["wgrad"] for row in rows["equilibrium"]) < 0.95
    assert [[x.trained for x in r.layers] for r in records] == [
        [x.trained for x in r.layers] for r in random
    ]
    for key in ("wgrad", "flops", "published_mflops"):
        assert [row[key] for row in rows["equilibrium"]] == [
            row[key] for row in rows["random-equal-flops"]
        ]
    assert {row["wgrad"] for row in rows["dense"]} == {1}
    spent = sum(row["wgrad"] for row in rows["equilibrium"])
    assert len(rows["short"]) == round(spent)
    # the schedule is shortened too: its learning rate falls at 40 % of its own epochs
    assert rows["short"][-1]["lr"] < 0.1
    summary = {line["policy"]: line for line in results["summary"]}
    stopped = summary["equilibrium, stopped"]
    assert stopped["accuracy"] == rows["equilibrium"][stopped["epochs"] - 1]["accuracy"]
    assert rows["equilibrium"][stopped["epochs"] - 1]["frozen"] >= 0.01
    assert summary["short"]["wgrad_saved"] == pytest.approx(1 - len(rows["short"]) / 4)
    assert summary["equilibrium"]["wgrad_saved"] == pytest.approx(1 - spent / 4)


def test_chance_picks_others_than_equilibrium():
    layers = [history.LayerRecord("a", "Conv2d", 100, 100, 30, None, None, [], 1.0)]
    record = history.EpochRecord(1, 0.0, 0.0, 1.0, tuple(layers))
    model = neq.convert(torch.nn.Linear(2, 100))
    nothing = torch.full((100,), torch.nan)
    motion = neq.Motion("a", model, nothing, nothing, torch.ones(100, dtype=torch.bool))
    policy = cifar_controls.Recorded([record], seed=0)
    before = policy.state_dict()
    (first,), (second,) = (policy.choose([motion], 1) for _ in range(2))
    assert len(first) == len(first.unique()) == 30
    assert not torch.equal(first, second)
    policy.load_state_dict(before)
    assert torch.equal(policy.choose([motion], 1)[0], first)
    assert len(cifar_controls.Recorded([record], seed=1).choose([motion], 1)[0]) == 30


def test_a_share_trains(run):
    policies = "random", "lowest-velocity", "fixed", "budget"
    results = run("--policy", *policies, "--fraction", "0.25", "--epochs", "2")["results"]
    assert [result["policy"] for result in results] == list(policies)
    for result in results:
        first, second = (row["wgrad"] for row in result["epochs"])
        assert first == 1
        assert second == pytest.approx(0.25, abs=0.03)  # a norm pays for all, and the classifier


def test_other_thresholds(run):
    policies = "equilibrium-released", "adaptive-eps"
    results = run("--policy", *policies, "--eps", "0.3", "--epochs", "2")["results"]
    assert all(result["epochs"][-1]["frozen"] > 0 for result in results)


@pytest.mark.parametrize("policy", ["equilibrium", "random"])
def test_stop_and_resume(run, tmp_path, monkeypatch, policy):
    arguments = "--policy", policy, "--eps", "0.3"
    whole = run(*arguments, output=tmp_path / "whole")

    accuracy, calls = cifar10.Run.accuracy, []

    def stop(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accuracy(self)

    monkeypatch.setattr(cifar10.Run, "accuracy", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, output=tmp_path / "parts")
    assert len(calls) == 3
    parts = run(*arguments, "--resume", output=tmp_path / "parts")
    assert len(calls) == 4  # the third epoch, and none before it

    for row in (*whole["results"][0]["epochs"], *parts["results"][0]["epochs"]):
        row.pop("seconds")
    assert parts["results"] == whole["results"]
    one, other = (
        torch.load(tmp_path / folder / f"{policy}-0.pt", weights_only=True)
        for folder in ("whole", "parts")
    )
    for key in ("model", "optimizer", "control"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)
    lines = history.read(tmp_path / "parts" / f"{policy}-0.jsonl")
    assert [record.epoch for record in lines] == [1, 2, 3]


def test_seeds_differ(run):
    one, other = run("--policy", "dense", "--epochs", "1", "--seeds", "0", "1")["results"]
    assert one["epochs"][0]["loss"] != other["epochs"][0]["loss"]


ERRORS = [
    ("--policy random-equal-flops", r"equilibrium-0\.jsonl is not there: run --policy equilibrium"),
    ("--batch 100", r"--batch 100 and --probe 10 need 110 training images, made-up .* gives 50"),
    ("--data nowhere", r"nowhere: there is neither data_batch_1, as in cifar-10-batches-py, nor"),
    ("--output setup.py", r"File exists: .*setup\.py"),
    ("--epochs 0", r"--epochs: must be a whole number above 0, got '0'"),
    ("--policy best", r"invalid choice: 'best'"),
    ("--compile best", r"--compile: invalid choice: 'best' \(choose from '?none"),
    ("--stop-at 95", r"--stop-at: must be a share from 0 to 1, got '95'"),
    ("--fraction half", r"--fraction: must be a share from 0 to 1, got 'half'"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_errors(run, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        run(*arguments.split())
    assert re.search(message, capsys.readouterr().err)


def test_a_checkpoint_of_another_run(run, capsys):
    run("--policy", "dense", "--epochs", "1")
    with pytest.raises(SystemExit):
        run("--policy", "dense", "--epochs", "2", "--resume")
    message = "dense-0.pt is of another run, with {'epochs': 1} instead of {'epochs': 2}"
    assert message in capsys.readouterr().err


def test_a_record_of_another_schedule(run, capsys):
    run("--epochs", "1")
    with pytest.raises(SystemExit):
        run("--policy", "short", "--epochs", "2")
    assert "equilibrium-0.jsonl holds 1 epochs, this run is to have 2" in capsys.readouterr().err


def rows(*epochs):
    """Of a run: accuracy, frozen share, share of wgrad."""
    return [
        {
            "epoch": i,
            "accuracy": accuracy,
            "frozen": frozen,
            "wgrad": wgrad,
            "flops": (2 + wgrad) / 3,
            "published_mflops": 100 * wgrad,
            "seconds": {"forward": 1.0, "backward": 1.0 + wgrad, "optimizer": 0.0, "probe": 0.5},
        }
        for i, (accuracy, frozen, wgrad) in enumerate(epochs, start=1)
    ]


def test_the_summary_by_hand():
    runs = {
        "dense": {0: rows((0.5, 0, 1), (0.7, 0, 1), (0.81, 0, 1), (0.80, 0, 1))},
        "equilibrium": {
            0: rows((0.5, 0, 1), (0.7, 0.5, 1), (0.8, 0.96, 0.5), (0.79, 1, 0)),
            1: rows((0.4, 0, 1), (0.6, 0.5, 1), (0.7, 0.5, 0.5), (0.77, 0.5, 0.5)),
        },
    }
    dense, equilibrium, stopped = cifar_report.summary(cifar_report.with_stopped(runs, 0.95), 4)
    assert dense["accuracy"] == 0.80
    assert dense["accuracy_sd"] is None
    assert dense["wgrad_saved"] == dense["flops_saved"] == 0
    assert dense["total_s"] == 14
    assert dense["to_aim_s"] == 10.5  # 79 % in the third epoch
    assert equilibrium["accuracy"] == pytest.approx(0.78)
    assert equilibrium["accuracy_sd"] == pytest.approx(0.02 / 2**0.5)
    assert equilibrium["against_dense"] == pytest.approx(-0.01)  # of seed 0, which dense has too
    assert equilibrium["against_dense_sd"] is None
    assert equilibrium["wgrad_saved"] == pytest.approx(1 - 5.5 / 8)
    assert equilibrium["flops_saved"] == pytest.approx((1 - 5.5 / 8) / 3)
    assert equilibrium["published_mflops"] == pytest.approx(100 * 5.5 / 8)
    assert equilibrium["to_aim_s"] is None  # not in every run
    # so many are never frozen with seed 1; with seed 0 after the third epoch, its last then
    assert stopped["seeds"] == [0]
    assert (stopped["epochs"], stopped["accuracy"]) == (3, 0.8)
    assert stopped["wgrad_saved"] == pytest.approx(1 - 2.5 / 4)
    assert stopped["flops_saved"] == pytest.approx(1 - (1 + 1 + 2.5 / 3) / 4)  # no forward either


# --- the data


def picture(value, size=(6, 4)):
    return Image.new("RGB", size, (value, 2 * value, 0))


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for label, kind in enumerate(("cat", "ant")):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(count):
                picture(10 * label + i).save(tmp_path / split / kind / f"{i:04}.png")
    (tmp_path / "train/cat/notes.txt").write_text("not an image")
    return tmp_path


def test_a_folder_of_images(folder):
    data = load(folder, train=5)
    assert data.classes == ["ant", "cat"]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0]
    assert data.train.pixels.shape == (5, 3, 4, 6)
    assert data.train.pixels.dtype == torch.uint8
    # "cat" was made first, of smaller values
    assert data.train.pixels[:, 0, 0, 0].tolist() == [10, 0, 11, 1, 12]
    assert data.train.pixels[:, 1, 3, 5].tolist() == [20, 0, 22, 2, 24]
    assert data.test.labels.tolist() == [0, 1]


def test_images_of_another_size(folder):
    picture(1, (5, 5)).save(folder / "train/cat/0009.png")
    with pytest.raises(ValueError, match=r"0009\.png: all images must be of one size, .* \(5, 5\)"):
        load(folder)


def test_an_image_that_is_none(folder):
    (folder / "test/ant/0000.png").write_text("no image")
    with pytest.raises(ValueError, match=r"ant/0000\.png: not an image that can be read"):
        load(folder)


def test_a_folder_without_images(folder):
    for file in (folder / "test").glob("*/*"):
        file.unlink()
    with pytest.raises(ValueError, match="test: no image in the folders ant, cat"):
        load(folder)


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="needs Pillow: pip install pillow"):
        load(folder)


class Python2(pickle._Pickler):
    """Writes what Python 2 wrote, whose strings are bytes."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, text):
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_bytes


def write_pickle(file, content):
    with file.open("wb") as stream:
        Python2(stream, protocol=2).dump(content)


@pytest.fixture
def batches(tmp_path):
    """Two images in each of the files; red and green of the k-th of all are k."""
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.repeat(np.array([[2 * k], [2 * k + 1]], dtype=np.uint8), 3072, axis=1)
        pixels[:, 2048:] = 200  # blue
        content = {b"data": pixels, b"labels": [k % 3, 0]}
        write_pickle(tmp_path / name, content)
    write_pickle(tmp_path / "batches.meta", {b"label_names": [b"cat", b"ant", b"cow"]})
    return tmp_path


def test_the_original_batches(batches):
    data = load(batches)
    assert data.classes == ["cat", "ant", "cow"]
    assert data.train.pixels.shape == (10, 3, 32, 32)
    # one of each class after the other, each in the files' order
    assert data.train.pixels[:, 0, 5, 7].tolist() == [0, 2, 4, 1, 8, 3, 5, 6, 7, 9]
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 0, 0]
    assert data.train.pixels[:, 2].unique().tolist() == [200]
    assert data.test.pixels[:, 1, 0, 0].tolist() == [11, 10]
    assert load(batches, 3, 1).train.labels.tolist() == [0, 1, 2]


def test_a_pickle_that_runs_code(batches, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    write_pickle(batches / "data_batch_3", Trap())
    with pytest.raises(ValueError, match=r"data_batch_3: not a file of cifar-10-batches-py: asks"):
        load(batches)
    assert not (tmp_path / "sprung").exists()


def test_a_batch_cut_short(batches):
    (batches / "data_batch_2").write_bytes((batches / "data_batch_2").read_bytes()[:100])
    with pytest.raises(ValueError, match="data_batch_2: not a file of cifar-10-batches-py"):
        load(batches)


def test_in_turns():
    assert in_turns([1, 1, 0, 2, 0, 1]) == [2, 0, 3, 4, 1, 5]
    assert in_turns([]) == []


def test_made_up_images_are_the_same_each_time():
    one, other = made_up(30, 20), made_up(30, 20)
    assert torch.equal(one.train.pixels, other.train.pixels)
    assert one.train.pixels.shape == (30, 3, 16, 16)
    assert one.test.labels.bincount().tolist() == [2] * 10
    # a limit takes less of the same
    assert torch.equal(made_up(50).train.pixels[:30], one.train.pixels)


def test_augment():
    """Each image is a window of its padded self, or of its mirror image; all of them occur."""
    pixels = torch.randint(1, 256, (300, 3, 8, 8), dtype=torch.uint8)
    out = augment(pixels, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    found = []
    for image, result in zip(padded, out, strict=True):
        windows = {
            (top, left, flip): window.flip(2) if flip else window
            for top in range(3)
            for left in range(3)
            for flip in (False, True)
            for window in [image[:, top : top + 8, left : left + 8]]
        }
        found += [key for key, window in windows.items() if torch.equal(window, result)]
    assert len(found) == len(pixels)
    assert len(set(found)) == 18
    again = augment(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(again, out)
