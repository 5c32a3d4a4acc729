"""A measure of one's own, plugged in by a policy."""

import copy

import pytest
import torch
from torch import nn

import neq

pytestmark = pytest.mark.usefixtures("one_thread")


class Activity(neq.Measure):
    """Scores how much each neuron puts out, summed up over all passes."""

    def attach(self, neurons, devices, where, keeps_precision):
        self.neurons, self.given = list(neurons), (list(devices), where, keeps_precision)
        self.total = torch.zeros(sum(neurons), dtype=torch.float64)
        self.start()

    def start(self):
        self.seen = [torch.zeros(n, dtype=torch.float64) for n in self.neurons]

    def observe(self, group, y, channel_dim):
        self.seen[group] += y.double().abs().movedim(channel_dim, 0).flatten(1).sum(1)

    def sums(self):
        return torch.cat(self.seen)

    def score(self, sums):
        self.total = self.total + sums
        return {"activity": self.total}

    def state_dict(self, outputs):
        return {"total": self.total.clone()}

    def load_state_dict(self, state, outputs):
        self.total = state["total"].clone()
        return True


class MostActive(neq.Policy):
    def measure(self):
        return Activity()

    def choose(self, layers, epoch):
        self.seen = [layer.scores["activity"] for layer in layers]
        assert all(layer.velocity.isnan().all() and layer.phi.isnan().all() for layer in layers)
        return [scores > scores.median() for scores in self.seen]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = torch.randn(7, 6)
    control = neq.Controller(model, probe=probe, policy=MostActive(), optimizer=optimizer)
    return model, optimizer, control, probe


def train(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_a_policy_decides_by_the_scores_of_its_own_measure():
    model, _, control, probe = build()
    devices, where, keeps_precision = control.measure.given
    assert (devices, where, keeps_precision) == ([torch.device("cpu")] * 2, "device", False)
    outputs = [model[0](probe), model[2](model[1](model[0](probe)))]
    record = control.step()
    for score, output in zip(control.policy.seen, outputs, strict=True):
        assert torch.allclose(score, output.detach().double().abs().sum(0))
    assert (
        model[0].active_mask.tolist()
        == (control.policy.seen[0] > control.policy.seen[0].median()).tolist()
    )
    assert control.scores.keys() == {"activity"}
    assert [(layer.phi, layer.speed) for layer in record.layers] == [(None, None)] * 2
    assert 0 < record.frozen_share < 1


def test_it_resumes_bit_for_bit():
    model, optimizer, control, probe = build()
    for _ in range(2):
        train(model, optimizer, probe)
        control.step()
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, control)])
    train(model, optimizer, probe)
    control.step()

    other, its_optimizer, its_control, _ = build()
    for part, state in zip((other, its_optimizer, its_control), states, strict=True):
        part.load_state_dict(state)
    train(other, its_optimizer, probe)
    its_control.step()
    assert torch.equal(control.scores["activity"], its_control.scores["activity"])
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(control.layers.values(), its_control.layers.values(), strict=True):
        assert torch.equal(a.mask, b.mask)
