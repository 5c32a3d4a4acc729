"""What a frozen prefix does in a forward, and what backward does not visit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from tests.support.cuttable import (
    IMAGES,
    LABELS,
    OneDropout,
    Residual,
    SharedNorm,
    Tied,
    frozen,
    optimizer_of,
    outputs,
    perceptron,
    resnet,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def nodes(loss):
    seen, to_do = set(), [loss.grad_fn]
    while to_do:
        node = to_do.pop()
        if node is not None and node not in seen:
            seen.add(node)
            to_do += [before for before, _ in node.next_functions]
    return seen


@pytest.mark.parametrize("convert", [False, True])
def test_nothing_of_it_is_in_the_graph_or_saved(convert):
    model, prefix = frozen()
    model.drop.p = 0.0
    if convert:
        prefix.freeze(0)
        neq.convert(model)
        prefix.freeze(2)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(model(IMAGES), LABELS)
    mine, above = len(nodes(loss)), len(saved)
    saved.clear()
    # the rest of the network alone, on what the prefix gives
    y = outputs(model, prefix.end, IMAGES)
    assert not y.requires_grad
    assert y.grad_fn is None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = model.pool(model.blocks[1](y))
        rest = F.cross_entropy(model.head(model.drop(x)), LABELS)
    assert (mine, above) == (len(nodes(rest)), len(saved))
    leaves = {n.variable for n in nodes(loss) if hasattr(n, "variable")}
    above = [*model.blocks[1].parameters(), *model.head.parameters()]
    assert leaves == {*above}
    loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    assert {*trained} == {*above}


def test_backward_of_what_trains_is_that_of_the_whole_model():
    """In eval mode, where freezing does not change the forward."""
    model, prefix = frozen()
    model.eval()
    model(IMAGES).square().sum().backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    prefix.freeze(0)
    model.eval()
    model(IMAGES).square().sum().backward()
    for name, grad in mine.items():
        assert torch.equal(model.get_parameter(name).grad, grad)
    assert mine.keys() == {n for n, _ in model.named_parameters()} - {
        name for block in prefix.blocks[:2] for name in block.parameters
    }


def test_forwards_without_gradients_are_as_ever():
    model, _ = frozen()
    with torch.no_grad():
        y = model(IMAGES)
        assert not torch.is_grad_enabled()
    assert not y.requires_grad
    model(IMAGES)
    assert torch.is_grad_enabled()


def test_the_same_bits_for_the_same_input():
    model, prefix = frozen()
    optimizer = optimizer_of(model)
    guard = neq.optim.Guard(optimizer, model)
    before = outputs(model, prefix.end, IMAGES).clone()
    step(model, optimizer, torch.randn_like(IMAGES))
    for _ in range(3):
        model.train()
        step(model, optimizer, torch.randn_like(IMAGES), set_to_none=False)
        # neither by the batch's statistics nor by others
        assert torch.equal(outputs(model, prefix.end, IMAGES), before)
        torch.testing.assert_close(outputs(model, prefix.end, IMAGES[:1]), before[:1])
    assert not prefix.changed()
    guard.remove()


def test_without_a_guard_momentum_does_not_move_what_has_no_gradient():
    model = resnet()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    prefix = neq.Prefix(model, IMAGES)
    prefix.freeze(2)
    step(model, optimizer)
    assert not prefix.changed()
    # but gradients that are zeros are gradients
    prefix.freeze(0)
    step(model, optimizer)
    prefix.freeze(2)
    step(model, optimizer, set_to_none=False)
    assert "stem.0.weight" in prefix.changed()


def test_code_and_modules_in_many_places_are_in_eval_mode_inside_only():
    """One dropout for all layers, and a function of the model itself."""
    x = torch.randn(8, 4)
    model, prefix = frozen(2, OneDropout(), x)
    assert prefix.end == "body.0"
    model.train()
    first = outputs(model, "body.0", x)
    assert torch.equal(first, outputs(model, "body.0", x))
    assert torch.equal(first, model.body[0](model.stem(x)))
    assert not torch.equal(outputs(model, "body.1", x), outputs(model, "body.1", x))
    assert model.training
    assert model.drop.training
    prefix.freeze(0)
    assert not torch.equal(outputs(model, "body.0", x), outputs(model, "body.0", x))


def test_a_norm_that_a_later_layer_shares_is_frozen_everywhere():
    x = torch.randn(8, 4)
    model, prefix = frozen(1, SharedNorm(), x)
    assert prefix.end == "one"
    optimizer = optimizer_of(model)
    guard = neq.optim.Guard(optimizer, model)
    before = outputs(model, "one", x).clone()
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(outputs(model, "one", x), before)
    assert not prefix.changed()
    assert model.norm.running_mean.eq(0).all()
    prefix.freeze(0)
    assert model.norm.training
    guard.remove()


def test_a_shared_weight_is_frozen_above_too():
    ids = torch.tensor([[1, 2, 3]])
    model, _ = frozen(1, Tied(), ids)
    neq.optim.Guard(optimizer := optimizer_of(model), model)
    before = model.embed.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.head.weight, before)
    assert model.body[0].a.weight.grad is not None


def test_an_exception_inside_ends_the_prefix():
    model, _ = frozen()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7, 8, 8))
    assert torch.is_grad_enabled()
    assert model.training
    assert model(IMAGES).requires_grad


def test_a_forward_that_takes_another_way_is_an_error():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.skips = False

        def forward(self, x):
            x = self.a(x)
            return self.head(x if self.skips else self.b(x))

    model, _ = frozen(2, Skipping(), torch.randn(2, 4))
    model(torch.randn(2, 4))
    model.skips = True
    message = r"'b', with which the frozen prefix ends, did not run in this forward: freeze fewer"
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(2, 4))
    assert torch.is_grad_enabled()
    assert model.training


def test_models_inside_of_models_have_prefixes_of_their_own():
    inner, inside = frozen(1, perceptron(), torch.randn(2, 3))
    outer = nn.Sequential(nn.Linear(5, 3), inner, nn.Linear(2, 2))
    around = neq.Prefix(outer, torch.randn(2, 5), at=["1"])
    around.freeze(1)
    outer(torch.randn(2, 5)).sum().backward()
    assert [name for name, p in outer.named_parameters() if p.grad is not None] == [
        "2.weight",
        "2.bias",
    ]
    around.freeze(0)
    outer(torch.randn(2, 5)).sum().backward()
    assert inner[0].weight.grad is None
    assert inner[3].weight.grad is not None
    inside.freeze(0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    for model, x in ((resnet(), IMAGES), (OneDropout(), torch.randn(6, 4))):
        model, prefix = frozen(2, model, x)
        expected = outputs(model, prefix.end, x)
        seen = []
        end = model.get_submodule(prefix.end)
        end.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            model.train()
            compiled(x).sum().backward()
            assert torch.is_grad_enabled()
            assert all(m.training for m in (model, model.head, model.drop))
        assert len(seen) == 2
        assert all(torch.equal(y, expected) for y in seen)
        frozen_names = {n for block in prefix.blocks[:2] for n in block.parameters}
        for name, p in model.named_parameters():
            assert (p.grad is None) == (name in frozen_names), name
        prefix.freeze(0)
        compiled(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_residual_blocks_of_the_input():
    """They are cut inside, which ends backward there too."""
    model = nn.Sequential(Residual(4), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    prefix = neq.Prefix(model, x)
    prefix.freeze(1)
    model(x).sum().backward()
    assert model[0].a.weight.grad is None
    assert model[0].b.weight.grad is not None
