"""FLOPs and bytes against counts by hand, and against the two dense figures of the NEq paper."""

import copy

import pytest
import torch
from torch import nn

import neq
from bench.lib.networks import classifier
from examples.resnet import resnet32
from neq import account
from neq.cost.account import Work

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_papers_figure_for_resnet32():
    model = neq.convert(resnet32())
    dense = account(model, torch.randn(1, 3, 32, 32)).dense.published_backprop_flops
    assert dense == 2 * (68_861_952 + 606_208)  # convolutions, norms
    assert f"{dense / 1e6:.2f}" == "138.94"
    assert account(model, torch.randn(3, 3, 32, 32)).dense.published_backprop_flops == dense


def test_the_papers_figure_for_resnet18():
    figure = account(
        neq.convert(classifier("resnet18")), torch.randn(1, 3, 224, 224)
    ).dense.published_backprop_flops
    assert f"{figure / 1e9:.2f}" == "3.64"


def test_the_papers_figure_under_masks():
    model = neq.convert(resnet32())
    model[0].set_active([0, 1, 2, 3])  # a quarter of 27 * 16 * 1024 multiply-adds
    model[1].set_active([])  # of 2 * 16 * 1024
    model[-1].set_active([])  # a linear layer is not in it
    result = account(model, torch.randn(2, 3, 32, 32))
    less = 2 * (27 * 16 * 1024 * 3 // 4 + 2 * 16 * 1024)
    assert result.now.published_backprop_flops == 138_936_320 - less
    assert result.dense.published_backprop_flops == 138_936_320


def test_a_linear_layer_by_hand():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False)))
    model[0].set_active([1, 2])
    layers = account(model, torch.randn(7, 3)).layers
    macs, x, y, w, b = 7 * 3 * 4, 7 * 3, 7 * 4, 3 * 4, 4
    dense, now = layers["0"].dense, layers["0"].now
    assert dense.forward == now.forward == Work(2 * macs, 4 * (x + w + b + y))
    assert dense.dgrad == now.dgrad == Work()  # nothing needs the gradient of the input
    assert dense.wgrad == Work(2 * macs, 4 * (x + y + w + b))
    assert now.wgrad == Work(macs, 4 * (x + y // 2 + w + b))
    # SGD: decay 2, momentum 2, step 2; moved are p, g, m, then p, m
    assert dense.optimizer == Work(6 * (w + b), 4 * 5 * (w + b))
    assert now.optimizer == Work(3 * (w + b), 2 * 5 * (w + b))
    assert dense.published_backprop_flops == 0

    second = layers["1"].now
    macs, x, y, w = 7 * 4 * 5, 7 * 4, 7 * 5, 4 * 5
    assert second.dgrad == Work(2 * macs, 4 * (y + w + x))
    assert second == layers["1"].dense
    assert (layers["0"].neurons, layers["0"].active, layers["0"].calls) == (4, 2, 1)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 8, 8), 2 * 6 * 16 * (2 * 9)),
        (nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9), 2 * 6 * 5 * (4 * 3)),
        (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 5), 2 * 4 * 25 * (3 * 9)),
        (nn.LayerNorm([4, 5]), (3, 4, 5), 2 * 60),
        (nn.BatchNorm2d(4), (3, 4, 5, 5), 2 * 300),
        (nn.Linear(4, 6), (2, 3, 4), 2 * 3 * 24),
    ],
    ids=lambda value: type(value).__name__,
)
def test_multiply_adds_by_hand(layer, shape, macs):
    first = nn.Linear(shape[-1], shape[-1])  # so that there is a dgrad
    plain = account(nn.Sequential(first, layer), torch.randn(shape)).layers["1"]
    converted = account(neq.convert(nn.Sequential(first, layer)), torch.randn(shape)).layers["1"]
    assert plain.dense == converted.dense == converted.now
    assert plain.dense.forward.flops == plain.dense.dgrad.flops == 2 * macs
    assert plain.dense.wgrad.flops == 2 * macs
    assert (plain.converted, plain.neurons) == (False, 0)


def test_the_transformers_librarys_conv1d():
    from transformers.pytorch_utils import Conv1D

    layer = account(neq.convert(nn.Sequential(Conv1D(6, 4))), torch.randn(5, 4)).layers["0"]
    assert layer.kind == "NEqTransformersConv1D"
    assert layer.dense.forward.flops == 2 * 5 * 4 * 6


