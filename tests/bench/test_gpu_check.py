"""bench/gpu_check.py itself, on parts that need no GPU."""

import importlib
import json
import sys
from unittest import mock

import pytest
import torch

from bench import backward_speed, end_to_end, gpu_check
from bench.gpu_check import Part
from bench.lib.environment import environment
from bench.lib.networks import NETWORKS
from bench.lib.problems import problems
from tests.support import ROOT

ROW = {
    "op": "linear_wgrad",
    "name": "vit-s/mlp.up",
    "shape": "50 x 8 -> 8",
    "count": 12,
    "dtype": "bfloat16",
    "layout": "contiguous",
    "dense_layout": "contiguous",
    "active": 0.5,
    "backend": "pack",
    "ratio": 0.6,
    "realised": 0.8,
    "wrong": {},
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
    "requested": None,
    "dtype": "bfloat16",
    "layout": "contiguous",
    "mode": "eager",
    "optimizer": "neq AdamW",
    "wrong": {},
    "backends": "pack 73",
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
TESTS = SLOW.replace("what it knows", "{}, 3 passed in 5s").format
REFUSES = "print('= Error: Device not supported.'); print('1 failed'); exit(1)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


SOAK_TEST = f"def test_same_bits_{gpu_check.SOAK}"


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("command", "seconds", "ended", "last_line"),
    [
        (python("print('some\\nthing\\n')"), 60, "passed", "thing"),
        (python("import sys; sys.exit('no')"), 60, "failed with exit status 1", "no"),
        (python(SLOW), 5, "stopped after 5 s", "what it knows"),
        (python(f"{DEAF}\n{SLOW}"), 5, "stopped after 5 s", "1"),
        (python(TESTS("1 skipped")), 5, "stopped after 5 s: 3 passed", "1 skipped, 3 passed in 5s"),
        (
            *(python(TESTS("2 failed")), 5),
            *("failed, stopped after 5 s: 2 failed, 3 passed", "2 failed, 3 passed in 5s"),
        ),
        (python(REFUSES), 60, "left out: Device not supported", "1 failed"),
        (["no-such-tool"], 60, "left out: no no-such-tool here", ""),
        (python(""), 0, "left out: no time was left", ""),
    ],
    ids=[
        "passes",
        "fails",
        "is slow",
        "does not listen",
        "tests",
        "failing tests",
        "refuses",
        "is missing",
        "is late",
    ],
)
def test_how_a_part_ends(command, seconds, ended, last_line, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    end = gpu_check.time.monotonic() + seconds
    outcome = gpu_check.run(Part("part", command, seconds=99), tmp_path, end, "abc")
    assert (outcome.ended, outcome.last_line) == (ended, last_line)
    assert outcome.revision == "abc"


def test_a_part_has_a_limit_of_its_own(tmp_path):
    end = gpu_check.time.monotonic() + 99
    outcome = gpu_check.run(Part("part", python(SLOW), seconds=3), tmp_path, end, "abc")
    assert outcome.ended == "stopped after 3 s"


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("8 workers [5759 items]\n....\n== 2 failed, 40 passed in 3.21s ==", "42 of 5759"),
        ("collected 90 items / 30 deselected / 60 selected\n1 error, 4 passed in 2s", "5 of 60"),
        ("collected 1 item\n1 passed in 2s", "1 of 1"),
        ("8 workers [7 items]\n...", "0 of 7"),
        ("realised 0.9 in the median", ""),
    ],
)
def test_how_many_tests_ran(log, told):
    assert gpu_check.tests_in(log) == told


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs some parts; gives the exit status."""
    facts = environment(torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "environment", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def check(*parts, asked=()):
        monkeypatch.setattr(gpu_check, "parts", lambda out: parts)
        return gpu_check.main(["--out", str(tmp_path), "--minutes", "2", *asked])

    return check


def writes(folder, name, rows):
    file, text = str(folder / f"{name}.json"), json.dumps({"results": rows})
    return Part(name, python(f"open({file!r}, 'w').write({text!r})"), 60, folder / f"{name}.json")


def test_what_one_part_loses_the_others_keep(check, tmp_path, capsys):
    parts = [writes(tmp_path, "speed vit", [ROW]), writes(tmp_path, "steps vit", [NONE, STEP])]
    assert check(*parts, Part("other", python("1 / 0"), 60)) == 1
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert summary["environment"]["cpu"]
    assert summary["results"] == [ROW]
    assert summary["steps"] == [NONE, STEP]
    ended = [part["ended"] for part in summary["parts"]]
    assert ended == ["passed", "passed", "failed with exit status 1"]
    assert "ZeroDivisionError" in summary["parts"][2]["last_line"]
    assert (tmp_path / "backward_speed.png").stat().st_size > 0
    assert (tmp_path / "end_to_end.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "vit-s" in printed
    assert "pack 1" in printed
    assert "vit-s x 256" in printed


def test_granules_are_results_of_their_own(check, tmp_path, capsys):
    """Beside those of scattered neurons, with which they are not mixed in medians."""
    row = ROW | {"granule": 16, "realised": 0.95}
    parts = [writes(tmp_path, "speed vit", [ROW]), writes(tmp_path, "granules vit", [row])]
    assert check(*parts) == 0
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert summary["results"] == [ROW, row]
    of_one, of_granules = capsys.readouterr().out.split("in granules: realised")
    assert "0.95" in of_granules
    assert "0.95" not in of_one
    assert check(writes(tmp_path, "granules vit", [row | {"wrong": {"neq": "is off"}}])) == 1


def test_what_is_cut_off_or_missing_is_named_and_no_failure(check, capsys):
    assert check(Part("tests", python(TESTS("1 skipped")), 3), Part("tool", ["no-tool"], 60)) == 0
    printed = capsys.readouterr().out
    assert "stopped after 3 s: 3 passed" in printed
    assert "left out: no no-tool here" in printed


@pytest.mark.parametrize("kind", ["speed", "steps"])
def test_a_wrong_result_is_a_failure_of_a_part_that_was_cut_off_too(kind, check, tmp_path, capsys):
    unknown = {"ratio": None, "realised": None, "wrong": {"neq": "dW by neq is wrong for vit"}}
    spoilt = (ROW if kind == "speed" else STEP) | unknown
    spoilt |= {key: None for key in spoilt if key.startswith(("neq_", "step_"))}
    assert check(writes(tmp_path, f"{kind} vit", [spoilt])) == 1
    assert "dW by neq is wrong for vit" in capsys.readouterr().out


def test_calls_add_to_one_another(check, tmp_path, capsys):
    speed, steps = writes(tmp_path, "speed vit", [ROW]), writes(tmp_path, "steps vit", [NONE, STEP])
    assert check(speed, steps, asked=["--parts", "steps"]) == 0
    assert check(speed, steps, asked=["--parts", "^speed"]) == 0
    summary = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["name"] for part in summary["parts"]] == ["speed vit", "steps vit"]
    assert (summary["results"], summary["steps"]) == ([ROW], [NONE, STEP])

    worse = writes(tmp_path, "speed vit", [ROW | {"ratio": 0.7}])
    assert check(worse, steps, asked=["--parts", "^speed"]) == 0
    assert json.loads((tmp_path / "gpu_check.json").read_text())["results"][0]["ratio"] == 0.7
    with pytest.raises(SystemExit):
        check(speed, steps, asked=["--parts", "magic"])
    assert "'magic' matches no part, there are speed vit, steps vit" in capsys.readouterr().err


def test_results_of_another_machine_are_not_added_to(check, tmp_path, monkeypatch):
    speed = writes(tmp_path, "speed vit", [ROW])
    assert check(speed) == 0
    other = environment(torch.device("cpu")) | {"gpu": "NVIDIA H200"}
    monkeypatch.setattr(gpu_check, "environment", lambda device: other)
    with pytest.raises(SystemExit, match=r"holds results of .*, this is NVIDIA H200: give another"):
        check(speed)


def test_the_parts_are_listed_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--list"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].endswith("s  exact tests of kernels")
    assert len(listed) == len(list(gpu_check.parts(ROOT)))


def test_a_file_of_tests_that_cannot_be_read_keeps_no_other_from_running(check, tmp_path):
    (part,) = (part for part in gpu_check.parts(tmp_path) if part.name == "other gpu tests")
    own = [flag for flag in part.command if flag.startswith("--continue")]
    (tmp_path / "test_lacks.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "test_runs.py").write_text("def test_it(): pass")
    files = [str(tmp_path / name) for name in ("test_lacks.py", "test_runs.py")]
    check(Part("others", [sys.executable, "-m", "pytest", "-q", *own, *files], 60))
    assert "1 passed, 1 error" in (tmp_path / "others.log").read_text()


def test_every_soak_is_in_a_file_that_the_part_names(tmp_path):
    (part,) = (part for part in gpu_check.parts(tmp_path) if part.name == "soak")
    assert "-n" not in part.command
    files = {f for f in (ROOT / "tests").rglob("test_*.py") if SOAK_TEST in f.read_text()}
    assert {ROOT / argument for argument in part.command if argument.endswith(".py")} >= files
    assert len(files) == 3
    others = [one for one in gpu_check.parts(tmp_path) if "tests of kernels" in one.name]
    assert len(others) == 2
    assert all(f"not {gpu_check.SOAK}" in " ".join(one.command) for one in others)


def test_finds_tools_that_only_cuda_has_on_its_path(tmp_path, monkeypatch):
    assert gpu_check.find("no-such-tool") == "no-such-tool"
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin/no-such-tool"
    tool.touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find("no-such-tool") == str(tool)


def test_parts_are_commands_that_exist(tmp_path):
    parts = list(gpu_check.parts(tmp_path))
    timed, stepped, granular = [], [], []
    for part in parts:
        if part.name.startswith("steps"):
            steps = [argument.replace("cuda", "cpu") for argument in part.command[2:]]
            modes = {"--compile", "--graphs"} & {*steps}
            steps = [argument for argument in steps if argument != "--graphs"]
            with mock.patch.object(end_to_end, "networks", return_value=NETWORKS):
                given = end_to_end.parse(steps)
            modes |= {f"granules of {given.granule}"} if given.granule > 1 else set()
            stepped += ((name, *modes) for name in given.networks)
        elif part.name.startswith("speed"):
            speed = [argument.replace("cuda", "cpu") for argument in part.command[2:]]
            timed += [problem.name for problem in backward_speed.parse(speed).problems]
        elif part.name.startswith("granules"):
            given = [argument.replace("cuda", "cpu") for argument in part.command[2:]]
            granular.append(backward_speed.parse(given))
        elif part.command[1].startswith("bench/"):
            script = importlib.import_module(f"bench.{part.name}")
            script.parse([argument.replace("cuda", "cpu") for argument in part.command[2:]])
    assert sorted(timed) == sorted(problem.name for problem in problems("full", "cpu"))
    assert [given.granule for given in granular] == [16]
    assert len(granular[0].problems) > 10
    assert stepped[:4] == [(name,) for name in gpu_check.STEPS]
    assert stepped[4:] == [
        ("llama-1b", "granules of 16"),
        ("resnet50", "--graphs"),
        ("gpt2", "--compile"),
        ("resnet50", "--compile"),
    ]
    assert len({part.name for part in parts}) == len(parts)
    first = ["exact tests of kernels", "soak", "constants"]
    assert [part.name for part in parts][:3] == first
    assert all((ROOT / file).exists() for file in gpu_check.COMPILED)
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
