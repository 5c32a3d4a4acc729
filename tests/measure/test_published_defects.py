"""What is wrong in the code published with the NEq paper and in its follow-ups' copies, and is not
here: a test for each defect.
"""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq
from examples import cifar10
from neq_kernels.wgrad import pack
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def flops(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_the_gradient_of_frozen_neurons_is_not_computed():
    """There it is, all of it, and then zeroed."""
    dy, x, weight = torch.randn(9, 64), torch.randn(9, 5), torch.randn(64, 5)
    rows = torch.arange(64)
    for active in (16, 64):
        done = flops(pack.linear_wgrad, dy, x, weight, rows, active, False)
        assert done == 2 * 9 * 5 * active
    model = neq.convert(perceptron())
    loss = model(torch.randn(3, 4)).sum()
    dense = flops(loss.backward)
    model[0].set_active([])
    loss = model(torch.randn(3, 4)).sum()
    # nor what only its gradient needed: that of what came out of it
    assert flops(loss.backward) == 2 * 3 * 6 * 2 < dense


def test_velocity_is_the_papers():
    """There v = μ v' + Δφ - Δφ'. It is to be had by name."""
    phi = torch.tensor([[0.5], [0.75], [1.0]])
    paper, released = neq.Velocity(0.5), neq.Velocity(0.5, "released")
    assert [paper.update(x).item() for x in phi] == [-0.5, 0.5, 0]
    assert [released.update(x).item() for x in phi] == [-0.5, 0.5, 0.25]
    assert neq.Equilibrium().recurrence == "paper"


def test_the_short_way_freezes():
    """Two of the three documented commands never apply a mask. Here a mask is all it takes."""
    model, x = perceptron(), torch.randn(5, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    control = neq.Controller(model, probe=x, optimizer=optimizer, policy=neq.Equilibrium(1e9))
    control.step()
    before = copy.deepcopy(model.state_dict())
    model(x).square().sum().backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value) == key.startswith("0.")  # "2" is the classifier


def test_tokens_are_not_scrambled_with_channels():
    """There a hook views [B, N, C] as [B, C, -1], so that a row is no channel."""
    model = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(3, 6, 4)
    control = neq.Controller(
        model, probe=x, policy=neq.Equilibrium(1e-6), optimizer=(), leave_alone=()
    )
    with torch.no_grad():
        model[0].weight[2] *= -1
        model[0].bias[2] *= -1
    control.step()
    assert control._phi.tolist() == [1, 1, -1, 1, 1, 1]
    assert model[0].active_rows.tolist() == [2]


@pytest.mark.parametrize("library", [torch.optim, neq.optim])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_weight_decay_of_the_neurons_that_train(library, amsgrad):
    """There AdamW decays no row of a layer that has a mask, and fails with amsgrad."""
    layer = neq.NEqLinear(2, 3, bias=False)
    optimizer = library.AdamW(layer.parameters(), 0.1, weight_decay=0.5, amsgrad=amsgrad)
    policy = neq.Fixed({"": [1]})
    neq.Controller(layer, optimizer=optimizer, policy=policy, warmup=0, leave_alone=())
    nn.init.ones_(layer.weight)
    layer.weight.grad = torch.zeros(3, 2)
    optimizer.step()
    assert layer.weight[:, 0].tolist() == [1, pytest.approx(0.95), 1]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models_have_the_names_of_plain_ones(wrap):
    """There masks are looked up by names taken before the wrapping, and none is found.

    On several ranks: tests/test_controller.py.
    """
    plain = neq.Controller(perceptron(), optimizer=(), policy=neq.Everything())
    wrapped = neq.Controller(wrap(perceptron()), optimizer=(), policy=neq.Everything())
    assert list(wrapped.layers) == list(plain.layers) == ["0"]
    wrapped.load_state_dict(plain.state_dict())


def test_auxiliary_heads_are_found_by_module_not_by_name():
    """There the parameters of the auxiliary classifier lose their prefix and never freeze."""
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 4, 1), "aux": nn.Conv2d(4, 2, 1)})
    both = neq.Probe(torch.ones(2, 3, 4, 4), forward=lambda m, x: m["aux"](m["backbone"](x)))
    control = neq.Controller(model, probe=both, policy=neq.Equilibrium(1e9), optimizer=())
    control.step()
    assert model["aux"].active_fraction == 0


def test_every_part_of_a_batch_counts():
    """There only the last one does, where gradients are accumulated."""
    model, x = neq.convert(perceptron()), torch.randn(6, 4, dtype=torch.float64)
    model.double()[0].set_active([0, 3])
    gradients = []
    for parts in (1, 3):
        model.zero_grad()
        for part in x.chunk(parts):
            model(part).square().sum().backward()
        gradients.append(model[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].any(1).nonzero().flatten().tolist() == [0, 3]


def test_a_checkpoint_holds_which_neurons_train_and_how_fast_they_moved():
    """There it holds neither, nor outputs, and is read under another name than it was written.

    That a resumed run is the same run: tests/test_controller.py.
    """
    model, x = perceptron(), torch.randn(5, 4)
    given = {"probe": x, "optimizer": (), "policy": neq.LowestVelocity(0.5)}
    control = neq.Controller(model, **given)
    nn.init.normal_(model[0].weight)
    control.step()
    file = io.BytesIO()
    torch.save(control.state_dict(), file)
    file.seek(0)
    other = neq.Controller(copy.deepcopy(model), **given)
    other.layers["0"][0].set_active(None)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.layers["0"][0].active_fraction == 0.5
    torch.testing.assert_close(other.state_dict(), control.state_dict(), rtol=0, atol=0)


def test_large_batches_and_no_accounts_nor_paths_of_others(tmp_path):
    """There a batch above 100 divides by zero, files go to /scratch, and W&B has to be there."""
    code = "import sys; sys.modules['wandb'] = None; from examples import cifar10; cifar10.main()"
    options = "--policy dense --limit 120 --test-limit 10 --batch 120 --epochs 1 --device cpu"
    command = [sys.executable, "-c", code, *options.split(), "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert len(result["epochs"]) == 1


def test_the_documented_recipe_is_the_one_that_runs():
    """There another weight decay is documented than was run."""
    text = " ".join((ROOT / "docs/experiments.md").read_text().split())
    first, second = (f"{100 * drop:.0f} %" for drop in cifar10.DROPS)
    assert (
        f"SGD with momentum {cifar10.MOMENTUM}, learning rate {cifar10.LR} and a tenth of it from "
        f"{first} and from {second} of the epochs on, weight decay 5e-4, "
    ) in text
    assert cifar10.WEIGHT_DECAY == 5e-4


def test_slow_is_slow_in_either_direction():
    """There a baseline called random freezes by signed velocity: what falls fastest first."""
    layer = neq.NEqLinear(1, 4)
    velocity = torch.tensor([0.3, -0.9, 0.1, -0.2])
    motion = neq.Motion("", layer, torch.ones(4), velocity, torch.ones(4).bool())
    assert neq.LowestVelocity(0.5).choose([motion], 1)[0].tolist() == [True, True, False, False]
    assert (
        len({tuple(neq.Random(0.5, seed).choose([motion], 1)[0].tolist()) for seed in range(9)}) > 2
    )