def test_a_norm_pays_for_all_of_its_wgrad_or_none():
    model = neq.convert(nn.Sequential(nn.BatchNorm2d(4)))
    x = torch.randn(2, 4, 3, 3)
    dense = account(model, x).now.wgrad
    model[0].set_active([1])
    assert account(model, x).now.wgrad == dense
    assert account(model, x).now.optimizer.flops == 6 * 2
    model[0].set_active([])
    assert account(model, x).now.wgrad == Work()


def test_dgrad_is_pruned_below_the_first_layer_that_trains():
    model = neq.convert(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    model[0].set_active([])
    model[1].set_active([])
    result = account(model, torch.randn(2, 4))
    flops = 2 * 2 * 16
    assert [layer.dense.dgrad.flops for layer in result.layers.values()] == [0, flops, flops, flops]
    assert [layer.now.dgrad.flops for layer in result.layers.values()] == [0, 0, 0, flops]
    assert [layer.active for layer in result.layers.values()] == [0, 0, 4, 4]

    x = torch.randn(2, 4, requires_grad=True)  # all of it is wanted
    pruned = [layer.now.dgrad.flops for layer in account(model, x).layers.values()]
    assert pruned == [flops] * 4


def test_a_layer_that_does_not_train_is_outside_of_shares():
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
    model[0].requires_grad_(False).set_active([0])
    model[1].set_active([0])
    result = account(model, torch.randn(2, 3, 5, 5))
    first = result.layers["0"]
    assert (first.converted, first.neurons, first.active) == (True, 0, 0)
    assert first.now.wgrad == first.now.optimizer == Work()
    assert first.now.published_backprop_flops == first.dense.published_backprop_flops == 0
    assert result.skipped == 0.5
    line = next(x for x in str(result).splitlines() if x.startswith("0 "))
    assert line.split()[:4] == ["0", "NEqConv2d", "1", "-"]


def test_a_parameter_that_needs_no_gradient():
    model = neq.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).requires_grad_(False)
    costs = account(model, torch.randn(2, 4)).dense
    assert costs.forward.flops > 0
    assert costs.dgrad == costs.wgrad == costs.optimizer == Work()


