"""Granules: neighbours that are decided together."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import neq
from neq.policies import granules
from neq.policies.granules import in_granules, of_neurons
from tests.support.velocities import motion

NAN = torch.nan


def of(*velocities, active=None):
    made = motion(list(velocities), active)
    return replace(made, phi=torch.rand(len(made), dtype=torch.float64))


def test_the_mean_of_a_granule():
    """Of speeds: neurons that move apart do not stand still together."""
    layer = of(1.0, -3.0, 0.5, 0.5, -2.0, -4.0, 7.0)
    (mine,) = in_granules([layer], 2)
    assert mine.velocity.tolist() == [-2.0, 0.5, -3.0, 7.0]
    assert mine.phi.tolist() == [layer.phi[i : i + 2].mean().item() for i in (0, 2, 4, 6)]
    assert mine.granule == 2
    assert mine.sizes().tolist() == [2, 2, 2, 1]
    assert in_granules([layer], 1) == [layer]
    assert layer.sizes().tolist() == [1] * 7
    assert len(in_granules([layer], 16)[0]) == 1


def test_what_was_not_measured_and_what_trained():
    layer = of(1.0, NAN, 0.5, 0.5, active=[False, True, False, False])
    (mine,) = in_granules([layer], 2)
    assert mine.velocity.isnan().tolist() == [True, False]
    assert mine.active.tolist() == [True, False]


def test_masks_come_back_to_neurons():
    mask, layer = torch.tensor([True, False, True]), of(*[1.0] * 7)
    (mine,) = in_granules([layer], 3)
    assert of_neurons(mask, mine).tolist() == [True] * 3 + [False] * 3 + [True]
    assert of_neurons(layer.active, layer).tolist() == [True] * 7


@pytest.mark.parametrize(
    ("layer", "channels_last", "on_gpu"),
    [
        (neq.NEqLinear(4, 32), False, 16),
        (neq.NEqConv2d(4, 32, 3), False, 1),
        (neq.NEqConv2d(4, 32, 3), True, 16),
        (neq.NEqConv3d(4, 32, 3), True, 16),
        (neq.NEqConv1d(4, 32, 3), False, 1),
        (neq.NEqBatchNorm2d(32), False, 1),
        (neq.NEqEmbedding(32, 4), False, 1),
    ],
    ids=repr,
)
def test_auto(layer, channels_last, on_gpu, monkeypatch):
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        layer = layer.to(memory_format=formats[layer.weight.dim()])
    assert granules.granule_of(layer, "auto") == 1  # on a CPU rows are free to pick
    assert granules.granule_of(layer, 5) == 5
    monkeypatch.setattr(granules, "_is_on_gpu", lambda weight: True)
    assert granules.granule_of(layer, "auto") == on_gpu
    assert granules.granule_of(layer, 5) == 5


def controller(policy, granule):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3))
    options = {"optimizer": (), "probe": torch.randn(16, 4), "leave_alone": ()}
    return neq.Controller(model, policy=policy, granule=granule, warmup=0, **options)


def in_whole(mask, granule):
    return all(len(part.unique()) == 1 for part in mask.split(granule))


@pytest.mark.parametrize(
    "policy",
    [
        neq.Equilibrium(eps=0.5, hysteresis=0.5),
        neq.AdaptiveEps,
        neq.LowestVelocity(0.4),
        neq.Random(0.5),
        neq.Budget(share=0.5),
    ],
    ids=lambda policy: getattr(policy, "__name__", type(policy).__name__),
)
@pytest.mark.parametrize("granule", [4, 5, 100])
def test_every_policy_chooses_whole_granules(policy, granule):
    if policy is neq.AdaptiveEps:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"optimizer": optimizer, "probe": torch.randn(16, 4), "leave_alone": ()}
        control = neq.Controller(model, policy=policy(), granule=granule, **options)
    else:
        control = controller(policy, granule)
    for _ in range(3):
        for group in control.layers.values():
            group.first.weight.data.add_(torch.randn_like(group.first.weight))
        control.step()
        masks = [group.mask for group in control.layers.values()]
        assert all(in_whole(mask, granule) for mask in masks)


def test_single_neurons_where_the_policy_or_the_user_says_so():
    rows = {"0": [0, 3, 5]}
    assert controller(neq.Fixed(rows), 4).layers["0"].mask.nonzero().flatten().tolist() == rows["0"]
    assert not neq.Equilibrium.released().by_granule
    assert neq.Equilibrium().by_granule
    halves = controller(neq.Random(0.5), 1).layers["1"].mask
    assert int(halves.sum()) == 6
    assert int(controller(neq.Random(0.5), 4).layers["1"].mask.sum()) in (4, 8)


@pytest.mark.parametrize("granule", [1, 4, 5, 7])
def test_a_budget_counts_the_neurons_of_a_granule(granule):
    """The last granule of a layer may be smaller: what all neurons cost buys all of them."""
    half = controller(neq.Budget(share=0.5), granule)
    sizes = {name: group.first.weight[0].numel() + 1 for name, group in half.layers.items()}
    spent = sum(int(group.mask.sum()) * sizes[name] for name, group in half.layers.items())
    total = sum(group.n_neurons * sizes[name] for name, group in half.layers.items())
    assert 0 < spent <= total / 2
    everything = controller(neq.Budget(amount=total), granule)
    assert all(group.mask.all() for group in everything.layers.values())


@pytest.mark.parametrize(
    ("granule", "message"),
    [
        (0, "granule must be at least 1, got 0"),
        (-4, "granule must be at least 1, got -4"),
        ("all", "granule must be 'auto' or a number of neurons, got 'all'"),
        (2.0, "granule must be 'auto' or a number of neurons, got 2.0"),
        (True, "granule must be 'auto' or a number of neurons, got True"),
    ],
)
def test_mistakes_are_named(granule, message):
    with pytest.raises(ValueError, match=message):
        controller(neq.Random(0.5), granule)


def test_a_mask_of_neurons_for_granules_is_refused_readably():
    class Mistaken(neq.Policy):
        measures = False

        def choose(self, layers, epoch):
            return [torch.ones(layer.layer.n_neurons, dtype=torch.bool) for layer in layers]

    with pytest.raises(ValueError, match="must have one entry for each of the 2 neurons, got 8"):
        controller(Mistaken(), 4)


@pytest.mark.gpu
def test_on_a_gpu():
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 32)).cuda()
    options = {"optimizer": (), "probe": torch.randn(16, 4).cuda(), "leave_alone": ()}
    control = neq.Controller(model, policy=neq.Random(0.5), warmup=0, **options)
    masks = [group.mask for group in control.layers.values()]
    assert [int(mask.sum()) for mask in masks] == [32, 16]
    assert all(in_whole(mask, 16) for mask in masks)
