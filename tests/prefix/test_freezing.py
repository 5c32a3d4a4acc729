"""Freezing and thawing: what is as before, what is resumed, and what bypasses the optimizers."""

import copy
import io
import warnings

import pytest
import torch

import neq
from tests.support.cuttable import IMAGES, frozen, optimizer_of, resnet, step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_depths():
    model, prefix = frozen(0)
    assert (prefix.depth, [*prefix.parameters()]) == (0, [])
    assert [block.name for block in prefix.blocks] == ["stem", "blocks.0", "blocks.1"]
    for depth, end in ((2, "blocks.0"), (1, "stem"), (3, "pool"), (0, None)):
        prefix.freeze(depth)
        assert prefix.depth == depth
        model.zero_grad()
        model(IMAGES).sum().backward()
        names = {name for block in prefix.blocks[:depth] for name in block.parameters}
        assert {*map(id, prefix.parameters())} == {id(model.get_parameter(n)) for n in names}
        for name, p in model.named_parameters():
            assert (p.grad is None) == (name in names)
        if depth:
            assert prefix.end == end
    for depth in (-1, 4):
        with pytest.raises(ValueError, match=rf"depth must be in \[0, 3\], got {depth}"):
            prefix.freeze(depth)


def test_blocks_end_below_what_is_kept():
    model = resnet()
    prefix = neq.Prefix(model, IMAGES, keep=[model.blocks[1].shortcut])
    assert [block.name for block in prefix.blocks] == ["stem", "blocks.0"]
    assert prefix.block_of([model.stem[0]]) == 0
    assert prefix.block_of([model.blocks[0].a, model.stem[1]]) == 0
    assert prefix.block_of([model.blocks[1].a]) is None


def test_thawing_restores_everything():
    model = resnet()
    model.stem[0].weight.requires_grad_(False)
    model.stem[1].eval()  # as some keep a norm's statistics
    twin = copy.deepcopy(model)
    attributes = {name: {*vars(m)} for name, m in model.named_modules()}
    prefix = neq.Prefix(model, IMAGES)
    prefix.freeze(2)
    assert not model.stem.training
    assert not model.blocks[0].norm.training
    assert model.blocks[1].norm.training
    prefix.freeze(0)
    for (name, m), other in zip(model.named_modules(), twin.modules(), strict=True):
        assert m.training == other.training, name
        assert {*vars(m)} == attributes[name], name
        assert not m._forward_hooks, name
        assert not m._forward_pre_hooks, name
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.requires_grad == other.requires_grad
    for m in model, twin:
        torch.manual_seed(1)
        m(IMAGES).square().sum().backward()
    for name, t in model.state_dict().items():
        assert torch.equal(t, twin.state_dict()[name]), name
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is other.grad is None or torch.equal(p.grad, other.grad)


def test_modes_that_were_set_while_it_was_frozen_hold_when_it_thaws():
    model, prefix = frozen(2)
    twin = resnet()
    for m in model, twin:
        m.train()
        m.eval()
        m.blocks.train()
        m.stem[1].eval()
        m.stem.train()
        m.blocks[0].norm.eval()
    assert not any(m.training for m in [*model.stem.modules(), *model.blocks[0].modules()])
    prefix.freeze(1)
    assert model.blocks[0].a.training
    assert not model.stem.training
    prefix.freeze(0)
    for (name, m), other in zip(model.named_modules(), twin.named_modules(), strict=True):
        assert m.training == other[1].training, name


def test_neurons_train_again_when_it_thaws():
    model = neq.convert(resnet())
    prefix = neq.Prefix(model, IMAGES)
    model.blocks[1].a.set_active([0])
    prefix.freeze(2)
    assert model.stem[0].active_fraction == model.blocks[0].norm.active_fraction == 0
    assert model.blocks[1].a.active_rows.tolist() == [0]  # above it stays as it was set
    prefix.freeze(1)
    assert (model.stem[0].active_fraction, model.blocks[0].norm.active_fraction) == (0, 1)
    # neurons of a frozen layer that are set active by hand are to train
    model.stem[0].set_active([1])
    model(IMAGES).sum().backward()
    assert model.stem[0].weight.grad.abs().sum((1, 2, 3)).nonzero().flatten().tolist() == [1]


def test_lifted_for_a_while():
    model, prefix = frozen(2)
    with prefix.lifted():
        assert prefix.depth == 0
        assert model.stem.training
    assert prefix.depth == 2
    assert not model.stem.training
    with pytest.raises(KeyError), prefix.lifted():
        raise KeyError
    assert prefix.depth == 2


def test_a_copy_is_frozen_for_itself():
    model, prefix = frozen(2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in copy.deepcopy(model), torch.load(file, weights_only=False):
        other.train()
        assert not other.stem.training
        other(IMAGES).sum().backward()
        assert other.stem[0].weight.grad is None
        assert model.head.weight.grad is None
        assert model.state_dict().keys() == other.state_dict().keys()
    prefix.freeze(0)
    assert not other.stem.training


def test_a_training_resumes_with_the_same_bits():
    def start():
        torch.manual_seed(0)
        model = resnet()
        model.drop.p = 0.0
        return model, optimizer_of(model), neq.Prefix(model, IMAGES)

    def run(model, optimizer, steps):
        for _ in range(steps):
            model.train()
            step(model, optimizer)

    model, optimizer, prefix = start()
    run(model, optimizer, 2)
    prefix.freeze(2)
    run(model, optimizer, 2)
    states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer)]
    run(model, optimizer, 2)

    other, another, again = start()
    other.load_state_dict(states[0])
    another.load_state_dict(states[1])
    again.freeze(2)
    run(other, another, 2)
    for name, t in model.state_dict().items():
        assert torch.equal(t, other.state_dict()[name]), name


# -- what bypasses optimizers -------------------------------------------------------------------


def test_what_bypasses_the_optimizers_is_found():
    model, prefix = frozen(2)
    assert prefix.changed() == []
    with warnings.catch_warnings(action="error"):
        prefix.warn_of_changes()
    with torch.no_grad():
        model.blocks[1].a.weight.mul_(2)  # which trains
        assert prefix.changed() == []
        model.stem[0].weight.div_(model.stem[0].weight.norm())  # by hand
        model.blocks[0].norm.running_var[2] += 1e-6
    assert prefix.changed() == ["stem.0.weight", "blocks.0.norm.running_var"]
    with pytest.warns(UserWarning, match="prefix has changed: stem.0.weight, blocks.0.norm.run"):
        prefix.warn_of_changes()
    prefix.freeze(2)
    assert prefix.changed() == []


def test_a_moving_average_that_is_copied_back_is_found_and_told_at_the_next_decision():
    model = resnet()
    optimizer = optimizer_of(model)
    policy = neq.BottomUp.scheduled([0.25], epochs=4)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=IMAGES)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(3):
        average.update_parameters(model)
        step(model, optimizer)
        control.step()
    with torch.no_grad():
        for p, smooth in zip(model.parameters(), average.module.parameters(), strict=True):
            p.copy_(smooth)
    with pytest.warns(UserWarning, match=r"stem.0.weight, .* \(a moving average or Lookahead"):
        control.step()


def test_two_values_that_are_exchanged_are_a_change():
    model, prefix = frozen(1)
    with torch.no_grad():
        weight = model.stem[0].weight.view(-1)
        weight[:2] = weight[:2].flip(0)
    assert prefix.changed() == ["stem.0.weight"]