class Twice(nn.Module):
    """A layer called twice, one that is never called, and a weight with two owners."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.copy = nn.Linear(4, 9, bias=False)
        self.head.weight = self.copy.weight = self.embedding.weight

    def forward(self, tokens, scale):
        x = self.twice(self.twice(self.embedding(tokens))) * scale
        return self.head(x) + self.copy(x)


@pytest.mark.parametrize("call", [tuple, list, dict])
def test_calls(call):
    model = neq.convert(Twice())
    inputs = {"tokens": torch.arange(3), "scale": 2.0}
    result = account(model, inputs if call is dict else call(inputs.values()))
    layers = result.layers
    assert {name: layer.calls for name, layer in layers.items()} == {
        "embedding": 1,
        "twice": 2,
        "never": 0,
        "head": 1,
        "copy": 1,
    }
    assert layers["twice"].dense.forward.flops == 2 * (2 * 3 * 16)
    assert layers["twice"].dense.optimizer.flops == 6 * (16 + 4)
    assert layers["never"].dense.total == Work()
    assert layers["embedding"].dense.optimizer.flops == 6 * 36
    # a weight is stepped once
    assert layers["head"].dense.optimizer == layers["copy"].dense.optimizer == Work()
    assert result.uncounted == ()


def test_a_lookup():
    """No multiply-adds; the gradient adds what was looked up, and is as large as the weight."""
    model = neq.convert(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 3)))
    model[0].set_active(range(25))
    tokens = torch.arange(40).view(4, 10)
    layer = account(model, tokens).layers["0"]
    indices, outputs, weight = 40 * 8, 320 * 4, 800 * 4  # bytes
    assert layer.dense.forward == Work(0, indices + outputs + outputs)
    assert layer.dense.dgrad == Work()
    assert layer.dense.wgrad == Work(320, indices + outputs + weight)
    assert layer.now.wgrad == Work(80, indices + outputs // 4 + weight)
    assert layer.dense.optimizer == Work(6 * 800, 5 * weight)
    assert layer.now.optimizer == Work(6 * 200, 5 * weight // 4)
    model[0].set_active([])
    assert account(model, tokens).layers["0"].now.wgrad == Work()


@pytest.mark.parametrize(
    ("make", "flops", "moved"),
    [
        (lambda p: torch.optim.SGD(p), 2, 3),
        (lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True), 6, 5),
        (lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=1e-4), 6, 5),
        (lambda p: torch.optim.Adam(p), 13, 7),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), 15, 7),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 15, 9),
    ],
)
def test_optimizers(make, flops, moved):
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    model[0].set_active([0])
    optimizer = make(model[0].parameters())
    result = account(model, torch.randn(2, 3), optimizer=optimizer)
    assert result.dense.optimizer == Work(flops * 16, moved * 16 * 4)  # the second has none
    assert result.now.optimizer == Work(flops * 4, moved * 4 * 4)


def test_nothing_is_disturbed():
    model = neq.convert(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.LayerNorm(4))
    )
    model.train()
    model[3].eval()
    model[0].set_active([1])
    rows = model[0].active
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    account(model, torch.randn(5, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, False]
    assert model[0].active is rows
    assert not model[0]._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_uses_random_numbers_in_eval_mode():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    model = nn.Sequential(Noisy(4, 4))
    generator = torch.get_rng_state()
    account(model, torch.zeros(2, 4))
    assert torch.equal(torch.get_rng_state(), generator)


def test_modes_are_restored_after_an_error():
    model = neq.convert(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="shapes"):
        account(model, torch.randn(2, 5))
    assert model.training
    assert not model[0]._forward_hooks


def test_predicted_beside_measured():
    model = neq.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 12)))
    model[1].set_active([0, 1, 2])  # a quarter of three quarters of the wgrad
    result = account(model, torch.randn(2, 4))
    assert result.skipped == 0.75 * 0.75
    time = result.step_time(dense=0.100, no_wgrad=0.068, measured=0.091)
    assert time.predicted == pytest.approx(0.100 - 0.5625 * 0.032)
    assert time.realised == pytest.approx(0.5)
    expected = "step: dense 100.000 ms, predicted 82.000 ms, measured 91.000 ms; realised 0.50"
    assert str(time) == expected
    model[1].set_active(None)
    nothing = account(model, torch.randn(2, 4)).step_time(dense=1.0, no_wgrad=0.5, measured=1.0)
    assert nothing.predicted == 1.0
    assert nothing.realised != nothing.realised


def test_the_table():
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.PReLU()))
    model[0].set_active([0, 1])
    lines = str(account(model, torch.randn(2, 3, 10, 10))).splitlines()
    table = [line.replace(" k", "k").replace(" M", "M").split() for line in lines[:4]]
    assert table == [
        "layer kind calls active forward dgrad wgrad optimizer moved".split(),
        "0 NEqConv2d 1 25.0% 55.30k 0 13.82k 336 12.83kB".split(),
        "now 55.30k 0 13.82k 336 12.83kB".split(),
        "dense 55.30k 0 55.30k 1.34k 19.26kB".split(),
    ]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4].endswith("per sample): 6.91 k of 27.65 k (-75.0%)")
    assert lines[5] == "not counted: 2"
    saved = 4 * (2 * 3 * 10 * 10 + 2 * 8 * 8 * 8)  # the inputs of the convolution and of PReLU
    assert saved == 6496
    kept = "weights 900 B, gradients 900 B, optimizer 900 B, activations 6.50 kB, together 9.20 kB"
    assert lines[6] == f"memory now: {kept}; dense: {kept}"


def test_bad_arguments():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"optimizer must be SGD, Adam or AdamW, .* got Rprop"):
        account(model, torch.randn(2, 4), optimizer=torch.optim.Rprop(model.parameters()))
    with pytest.raises(ValueError, match="example_inputs: there is no tensor among them"):
        account(nn.Identity(), (1, 2))


def test_a_model_that_differentiates_in_its_forward():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            x = x.requires_grad_()
            (dx,) = torch.autograd.grad(self.layer(x).square().sum(), x, create_graph=True)
            return dx

    assert neq.account(Energy(), torch.randn(2, 3)).layers["layer"].calls == 1
