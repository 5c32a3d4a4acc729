"""bench/gpu_check.py itself, on parts that need no GPU."""

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import backward_speed, end_to_end, gpu_check
from bench.gpu_check import Part
from bench.networks import NETWORKS
from bench.problems import problems
from bench.timing import environment

ROOT = Path(__file__).parent.parent
ROW = {
    "op": "linear_wgrad",
    "name": "vit-s/mlp.up",
    "shape": "50 x 8 -> 8",
    "count": 12,
    "dtype": "bfloat16",
    "layout": "contiguous",
    "dense_layout": "contiguous",
    "active": 0.5,
    "backend": "fused",
    "ratio": 0.6,
    "realised": 0.8,
    **{
        f"{name}_{what}": 1.0
        for name in ("dense", "plain", "neq", "masked", "gather")
        for what in ("p20", "ms", "p80")
    },
}


STEP = {
    "network": "vit-s",
    "samples": 256,
    "contender": "neq",
    "active": 0.5,
    "dtype": "bfloat16",
    "layout": "contiguous",
    "optimizer": "neq AdamW",
    "backends": "fused 73",
    "peak_mib": 100.0,
    "ratio": 0.9,
    "realised": 0.8,
    "realised_gradients": 0.7,
    "ceiling": 1.2,
    "ceiling_of_thirds": 1.2,
    **{
        f"{part}_{p}": 1.0 for part in ("step", "gradients", "update") for p in ("p20", "ms", "p80")
    },
}
NONE = STEP | {"contender": "none", "active": 0, "realised": None, "realised_gradients": None}


SLOW = """
import time
print(1, flush=True)
try:
    time.sleep(99)
except KeyboardInterrupt:
    print("what it knows")
"""
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("command", "seconds", "ended", "last_line"),
    [
        (python("print('some\\nthing\\n')"), 60, "passed", "thing"),
        (python("import sys; sys.exit('no')"), 60, "failed with exit status 1", "no"),
        (python(SLOW), 5, "stopped after 5 s", "what it knows"),
        (python(f"{DEAF}\n{SLOW}"), 5, "stopped after 5 s", "1"),
        (["no-such-tool"], 60, "left out: no no-such-tool on the PATH", ""),
        (python(""), 0, "left out: no time was left", ""),
    ],
    ids=["passes", "fails", "is slow", "does not listen", "is missing", "is late"],
)
def test_how_a_part_ends(command, seconds, ended, last_line, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    end = gpu_check.time.monotonic() + seconds
    outcome = gpu_check.run(Part("part", command, until=1), tmp_path, end)
    assert (outcome.ended, outcome.last_line) == (ended, last_line)


def test_what_one_part_loses_the_others_keep(tmp_path, capsys):
    def writes(name, rows):
        file, text = str(tmp_path / f"{name}.json"), json.dumps({"results": rows})
        return Part(name, python(f"open({file!r}, 'w').write({text!r})"), 1)

    parts = [writes("speed vit", [ROW]), writes("steps vit", [NONE, STEP])]
    parts.append(Part("other", python("1 / 0"), 1))
    facts = environment(torch.device("cpu"))
    with (
        mock.patch.object(gpu_check, "parts", return_value=parts),
        mock.patch.object(gpu_check, "environment", return_value=facts),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
    ):
        assert gpu_check.main(["--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert summary["environment"] == facts
    assert summary["results"] == [ROW]
    assert summary["steps"] == [NONE, STEP]
    ended = [part["ended"] for part in summary["parts"]]
    assert ended == ["passed", "passed", "failed with exit status 1"]
    assert "ZeroDivisionError" in summary["parts"][2]["last_line"]
    assert (tmp_path / "backward_speed.png").stat().st_size > 0
    assert (tmp_path / "end_to_end.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "vit-s" in printed
    assert "fused 1" in printed
    assert "vit-s x 256" in printed


def test_parts_are_commands_that_exist(tmp_path):
    parts = list(gpu_check.parts(tmp_path, 480))
    assert [part.until for part in parts] == sorted(part.until for part in parts)
    timed, stepped = [], []
    for part in parts:
        if part.name.startswith("steps"):
            steps = [argument.replace("cuda", "cpu") for argument in part.command[2:]]
            with mock.patch.object(end_to_end, "networks", return_value=NETWORKS):
                stepped += end_to_end.parse(steps).networks
        elif part.name.startswith("speed"):
            speed = [argument.replace("cuda", "cpu") for argument in part.command[2:]]
            timed += [problem.name for problem in backward_speed.parse(speed).problems]
        elif part.command[1].startswith("bench/"):
            script = importlib.import_module(f"bench.{part.name}")
            script.parse([argument.replace("cuda", "cpu") for argument in part.command[2:]])
    assert sorted(timed) == sorted(problem.name for problem in problems("full", "cpu"))
    assert sorted(stepped) == sorted(gpu_check.NETWORKS)
    for kernel in gpu_check.KERNELS:
        file, name = kernel.split("::")
        assert f"def {name}(" in (ROOT / file).read_text()


def test_needs_a_gpu(capsys):
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=False),
        pytest.raises(SystemExit),
    ):
        gpu_check.main([])
    assert f"needs a GPU: torch {torch.__version__} sees no CUDA" in capsys.readouterr().err
