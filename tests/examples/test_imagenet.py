"""examples/imagenet.py: it learns on two processes, goes on from a checkpoint, and refuses."""

import json
import re
import shlex
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from examples import imagenet, imagenet_parts
from tests.support import ROOT
from tests.support.launch import TORCHRUN, launch

SCRIPT = "examples/imagenet.py"
SMALL = "--device cpu --epochs 4 --batch 16 --probe 8 --lr 0.1 --workers 0".split()


def rows_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def values_in(checkpoint):
    """Of model and optimizer, whole."""
    file = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, file)
    saved = torch.load(file, weights_only=False)["training"]
    file.unlink()
    return {"model": saved["model"], "optimizer": saved["optimizer"]["state"]}


@pytest.mark.parametrize("options", [[], ["--sharded", "--amp"]], ids=["ddp", "sharded"])
def test_two_processes_learn_and_resume(options, tmp_path):
    launch(TORCHRUN, SCRIPT, *SMALL, *options, "--output", tmp_path)
    whole = rows_in(tmp_path)
    assert [row["epoch"] for row in whole] == [1, 2, 3, 4]
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert whole[-1]["neq/frozen_share"] == pytest.approx(0.5, abs=0.02)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["3", "4"]

    state = values_in(checkpoints / "4")
    shutil.rmtree(checkpoints / "4")
    launch(TORCHRUN, SCRIPT, *SMALL, *options, "--resume", "--output", tmp_path)
    clocked = ("neq/probe_seconds", "neq/time_saved")
    last, again = (
        {key: value for key, value in row.items() if key not in clocked}
        for row in rows_in(tmp_path)[3:]
    )
    assert last == again
    torch.testing.assert_close(values_in(checkpoints / "4"), state, rtol=0, atol=0)


def commands():
    """Those of the page that start the script, by their words."""
    page = (ROOT / "docs/integrations.md").read_text().replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith("    ") and SCRIPT in line]
    return [shlex.split(line) for line in lines]


def test_the_page_has_a_command_for_each_size():
    assert [words[:3] for words in commands()] == [
        ["python", SCRIPT, "--data"],
        ["torchrun", "--nproc-per-node", "8"],
        ["torchrun", "--nnodes", "4"],
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_commands_of_the_page(words, tmp_path):
    """On this machine: two processes for eight, two nodes of one for four, made-up data."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    nodes = 1 + ("--nnodes" in words)
    here = {"--nnodes": nodes, "--nproc-per-node": 3 - nodes, "--rdzv-endpoint": address}
    at = words.index(SCRIPT)
    launcher = words[1:at]
    for option, value in here.items():
        if option in launcher:
            launcher[launcher.index(option) + 1] = str(value)
    assert words[at + 1 :] == ["--data", "FOLDER", "--model", "resnet50"]
    if words[0] == "torchrun":
        launcher = ["-m", "torch.distributed.run", *launcher]
    arguments = *SMALL, "--epochs", "1", "--output", tmp_path

    with ThreadPoolExecutor(nodes) as pool:
        runs = [pool.submit(launch, launcher, SCRIPT, *arguments) for _ in range(nodes)]
    printed = "".join(run.result() for run in runs)
    assert printed.count("epoch 1") == 1  # by one of the processes
    assert len(rows_in(tmp_path)) == 1


def test_one_process_without_a_launcher(tmp_path, one_thread, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    imagenet.main([*SMALL, "--epochs", "1", "--output", str(tmp_path)])
    assert len(rows_in(tmp_path)) == 1


def test_the_learning_rate():
    shares = [imagenet.schedule(epoch, 8) for epoch in range(9)]
    assert shares[2] == max(shares) == 1
    assert shares[:2] == pytest.approx([0.01, 0.505])
    assert shares[5] == pytest.approx(0.5)
    assert shares[8] == pytest.approx(0)


def test_units_are_what_lies_in_the_outermost_sequences():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.body.append(nn.Sequential(nn.Linear(2, 2)))

    model = Model()
    assert [*imagenet.units(model)] == [model.body[0], model.body[2]]


@pytest.fixture
def libraries(monkeypatch):
    """Stand for torchvision and timm."""
    names = {}

    def model(name, num_classes):
        return nn.Linear(2, num_classes)

    for library, own in ("torchvision", "resnet50"), ("timm", "vit_base"):
        names[library] = own
        module = type(torch)(library)
        module.is_model = lambda name, own=own: name == own
        module.create_model = module.get_model = model
        module.list_models = lambda module, own=own: [own]
        module.models = module
        monkeypatch.setitem(sys.modules, library, module)
    return names


def test_a_model_of_either_library(libraries, monkeypatch):
    monkeypatch.setattr(imagenet_parts, "find_spec", lambda name: name in libraries)
    for name in libraries.values():
        assert imagenet_parts.network(name, 7).out_features == 7
    with pytest.raises(ValueError, match="of which torchvision and timm is installed"):
        imagenet_parts.network("resnet51", 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model no_such", r"error: --model no_such: neither tiny nor a model of torchvision or"),
        ("--data nowhere", r"error: .*nowhere"),
        ("--frozen 2", r"--frozen: must be a share from 0 to 1, got '2'"),
    ],
)
def test_errors(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        imagenet.main([*arguments.split(), "--output", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)
