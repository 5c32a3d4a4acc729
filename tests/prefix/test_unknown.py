"""What stand-ins return has a form and no values: use of it past the prefix is an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import neq
from neq.prefix.unknown import Origin, Unknown, unknown

pytestmark = pytest.mark.usefixtures("one_thread", "always_pays")


class Bypass(nn.Module):
    """The head gets more than what the graph shows."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.angles = Angles()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        a = self.first(x)
        angles = self.angles(a.to(torch.float32))
        if self.how == "mask" and (a > 0).any():
            a = a + 1
        if self.how == "write":
            self.seen[:] = a.detach().mean(0)
        b = self.second(F.relu(a + 0, inplace=True))
        if self.how == "detach":
            b = b + a.detach()
        if self.how == "module":
            b = b + angles
        return (self.head(b), a) if self.how == "return" else self.head(b)


class Angles(nn.Module):
    """Of its input it takes the form only."""

    def forward(self, x):
        return torch.arange(x.shape[1], dtype=x.dtype, device=x.device).expand(len(x), -1)


def run(how):
    torch.manual_seed(0)
    model = Bypass(how)
    prefix = neq.Prefix(model, torch.randn(2, 4), at=["second"])
    prefix.freeze(1)
    cache = neq.PrefixCache(prefix)
    loader = cache.wrap(DataLoader(torch.randn(6, 4), 3))
    outputs = [[model(x) for x in loader] for _ in range(2)]
    assert (cache.hits, cache.misses) == (2, 2)
    return outputs


def test_modules_whose_output_the_graph_does_not_show_run():
    first, second = run("module")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("detach", "detach uses what the frozen prefix computed before its end, 'second'"),
        ("mask", "__bool__ looks at the values of a tensor before the end"),
        ("write", "__setitem__ writes what the frozen prefix computes"),
    ],
)
def test_values_that_are_used_are_an_error(how, told):
    with pytest.raises(RuntimeError, match=told):
        run(how)
    assert torch.is_grad_enabled()


def test_a_model_that_returns_one_says_so_when_it_is_used():
    _, second = run("return")
    assert second[0][0].requires_grad
    kept = second[0][1]
    assert kept.shape == (3, 4)
    for use in kept.sum, kept.tolist, lambda: kept + 1, lambda: torch.ones(4) @ kept.T:
        with pytest.raises(RuntimeError, match="frozen prefix"):
            use()


def test_what_is_computed_of_one_is_one():
    origin = Origin("end")
    x = unknown(torch.zeros(()).expand(3, 4), origin)
    y, places = (x.T[0].unsqueeze(0) * torch.ones(2, 3)).max(1)
    assert isinstance(y, Unknown)
    assert isinstance(places, Unknown)
    assert (y.shape, y.dtype, y.device.type, x.size(1), len(x)) == ((2,), x.dtype, "cpu", 4, 3)
    assert torch.empty_like(x).shape == (3, 4)
    for write in torch.zeros(3, 4).copy_, torch.zeros(3, 4).__iadd__:
        with pytest.raises(RuntimeError, match="writes"):
            write(x)
    with pytest.raises(RuntimeError, match="writes"):
        torch.add(x, 1, out=torch.zeros(3, 4))
