"""Padding does not count, and text that is no tensor is refused."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader

import neq

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = 2, 5, 3


class Exact(neq.Probe):
    keeps_precision = True


def bert():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=12, num_labels=3)
    return transformers.BertForSequenceClassification(config).double()


def padded(to, left=False, junk=0):
    """Samples of several lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(LENGTHS), to), junk)
    mask = torch.zeros(len(LENGTHS), to, dtype=torch.int64)
    for i, length in enumerate(LENGTHS):
        at = slice(to - length, to) if left else slice(length)
        ids[i, at] = torch.randint(1, 20, (length,), generator=generator)
        mask[i, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def scores(probe, policy=None):
    """φ after the weights have moved a bit."""
    torch.manual_seed(0)
    model = bert()
    control = neq.Controller(model, optimizer=(), probe=probe, policy=policy or neq.Equilibrium())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    control.step()
    return control.scores["phi"]


@pytest.mark.parametrize("per_sample", [False, True])
def test_phi_does_not_depend_on_padding(per_sample):
    def phi(batch):
        return scores(Exact(batch), neq.Equilibrium(per_sample=per_sample))

    short, long = phi(padded(5)), phi(padded(11, junk=7))
    assert not short.isnan().any()
    torch.testing.assert_close(short, long, rtol=0, atol=1e-12)
    # without a mask, padding would count
    assert (short - phi({"input_ids": padded(5)["input_ids"]})).abs().max() > 1e-3


def test_phi_of_a_padded_batch_is_that_of_its_real_positions():
    layer, batch = nn.Linear(3, 4).double(), torch.randn(2, 5, 3).double()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, attention_mask):
            return self.layer(x)

    def outputs():
        return layer(batch).detach()[mask.bool()]

    for given in (
        {"x": batch, "attention_mask": mask},
        (batch, mask.bool()),
        [batch, mask.float()],
    ):
        before = outputs()
        options = {"optimizer": (), "policy": neq.Equilibrium(), "leave_alone": ()}
        control = neq.Controller(Model(), probe=Exact(given), **options)
        with torch.no_grad():
            layer.weight += 0.3 * torch.randn_like(layer.weight)
        control.step()
        expected = F.cosine_similarity(outputs(), before, dim=0)
        torch.testing.assert_close(control.scores["phi"], expected, rtol=0, atol=1e-12)
    mapping = {"x": batch, "attention_mask": mask}
    seen = []
    probe = neq.Probe(mapping, forward=lambda model, b: model(b["x"], b["attention_mask"]))
    probe.run(Model(), [[neq.convert(Model()).layer]], lambda *args: seen.append(args[1]))
    assert not seen[0][~mask.bool()].any()
    assert seen[0][mask.bool()].all()


def test_outputs_of_other_shapes_are_left_as_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pixels, self.pooled = nn.Conv1d(5, 5, 1), nn.Linear(5, 5)

        def forward(self, x, attention_mask):  # x: [samples, 5, positions]
            return self.pooled(self.pixels(x).mean(2))

    model, seen = neq.convert(Model()), []
    batch = {"x": torch.randn(5, 5, 5), "attention_mask": torch.zeros(5, 5)}
    neq.Probe(batch).run(model, [[model.pixels], [model.pooled]], lambda *a: seen.append(a[1]))
    assert all(y.all() for y in seen)
    assert [y.dim() for y in seen] == [3, 2]


@pytest.mark.parametrize("probe", [["a dog", "a cat"], {"text": ["a dog"]}, [{"text": "a dog"}]])
def test_a_probe_without_tensors_is_named(probe):
    with pytest.raises(TypeError, match=r"probe: there is no tensor in its batch, a (str|dict)"):
        neq.Controller(nn.Linear(2, 2), optimizer=(), probe=probe, leave_alone=())


def test_a_forward_of_the_users_may_take_strings():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    probe = neq.Probe(
        ["ab", "cd"], lambda model, text: model(torch.tensor([*map(float, map(ord, text))]))
    )
    control = neq.Controller(model, optimizer=(), probe=probe)
    control.step()
    assert (control.scores["phi"] == 1).all()


def test_a_loader_that_shuffles_by_the_global_random_state_gives_the_same_samples():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    loader = DataLoader(torch.randn(16, 4), batch_size=5, shuffle=True)
    control = neq.Controller(model, optimizer=(), probe=loader)
    for seed in range(3):
        torch.manual_seed(seed)
        control.step()
        assert (control.scores["phi"] == 1).all()


@pytest.mark.parametrize("kind", ["lower-bound", "full"])
def test_sensitivity_does_not_depend_on_padding(kind):
    """But for the count of positions, in which the mean is taken."""

    def found(batch):
        torch.manual_seed(0)
        return neq.sensitivity(bert(), batch, kind=kind)

    short, long = found(padded(5)), found(padded(11, junk=7))
    for name, s in short.items():
        if s.isnan().all():
            assert "embeddings" in name
            continue
        of_tokens = "pooler" not in name and "classifier" not in name
        expected = s * 5 / 11 if of_tokens else s
        torch.testing.assert_close(long[name], expected, rtol=0, atol=1e-12)
