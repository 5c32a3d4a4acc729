"""bench/networks.py: the networks and their suites."""

import pytest
import torch
from torch import nn

import neq
from bench.lib import networks
from bench.lib.networks import NETWORKS, images
from bench.lib.problems import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")


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
