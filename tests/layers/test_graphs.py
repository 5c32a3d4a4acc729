"""A whole training step as a CUDA graph, on any stream, and without waiting for the GPU.

On a CPU, where there is nothing to capture, the same tests show that they compare like with like.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import neq
from neq_kernels.step import ops as step_ops
from neq_kernels.wgrad import ops as wgrad_ops
from neq_kernels.wgrad import planner
from tests.support.tensors import on_devices

pytestmark = pytest.mark.usefixtures("one_thread", "without_tf32")
OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "amsgrad": True},
}
by_both = pytest.mark.parametrize("name", [*OPTIMIZERS])


@pytest.fixture
def without_tf32():
    """Nor with sums in an order that changes from run to run."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


@pytest.fixture(params=[*planner.BACKENDS], autouse=True)
def backend(request, fresh_planner):
    """Where this backend can compute a layer's gradient, it does."""
    with planner.only(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str, autouse=True)
def precision(request, monkeypatch):
    """That of the products, by autocast."""
    monkeypatch.setattr(Training, "precision", request.param)
    return request.param


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.narrow = nn.Conv2d(16, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.layer_norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.norm(F.gelu(self.conv(x)))  # a bias before a norm would train on mere rounding
        x = F.gelu(self.narrow(x))
        x = self.up(x + self.depthwise(x)).mean((2, 3))
        return self.head(F.gelu(self.hidden(self.layer_norm(x))))


class Training:
    """A model, its optimizer, and a step that reads its batch from where it always lies."""

    precision = torch.float32

    def __init__(self, name, device):
        torch.manual_seed(0)
        self.model = neq.convert(Model().to(device, memory_format=torch.channels_last))
        options = dict(OPTIMIZERS[name])
        if name == "AdamW" and device == "cuda":
            options |= {"capturable": True, "lr": torch.tensor(options["lr"], device=device)}
        kind = getattr(neq.optim, name)
        self.optimizer = kind(self.model.parameters(), **options, layers=self.model)
        x = torch.zeros(4, 3, 9, 9, device=device)
        self.x = x.to(memory_format=torch.channels_last)
        self.labels = torch.zeros(4, dtype=torch.int64, device=device)

    def freeze(self, seed):
        """Some neurons of most layers, all of one, none of the head."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.model.children():
            layer.set_active(torch.rand(layer.n_neurons, generator=generator) < 0.5)
        self.model.head.set_active(None)
        (self.model.hidden if seed % 2 else self.model.depthwise).set_active([])

    def take(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.labels.copy_(torch.randint(5, self.labels.shape, generator=generator))

    def step(self):
        self.optimizer.zero_grad()
        low = self.precision is not torch.float32
        # its cache of cast weights would be a graph's own, and outlive it
        with torch.autocast(self.x.device.type, torch.bfloat16, low, cache_enabled=False):
            loss = F.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()

    def state(self):
        states = self.optimizer.state_dict()["state"]
        moments = {
            f"{i} {key}": t for i, s in states.items() for key, t in s.items() if t is not None
        }
        return copy.deepcopy(self.model.state_dict() | moments)

    def frozen(self):
        """The parameters' frozen elements, one after the other."""
        return [
            p[~layer.spread(layer.active_mask).expand_as(p)]
            if p.dim() > 1
            else p[~layer.active_mask]
            for layer in self.model.children()
            for p in layer.parameters()
        ]


def captured(training):
    """Takes a step, which compiles what it needs; returns what runs further ones without Python:
    the replay of a graph. On a CPU, the step itself.
    """
    if training.x.is_cpu:
        training.step()
        return training.step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training.step()
        training.optimizer.zero_grad()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        training.step()
    return graph.replay


def alike(mine, expected):
    assert mine.keys() == expected.keys()
    for key, t in mine.items():
        torch.testing.assert_close(t, expected[key], rtol=1e-4, atol=1e-5, msg=key)


class Reads(TorchDispatchMode):
    """Collects what Python, or the size of a result, depends on: a GPU would have to be waited for.

    Also inside of this project's operators.
    """

    READERS = (
        "item",
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "unique",
    )

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "neq":
            family = step_ops if name.endswith("_rows_") else wgrad_ops
            with self:
                return getattr(family, f"_{name}")(*args, **(kwargs or {}))
        if name.split(".")[0] in self.READERS:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


ABLE = {  # to compute a gradient of this model in each precision
    ("cpu", torch.float32): {"dense", "pack", "native"},
    ("cpu", torch.bfloat16): {"dense", "pack", "native"},
    ("cuda", torch.float32): {"dense", "pack", "grouped"},
    ("cuda", torch.bfloat16): {"dense", "pack", "grouped", "narrow"},
}


@on_devices
def test_the_model_gives_each_backend_something_to_do(device, backend, precision):
    training = Training("SGD", device)
    training.freeze(1)
    training.step()
    assert (backend in planner._choices.values()) == (backend in ABLE[device, precision])


def two_of(name, device):
    """Alike, with the same rows frozen and the same batch to take."""
    pair = Training(name, device), Training(name, device)
    for training in pair:
        training.freeze(0)
        training.take(0)
    return pair


def replay_beside_steps(replay, mine, eager):
    """Batches by a graph's replay, and the same by ordinary steps."""
    for batch in range(10, 13):
        mine.take(batch)
        replay()
        eager.take(batch)
        eager.step()
    alike(mine.state(), eager.state())


@on_devices
@by_both
def test_replays_are_steps_and_so_are_those_of_a_new_graph_after_other_masks(device, name):
    mine, eager = Training(name, device), Training(name, device)
    for seed in range(3):
        for training in (mine, eager):
            training.freeze(seed)
            training.take(seed)
        frozen = [t.clone() for t in mine.frozen()]
        replay = captured(mine)
        eager.step()
        before = mine.state()
        replay_beside_steps(replay, mine, eager)
        assert not torch.equal(mine.model.conv.weight, before["conv.weight"])
        for t, kept in zip(mine.frozen(), frozen, strict=True):
            assert torch.equal(t, kept)


@pytest.mark.gpu
@by_both
def test_a_graph_that_outlived_its_mask_is_stale_but_safe(name):
    """What it reads is still there, however much is allocated since."""
    mine, eager = two_of(name, "cuda")
    replay = captured(mine)
    eager.step()
    for seed in 1, 2:
        mine.freeze(seed)
    kept = [torch.full((n,), 2**40, device="cuda") for n in range(1, 100) for _ in range(20)]
    replay_beside_steps(replay, mine, eager)
    assert all(bool((t == 2**40).all()) for t in kept)


@on_devices
@by_both
def test_a_step_waits_for_nothing(device, name):
    training = Training(name, device)
    training.freeze(0)
    training.take(0)
    training.step()
    with no_waiting(device):
        training.step()
        training.step()


@by_both
def test_what_a_step_reads_is_on_the_host_for_a_gpu_too(name):
    """The numbers of active rows, the learning rate, and Adam's steps unless capturable.

    Compiled code reads by itself, and takes tensors of the host only.
    """
    training = Training(name, "cpu")
    training.freeze(0)
    training.take(0)
    training.step()
    with Reads() as reads:
        training.step()
    lengths = [layer.active.count for layer in training.model.children()]
    steps = [state["step"] for state in training.optimizer.state.values() if "step" in state]
    rates = [t for t in reads.read if t.dtype is torch.float64]
    assert {t.item() for t in rates} == {OPTIMIZERS[name]["lr"]}
    for t in reads.read:
        assert any(t is known for known in [*rates, *lengths, *steps])


@pytest.mark.gpu
@by_both
def test_a_step_follows_the_current_stream(name):
    mine, eager = two_of(name, "cuda")
    for training in (mine, eager):
        training.step()
        training.take(1)
    batch = mine.x.clone()
    mine.x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # what runs on any other stream would see zeros
        mine.x.copy_(batch)
        mine.step()
    torch.cuda.synchronize()
    eager.step()
    alike(mine.state(), eager.state())
