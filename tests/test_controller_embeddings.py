"""The loop on models that look up their inputs: entries of a vocabulary are neurons too."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import neq
from tests.support.layers import trained_elements

pytestmark = pytest.mark.usefixtures("one_thread")


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.words, self.places = nn.Embedding(12, 6), nn.Embedding(5, 6)
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.hidden(x).relu())


@pytest.mark.parametrize("memory", ["device", "host", "sketch"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, neq.optim.AdamW])
def test_entries_of_an_embedding_are_frozen_and_stay(kind, memory):
    """The probe lacks most of them. What training lacks has not moved, and is at equilibrium."""
    torch.manual_seed(0)
    model = Language(tied=False)
    lr = 3.0 if kind is torch.optim.SGD else 0.05
    optimizer = kind(model.parameters(), lr=lr, weight_decay=0)
    tokens = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 6, 7]])
    control = neq.Controller(
        model,
        probe=tokens[:1, :2],
        optimizer=optimizer,
        policy=neq.Equilibrium(1e-7),
        memory=memory,
    )

    def train():
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()

    train()
    record = control.step()
    assert model.words.active_rows.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert model.places.active_fraction == 1
    assert next(x for x in record.layers if x.name == "words").kind == "Embedding"
    model.words.set_active([1, 2])
    before = model.words.weight.detach().clone()
    train()
    changed = (model.words.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2]
    control.step()
    assert model.words.active_fraction < 1


def test_an_embedding_tied_to_the_classifier_is_left_alone_with_it():
    tokens = torch.arange(10).view(2, 5)
    options = {"probe": tokens, "optimizer": (), "policy": neq.Random(0.5), "warmup": 0}
    assert list(neq.Controller(Language(tied=False), **options).layers) == [
        "words",
        "places",
        "hidden",
    ]
    model = Language(tied=True)
    assert list(neq.Controller(model, **options).layers) == ["places", "hidden"]
    assert model.words.active_fraction == 1
    model = Language(tied=True)
    control = neq.Controller(model, leave_alone=(), **options)
    assert list(control.layers["words"]) == [model.words, model.head]
    assert model.words.active_fraction == model.head.active_fraction == 0.5
    (wte,) = neq.Controller(Language(tied=True), leave_alone=["places", "hidden"], **options).layers
    assert wte == "words"
    assert (
        "words" not in neq.Controller(Language(tied=True), leave_alone=["head"], **options).layers
    )


SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
}


def bert():
    config = transformers.BertConfig(**SIZES, num_labels=3)
    return transformers.BertForSequenceClassification(config), torch.tensor([0, 1, 2, 1])


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config), None


def train(model, tokens, labels, optimizer):
    labels = tokens if labels is None else labels
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, neq.optim.AdamW])
@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
def test_default_policies_freeze_entries_of_transformers(make, kind):
    """Half of the vocabulary never occurs. Its rows only shrink, which changes no direction."""
    torch.manual_seed(0)
    model, labels = make()
    tokens = torch.randint(1, 15, (4, 6))
    optimizer = kind(model.parameters(), lr=0.01)
    control = neq.Controller(model, probe={"input_ids": tokens[:2]}, optimizer=optimizer)
    train(model, tokens, labels, optimizer)
    record = control.step()
    words = model.get_input_embeddings()
    occurs = torch.isin(torch.arange(30), tokens)
    assert torch.equal(words.active_mask, occurs)
    assert 0 < record.frozen_share < 1
    before = copy.deepcopy(model.state_dict())
    train(model, tokens, labels, optimizer)
    trained = trained_elements(model)
    names = {p: name for name, p in model.named_parameters()}
    for p, active in trained.items():
        assert torch.equal(p[~active], before[names[p]][~active]), names[p]
    assert (words.weight != before[names[words.weight]]).any(1)[occurs].all()
    control.step()


def test_a_run_is_resumed_with_the_rows_of_the_epoch_before():
    def run(resumes):
        torch.manual_seed(0)
        model, labels = bert()
        model.eval()  # without dropout
        tokens = torch.randint(1, 15, (4, 6))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        policy = neq.LowestVelocity(0.25)
        control = neq.Controller(model, probe=tokens, policy=policy, optimizer=optimizer)
        for epoch in range(4):
            train(model, tokens, labels, optimizer)
            if resumes and epoch == 2:
                state = control.state_dict()
                control.remove()
                control = neq.Controller(model, probe=tokens, policy=policy, optimizer=optimizer)
                control.load_state_dict(state)
            control.step()
        return control.scores["velocity"], model.state_dict()

    (mine, weights), (expected, theirs) = run(True), run(False)
    assert torch.equal(mine, expected)
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)
