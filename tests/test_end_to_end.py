"""bench/end_to_end.py: its steps are what they are called, its figures follow from its times."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import neq
from bench import end_to_end
from bench.end_to_end import Entry, Shares, compare, in_best_layout, time_parts
from bench.lib import networks, peak_memory, step_contenders, step_report
from bench.lib.networks import LAYOUTS, NETWORKS, Network, images, text
from bench.lib.problems import MODELS
from bench.lib.step_contenders import Bench, Gate, Step
from bench.lib.timing import Times
from neq_kernels import ops
from neq_kernels.wgrad import planner

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
TIMED = {f"{part}_{p}" for part in ("step", "gradients", "update") for p in ("p20", "ms", "p80")}
FACTS = {
    *("network", "samples", "parameters", "contender", "active", "dtype", "layout", "mode"),
    *("optimizer", "wrong", "backends", "peak_mib", "ratio", "realised", "realised_gradients"),
    *("ceiling", "ceiling_of_thirds"),
}


class Tiny(nn.Module):
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


IMAGES = Network(Tiny, partial(images, 8, 5), 4, 4, "SGD", LAYOUTS)
TEXT = Network(tiny_gpt2, partial(text, 6, 20), 2, 2, "AdamW")


@pytest.fixture
def tiny(monkeypatch):
    both = {"images": IMAGES, "text": TEXT}
    monkeypatch.setattr(end_to_end, "networks", lambda suite, device: both)


@pytest.fixture
def results(tiny, tmp_path):
    """Runs the benchmark with some arguments and returns its rows."""

    def run(*arguments):
        file = tmp_path / "results.json"
        end_to_end.main(["--device", "cpu", "--seconds", "0.001", "--json", str(file), *arguments])
        return json.loads(file.read_text())["results"]

    return run


@pytest.fixture
def bench():
    torch.manual_seed(0)
    return Bench(IMAGES, Tiny(), "contiguous", 4, CPU, torch.float32)


def step(bench, name, active):
    return Step(bench, name, active, Shares.of(bench).wgrads)


def test_json(results, tmp_path, capsys):
    rows = results("--plot", str(tmp_path / "plot.png"))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.keys() == {"environment", "results"}
    assert written["environment"]["torch"] == torch.__version__
    assert all(row.keys() == FACTS | TIMED for row in rows)
    some = (0.75, 0.5, 0.25, 0.1)
    others = [("none", 0), *(("neq", f) for f in (*some, 0))]
    others += [(name, 0.5) for name in ("masked", "gather", "layers")]
    for network, layouts in (("images", LAYOUTS), ("text", LAYOUTS[:1])):
        its = [row for row in rows if row["network"] == network]
        dense = [row for row in its if row["contender"] == "dense"]
        assert [row["layout"] for row in dense] == [*layouts]
        assert [(row["contender"], row["active"]) for row in its[len(dense) :]] == others
        assert all(row["layout"] in layouts for row in its)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "images x 4" in printed
    assert "neq: realised" in printed


def test_what_follows_from_the_times(results):
    rows = results("--only", "images", "--active", "1,.5,0")
    dense = min((r for r in rows if r["contender"] == "dense"), key=lambda r: r["step_ms"])
    none = next(r for r in rows if r["contender"] == "none")
    assert [r["active"] for r in rows if r["contender"] == "neq"] == [1, 0.5, 0]
    for row in rows:
        f = row["active"]
        assert row["step_p20"] <= row["step_ms"] <= row["step_p80"]
        assert row["ratio"] == row["step_ms"] / dense["step_ms"]
        assert row["ceiling_of_thirds"] == pytest.approx(3 / (3 - (1 - f)))
        assert row["ceiling"] == pytest.approx(1 / (f + (1 - f) / none["ceiling"]))
        if row["contender"] in ("dense", "none") or f == 1:
            assert row["realised"] is row["realised_gradients"] is None
            continue
        for part, realised in (("step", "realised"), ("gradients", "realised_gradients")):
            saved = dense[f"{part}_ms"] - row[f"{part}_ms"]
            at_most = dense[f"{part}_ms"] - none[f"{part}_ms"]
            assert row[realised] == pytest.approx(saved / ((1 - f) * at_most))


def test_who_steps_and_who_computes(results):
    kinds = {"images": ("SGD", 3), "text": ("AdamW", 4)}  # converted layers that have a matrix
    for row in results("--active", ".5"):
        kind, matrices = kinds[row["network"]]
        by_rows = row["contender"] in ("none", "neq", "gather")
        assert row["optimizer"] == f"{'neq' if by_rows else 'torch'} {kind}"
        if row["contender"] == "gather":
            assert row["backends"] == f"gather {matrices}"
        elif row["contender"] == "neq":
            counts = (part.split()[1] for part in row["backends"].split(", "))
            assert sum(map(int, counts)) == matrices
        else:
            assert row["backends"] == ""


def test_tune_and_table(results, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "_plans", {})
    monkeypatch.setattr(planner, "_measured", {})
    table = tmp_path / "table.json"
    results("--only", "text", "--active", ".5", "--tune", "--table", str(table))
    ((device, measured),) = json.loads(table.read_text()).items()
    assert len(measured) == 4
    packed = {key: dict.fromkeys(samples, "pack") for key, samples in measured.items()}
    table.write_text(json.dumps({device: packed}))
    rows = results("--only", "text", "--active", ".5", "--table", str(table))
    assert [r["backends"] for r in rows if r["contender"] == "neq"] == ["pack 4"]


def test_bfloat16(results):
    assert {row["dtype"] for row in results("--dtype", "bfloat16", "--active", ".5")} == {
        "bfloat16"
    }


def test_compile(results, monkeypatch):
    compiled = []

    def compile(model):
        compiled.append(model)
        return torch._dynamo.optimize("aot_eager")(model)

    monkeypatch.setattr(torch, "compile", compile)
    rows = results("--compile", "--only", "text", "--active", ".5,0")
    assert [type(model) for model in compiled] == [type(tiny_gpt2())] * 2
    assert {row["mode"] for row in rows} == {"compiled"}
    contenders = [row["contender"] for row in rows]
    assert contenders == ["dense", "none", "neq", "neq", "masked", "gather"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--active", "1,2"], "--active: must be fractions from 0 to 1"),
        (["--only", "alexnet"], "matches no network of the full suite, which has images, text"),
        (["--device", "toaster"], "--device: must be cpu, cuda or cuda:N, got 'toaster'"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
        (["--suite", "huge"], "--suite: invalid choice: 'huge'"),
        (["--seconds", "0"], "--seconds: must be a number above 0, got '0'"),
        (["--json", "no/such/folder/x.json"], "--json: 'no/such/folder/x.json' can't be written"),
        (["--plot", "plot.txt"], "--plot: 'plot.txt' must end in one of"),
        (["--table", "no-such-table.json"], "--table: no-such-table.json is no table of choices"),
        (["--graphs"], "--graphs: CUDA graphs need a GPU, the device is cpu"),
    ],
)
def test_bad_options(tiny, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        end_to_end.parse(["--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# The steps


class Convolutions(TorchDispatchMode):
    """Of each backward of a convolution inside, whether dX and dW are computed; or "rows"."""

    def __init__(self):
        super().__init__()
        self.wanted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.wanted.append(tuple(args[-1][:2]))
        if func is ops.conv_wgrad:
            self.wanted.append("rows")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "active", "wanted"),
    [
        ("dense", 1, [(True, True), (False, True)]),
        ("none", 0, [(True, False)]),  # which dense needs for the first layer's dW
        ("neq", 0, []),
        ("masked", 0.5, [(True, True), (False, True)]),
        ("gather", 0.5, ["rows", (True, False), "rows"]),
    ],
)
def test_what_a_step_computes(bench, name, active, wanted):
    one = step(bench, name, active)
    one.prepare()
    with Convolutions() as seen:
        one.gradients(0)
    assert seen.wanted == wanted
    for name, layer in bench.layers.items():
        rows = one.rows[name]
        assert rows.count == active * rows.neurons
        grad = layer.weight.grad
        assert rows.count == 0 or not grad[rows.order[rows.count :]].any()
        assert (grad is None) == (rows.count == 0)


def test_whole_layers(bench):
    wgrads = dict(Shares.of(bench).wgrads)
    assert wgrads.keys() == {"conv1", "bn1", "conv2", "bn2", "hidden"}
    for share in (1, 0.5, 0.1, 0):
        one = Step(bench, "layers", 1 - share, wgrads)
        frozen = [name for name, rows in one.rows.items() if rows.count == 0]
        rest = [flops for name, flops in wgrads.items() if name not in frozen]
        left = share * sum(wgrads.values()) - sum(wgrads[name] for name in frozen)
        assert 0 <= left < min(rest, default=1)
        one.prepare()
        for name, layer in bench.layers.items():
            assert layer.weight.requires_grad == (name not in frozen)
    step(bench, "dense", 1).prepare()
    assert all(p.requires_grad for p in bench.parameters.values())


def test_frozen_rows_rest_under_the_optimizer_by_rows(bench):
    bench.row_optimizer.param_groups[0]["lr"] = 1.0
    half = step(bench, "neq", 0.5)
    before = {name: layer.weight.detach().clone() for name, layer in bench.layers.items()}
    for _ in range(2):
        half.lead(0)
        half.gradients(0)
        half.update(0)
    for name, layer in bench.layers.items():
        moved = (layer.weight != before[name]).view(layer.n_neurons, -1).any(1)
        assert torch.equal(moved, half.rows[name].mask)
    assert all(p.grad is None for p in bench.parameters.values())


def test_share_of_the_weight_gradients(bench):
    shares = Shares.of(bench)
    per_pixel = {"conv1": 36 * 27 * 8, "conv2": 16 * 72 * 8, "bn1": 2 * 36 * 8, "bn2": 2 * 16 * 8}
    macs = {**per_pixel, "hidden": 8 * 16, "fc": 16 * 5}
    assert shares.wgrads == {name: 2 * macs[name] for name in bench.layers}
    # the first layer has no dgrad
    everything = 2 * (3 * sum(macs.values()) - macs["conv1"])
    assert shares.of_step == pytest.approx(sum(shares.wgrads.values()) / everything)


# A wrong step


def off_by_a_little(dw):
    dw[torch.nonzero(dw)[0][0]] *= 1.01


def unwritten(dw):
    dw[torch.nonzero(dw)[0][0]] = math.nan


def thawed(dw):
    dw[(dw == 0).flatten(1).all(1).nonzero()[0]] = 1e-9


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (off_by_a_little, r"the gradient of conv\d.weight is off by [\d.e-]+, allowed are"),
        (unwritten, r"the gradient of conv\d.weight is off by nan"),
        (thawed, r"the gradient of conv\d.weight is not zero for frozen neurons"),
    ],
)
def test_a_wrong_gradient_is_not_timed(bench, monkeypatch, fault, message):
    right = planner.conv_wgrad

    def wrong(*args):
        dw, db = right(*args)
        fault(dw)
        return dw, db

    gate = Gate("images", bench, step(bench, "dense", 1))
    gate.admit(step(bench, "gather", 0.5))
    monkeypatch.setattr(planner, "conv_wgrad", wrong)
    with pytest.raises(step_contenders.WrongResultError, match=message) as error:
        gate.admit(step(bench, "gather", 0.5))
    where = r"gather is wrong for images (contiguous) with 0.5 of the neurons active: "
    assert str(error.value).startswith(where)


@pytest.mark.parametrize("wrong", ["neq", "none"])
def test_who_is_wrong_is_not_timed_and_the_run_fails(results, wrong, tmp_path, monkeypatch, capsys):
    gradients = Step.gradients

    def spoilt(self, turn):
        return (1.1 if self.name == wrong else 1) * gradients(self, turn)

    monkeypatch.setattr(Step, "gradients", spoilt)
    message = rf"error: {wrong} is wrong for images \(contiguous\) .*: the loss is off by"
    with pytest.raises(SystemExit, match=message):
        results("--only", "images", "--active", ".5", "--plot", str(tmp_path / "plot.png"))
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    rejected = [row for row in rows if row["contender"] == wrong]
    assert [row["layout"] for row in rejected] == [*LAYOUTS]
    assert all(row.keys() == FACTS | TIMED for row in rows)
    for row in rows:
        assert (row["step_ms"] is None) == (row["contender"] == wrong) == bool(row["wrong"])
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if re.search(rf"{wrong} +contiguous", line))
    assert line.split().count("wrong") == 5


def test_what_was_measured_outlives_an_interruption(results, tmp_path, monkeypatch):
    each_round = end_to_end.each_round

    def interrupted(calls, device, seconds, fewest=5, **options):
        rounds = each_round(calls, device, seconds, fewest=fewest, **options)
        yield from islice(rounds, 2)
        if fewest > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "each_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results("--only", "images", "--active", ".5")
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "neq" in {row["contender"] for row in rows}


# The figures


def times(step, gradients):
    return {"step": Times(0, step, 0), "gradients": Times(0, gradients, 0)}


def test_realised_by_hand():
    dense, none, half = times(100, 90), times(60, 60), times(85, 78)
    assert compare(Entry("neq", 0.5, ""), dense, none, half) == {
        "ratio": 0.85,
        "realised": pytest.approx(15 / 20),
        "realised_gradients": pytest.approx(12 / 15),
    }
    assert compare(Entry("neq", 1, ""), dense, none, half)["realised"] is None
    assert compare(Entry("none", 0, ""), dense, none, none)["realised"] is None


class Fake:
    """A step whose parts take their time on a clock of their own, a second more or less."""

    def __init__(self, clock, gradients, update):
        self.takes, self.clock, self.turns = {"gradients": gradients, "update": update}, clock, []

    def lead(self, turn):
        self.clock[0] += 1000

    def gradients(self, turn):
        self.turns.append(turn)
        self.clock[0] += self.takes["gradients"] + len(self.turns) % 2

    def update(self, turn):
        self.clock[0] += self.takes["update"] - len(self.turns) % 2


@pytest.fixture
def fake(monkeypatch):
    clock = [0.0]
    timed = partial(end_to_end.each_round, clock=lambda: clock[0])
    monkeypatch.setattr(end_to_end, "each_round", timed)
    return partial(Fake, clock)


def test_parts_add_up_round_by_round(fake):
    entry = Entry("neq", 0.5, "contiguous")
    *_, found = (times[entry] for times in time_parts({entry: fake(5, 3)}, CPU, 1e-9))
    assert found["step"] == (8000, 8000, 8000)
    assert found["gradients"].p20 < found["gradients"].p80


def test_each_contender_has_its_best_layout(fake):
    takes = {
        ("dense", 1, "contiguous"): 9,
        ("neq", 0.1, "contiguous"): 1,  # only the one near a half decides
        ("neq", 0.5, "contiguous"): 8,
        ("dense", 1, "channels_last"): 7,
        ("neq", 0.1, "channels_last"): 9,
        ("neq", 0.5, "channels_last"): 6,
    }
    chosen = in_best_layout({Entry(*key): fake(t, 0) for key, t in takes.items()}, CPU)
    assert [tuple(entry) for entry in chosen] == [
        ("dense", 1, "contiguous"),
        ("dense", 1, "channels_last"),
        ("neq", 0.1, "channels_last"),
        ("neq", 0.5, "channels_last"),
    ]


def test_verdict():
    def row(contender, active, ratio, realised):
        return {
            "network": "toast",
            "mode": "compiled" if active == 0.25 else "eager",
            "dtype": "float32",
            "contender": contender,
            "active": active,
            "ratio": ratio,
            "realised": realised,
        }

    rows = [
        row("dense", 1, 1, None),
        row("neq", 0.75, 1.5, -9),
        row("neq", 0.5, 1.02, -0.1),
        row("neq", 0.25, 1.04, -0.2),
        row("neq", 0.1, 0.7, 0.9),
        row("neq", 0, 0.1, 9),
        row("gather", 0.5, 0.9, 0.4),
    ]
    assert step_report.verdict(rows, "toaster").splitlines() == [
        "toaster, float32, whole steps with 0 < f <= 0.5:",
        "neq: realised -0.10 median, -0.20 worst (toast, compiled, f = 0.25); "
        "slower than dense in 2 (1 by more than 3%) of 3 results",
        "gather: realised 0.40 median, 0.40 worst (toast, f = 0.5); slower than dense in 0 "
        "(0 by more than 3%) of 1 results",
    ]


# Memory


def test_the_peak_is_exact():
    held = []

    def call():
        held.append(torch.ones(2 << 20))  # 8 MiB
        torch.ones(4 << 20)  # 16 MiB, freed at once
        torch.ones(1 << 20)

    assert peak_memory.peak_bytes(call, CPU) == 24 << 20
    assert peak_memory.peak_bytes(lambda: None, CPU) == 0


FREED = """
import resource
import torch
import neq  # as every benchmark does: its small objects leave holes for those of a call
from bench.lib.timing import interleave

