import pytest
import torch
from torch import nn

import neq
from neq.prefix.fingerprint import fingerprint


def frozen(eps=1e-5, depth=1):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=eps), nn.ReLU(), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4, 2))
    prefix = neq.Prefix(model, torch.randn(2, 3, 6, 6))
    prefix.freeze(depth)
    return model, prefix


def test_the_same_prefix_has_the_same():
    first, second = frozen()[1], frozen()[1]
    before = first.fingerprint()
    assert before == second.fingerprint()
    first.freeze(0)
    first.freeze(1)
    assert first.fingerprint() == before
    assert len(before) == 32


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "1.num_batches_tracked"])
def test_each_bit_counts(name):
    model, prefix = frozen()
    before = prefix.fingerprint()
    model.state_dict()[name].view(-1).view(torch.uint8)[0] ^= 1
    assert prefix.fingerprint() != before


def test_what_trains_does_not_count():
    model, prefix = frozen()
    before = prefix.fingerprint()
    with torch.no_grad():
        model[3].weight += 1
    assert prefix.fingerprint() == before


def test_depth_and_makeup_count():
    fingerprints = {frozen()[1].fingerprint(), frozen(eps=1e-3)[1].fingerprint()}
    fingerprints.add(frozen(depth=2)[1].fingerprint())
    assert len(fingerprints) == 3


def test_names_and_dtypes_count():
    zero = torch.zeros(2)
    tensors = [{"a": zero}, {"b": zero}, {"a": zero.int()}, {"a": zero.view(1, 2)}, {}]
    assert len({fingerprint(t) for t in tensors}) == len(tensors)
    assert fingerprint({}, ["a"]) != fingerprint({})
    assert fingerprint({"a": torch.ones(3, dtype=torch.bfloat16)[1]})
