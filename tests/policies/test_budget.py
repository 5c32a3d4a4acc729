"""The policy that spends a budget."""

import torch
from torch import nn

import neq
from tests.support.velocities import NAN, chosen_rows, controller, motion


def test_budget_takes_the_fastest_for_their_price():
    control = controller(neq.Budget(amount=9))
    # 5 parameters a neuron, 4, 3
    assert control.policy.costs == {"0": 5, "1": 4, "2": 3}
    motions = [
        motion(v, name=n) for n, v in zip("012", ([5, 1, 0], [-8, 0], [4.5, 2]), strict=True)
    ]
    # per parameter: 1, 0.2, 0 | 2, 0 | 1.5, 0.67
    assert chosen_rows(control.policy, *motions) == [[], [0], [0]]
    assert chosen_rows(controller(neq.Budget(amount=6.99)).policy, *motions) == [[], [0], []]
    assert chosen_rows(controller(neq.Budget(amount=12)).policy, *motions) == [[0], [0], [0]]
    assert chosen_rows(controller(neq.Budget(amount=0)).policy, *motions) == [[], [], []]


def test_budget_never_overspends_nor_leaves_room_for_the_next():
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.37, 0.5, 0.9, 1.0):
        control = controller(neq.Budget(share=share))
        motions = [
            motion(torch.randn(n, generator=generator).tolist(), name=name)
            for name, n in zip("012", (3, 2, 2), strict=True)
        ]
        spent = [
            control.policy.costs[m.name] * len(rows)
            for m, rows in zip(motions, chosen_rows(control.policy, *motions), strict=True)
        ]
        assert sum(spent) <= share * 29
        assert sum(spent) > share * 29 - 5
    assert sum(spent) == 29


def test_budget_trains_what_was_not_measured_first():
    control = controller(neq.Budget(amount=5))
    motions = [motion([9, NAN, 9], name="0"), motion([9, 9], name="1"), motion([9, 9], name="2")]
    assert chosen_rows(control.policy, *motions) == [[1], [], []]


def test_budget_is_not_spent_on_what_the_user_does_not_train():
    for unit in ("parameters", "flops", "ms"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model[0].requires_grad_(False)
        policy = neq.Budget(share=0.5, unit=unit)
        controller(policy, model)
        assert policy.costs.keys() == {"1"}
        assert chosen_rows(policy, motion([1, 2], name="1")) == [[1]]
        model[0].bias.requires_grad_(True)  # then its neurons cost their biases
        controller(policy, model)
        if unit != "ms":
            assert policy.costs["0"] == (1 if unit == "parameters" else 0)
        assert chosen_rows(policy, motion([9, 9, 9], name="0"), motion([1, 2], name="1"))[0] != []


def test_budget_in_flops():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    policy = neq.Budget(share=1, unit="flops")
    controller(policy, model, probe=torch.ones(5, 3, 4, 4))
    # 2 x samples x positions x weights of a neuron
    assert policy.costs == {"0": 2 * 5 * 4 * 27, "1": 2 * 5 * 4 * 4, "3": 2 * 5 * 8}


def test_budget_in_milliseconds_is_measured_once_and_kept():
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 8))
    policy = neq.Budget(share=0.5, unit="ms")
    controller(policy, model, probe=torch.ones(64, 400))
    assert all(cost > 0 for cost in policy.costs.values())
    other = neq.Budget(share=0.5, unit="ms")
    other.load_state_dict(policy.state_dict())
    assert other.costs == policy.costs


def test_layers_may_be_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.ConvTranspose1d(3, 2, 3, stride=2)

        def forward(self, x):
            y = self.a(input=x).unsqueeze(2)
            return self.b(input=y, output_size=[4])

    for unit in ("flops", "ms"):
        control = controller(neq.Budget(share=0.5, unit=unit), Keyword())
        assert all(cost > 0 for cost in control.policy.costs.values())
        assert [layer.phi for layer in control.step().layers] == [1, 1]


def test_budget_counts_a_shared_weight_once_and_all_its_gradients():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    for unit, cost in (("parameters", 3), ("flops", 2 * 2 * 5 * 3)):
        policy = neq.Budget(share=1, unit=unit)
        control = controller(policy, Tied(), probe=torch.ones(5, 3))
        assert policy.costs == {"a": cost}
        assert list(control.layers) == ["a"]