def pages(turn=0):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages())
interleave({"call": pages}, torch.device("cpu"), 0.001)
print(pages())
"""


def test_what_is_freed_stays_while_steps_are_timed():
    run = subprocess.run(
        [sys.executable, "-c", FREED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    otherwise, timed = map(int, run.stdout.split())
    assert otherwise > 1000
    assert timed < 100


def test_batches_are_halved_until_they_fit(tiny, monkeypatch, capsys):
    tried = []

    def measure(name, network, samples, given, bar):
        tried.append((name, samples))
        if samples > 1 or name == "text":
            raise torch.OutOfMemoryError
        yield [{"network": name, "wrong": {}}]

    monkeypatch.setattr(end_to_end, "measure", measure)
    monkeypatch.setattr(step_report, "show", lambda rows, facts: print(rows[0]["network"]))
    end_to_end.main(["--device", "cpu"])
    assert tried == [("images", 4), ("images", 2), ("images", 1), ("text", 2), ("text", 1)]
    printed = capsys.readouterr()
    assert printed.out.endswith("images\n")
    assert "text is left out: not one sample fits into memory" in printed.err
    with pytest.raises(SystemExit, match="error: no network fits into the memory of this device"):
        end_to_end.main(["--device", "cpu", "--only", "text"])


# The networks


def test_suites():
    full = networks.networks("full", "cpu")
    assert [*full] == ["resnet32", "resnet18", "resnet50", "swin-t", "vit-s", "gpt2"]
    assert [*networks.networks("quick", "cpu")] == [*networks.QUICK]
    assert [*networks.networks("full", "cuda")] == [*NETWORKS]
    assert NETWORKS.keys() <= MODELS.keys()


def test_resnet32_is_the_papers():
    model = neq.convert(NETWORKS["resnet32"].build())
    account = neq.account(model, images(32, 10, 1))
    assert f"{account.dense.published_backprop_flops / 1e6:.2f}" == "138.94"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_are_built_and_give_a_loss(name):
    network = NETWORKS[name]
    with torch.device("meta"):
        model, batch = network.build().train(), network.batch(2)
        # a cache: without one, the library looks into a batch of text, and there is nothing in it
        cache = {"use_cache": True} if "input_ids" in batch else {}
        assert model(**batch, **cache)["loss"].shape == ()
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert not any(dropouts), "a step has to compute the same each time"
