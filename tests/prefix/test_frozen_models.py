"""The output of a frozen prefix has the same bits over a training of transformers models."""

import pytest
import torch

import neq
from tests.support.pretrained import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

DECAY = {"lr": 0.05, "weight_decay": 0.1}
EPOCHS = 3


def guarded(model, inputs):
    """By hand, without a converted layer."""
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **DECAY)
    neq.optim.Guard(optimizer, model)
    prefix = neq.Prefix(model, inputs)
    return optimizer, prefix, lambda: prefix.freeze(2)


def by_rows(model, inputs):
    """By hand, with neq.optim."""
    neq.convert(model)
    optimizer = neq.optim.AdamW(model.parameters(), layers=model, **DECAY)
    prefix = neq.Prefix(model, inputs)
    return optimizer, prefix, lambda: prefix.freeze(2)


def controlled(model, inputs):
    """A Controller, which also chooses single neurons above the prefix."""
    optimizer = torch.optim.AdamW(model.parameters(), **DECAY)
    above = neq.Equilibrium(share=0.5)
    policy = neq.BottomUp.scheduled([1 / EPOCHS] * 2, epochs=EPOCHS, above=above)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, probe=inputs)
    return optimizer, control.prefix, control.step


def told(model, inputs):
    """A Controller that tells an optimizer of neq.optim what to follow."""
    optimizer = neq.optim.SGD(model.parameters(), momentum=0.9, **DECAY)
    policy = neq.BottomUp.scheduled([1 / EPOCHS] * 2, epochs=EPOCHS)
    control = neq.Controller(model, optimizer=optimizer, policy=policy, example_inputs=inputs)
    return optimizer, control.prefix, control.step


@pytest.mark.parametrize("keep", [guarded, by_rows, controlled, told], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_over_a_training(name, keep):
    model, inputs = MODELS[name]()
    model.train()
    optimizer, prefix, after_epoch = keep(model, inputs)
    outputs = []

    def look(module, args, output):
        if prefix.depth == 2:
            outputs.append(output[0] if isinstance(output, tuple) else output)

    model.get_submodule(prefix.blocks[1].end).register_forward_hook(look)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(EPOCHS):
        model.train()
        for _ in range(3):
            loss = model(**inputs).loss
            optimizer.zero_grad(set_to_none=False)  # a frozen parameter may have one of zeros
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        after_epoch()
    with torch.no_grad():
        model.eval()(**inputs)  # the same in eval mode, where some run other code
    assert len(outputs) > 3 * (EPOCHS - 1)  # those of a probe too
    assert all(torch.equal(y, outputs[0]) for y in outputs[:-1])
    torch.testing.assert_close(outputs[-1], outputs[0])
    assert not prefix.changed()
    assert prefix.depth == 2
    # it did train, below until it was frozen and above until the end
    assert len({*losses}) == len(losses)
    for block in prefix.blocks:
        assert any(not torch.equal(model.get_parameter(n), start[n]) for n in block.parameters)
