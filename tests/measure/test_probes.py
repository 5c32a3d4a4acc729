"""Which outputs are seen, and what is left behind: nothing."""

import copy
import random
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

import neq


def groups_of(model):
    neq.convert(model)
    return [[m] for m in model.modules() if isinstance(m, neq.NeuronLayer)]


def observe(model, probe, groups=None):
    """(group, values, channel_dim) of each output that the probe shows."""
    seen = []
    probe = probe if isinstance(probe, neq.Probe) else neq.Probe(probe)
    probe.run(model, groups or groups_of(model), lambda *args: seen.append(args))
    return seen


def constant(layer):
    """The layer, made to put out neuron i's number."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.arange(layer.bias.numel()).view(layer.bias.shape))
    return layer


CHANNELS = [
    pytest.param(nn.Linear(3, 5), (3,), id="linear-one-sample"),
    pytest.param(nn.Linear(3, 5), (2, 3), id="linear"),
    pytest.param(nn.Linear(3, 5), (5, 5, 3), id="linear-tokens"),  # sizes that hide a mix-up
    pytest.param(nn.Linear(3, 5), (2, 5, 5, 3), id="linear-windows"),
    pytest.param(nn.Conv1d(3, 5, 1), (5, 3, 5), id="conv1d"),
    pytest.param(nn.Conv1d(3, 5, 1), (3, 5), id="conv1d-one-sample"),
    pytest.param(nn.Conv2d(3, 5, 1), (5, 3, 5, 5), id="conv2d"),
    pytest.param(nn.Conv2d(3, 5, 1), (3, 5, 5), id="conv2d-one-sample"),
    pytest.param(nn.Conv3d(3, 5, 1), (5, 3, 5, 5, 5), id="conv3d"),
    pytest.param(nn.ConvTranspose2d(3, 5, 2), (5, 3, 4, 4), id="transposed"),
    pytest.param(nn.ConvTranspose1d(3, 5, 2), (3, 4), id="transposed-one-sample"),
    pytest.param(nn.BatchNorm1d(5), (5, 5), id="batchnorm1d-flat"),
    pytest.param(nn.BatchNorm1d(5), (5, 5, 5), id="batchnorm1d"),
    pytest.param(nn.BatchNorm2d(5), (5, 5, 5, 5), id="batchnorm2d"),
    pytest.param(nn.GroupNorm(1, 5), (5, 5, 5), id="groupnorm"),
    pytest.param(nn.InstanceNorm1d(5, affine=True), (5, 5, 5), id="instancenorm"),
    pytest.param(nn.InstanceNorm1d(5, affine=True), (5, 5), id="instancenorm-one-sample"),
    pytest.param(nn.LayerNorm(5), (5, 5, 5), id="layernorm"),
    pytest.param(nn.LayerNorm(5), (5,), id="layernorm-one-sample"),
    pytest.param(nn.LayerNorm([2, 5]), (10, 2, 5), id="layernorm-plane"),
]


@pytest.mark.parametrize(("layer", "shape"), CHANNELS)
def test_neurons_are_told_apart_in_every_layer(layer, shape):
    layer = neq.convert(nn.Sequential(constant(copy.deepcopy(layer))))[0]
    y, channel_dim = layer.by_neuron(layer.eval()(torch.randn(shape)))
    assert channel_dim > 0
    assert y.shape[channel_dim] == layer.n_neurons
    for i, values in enumerate(y.unbind(channel_dim)):
        assert (values == i).all()


def test_neurons_of_rmsnorm_and_transformers_conv1d():
    norm = neq.convert(nn.Sequential(nn.RMSNorm(4)))[0]
    with torch.no_grad():
        norm.weight.copy_(torch.arange(4))
    y, channel_dim = norm.by_neuron(norm(torch.ones(4, 4, 4)))
    assert channel_dim == 2
    assert [round(v.mean().item(), 3) for v in y.unbind(2)] == [0, 1, 2, 3]

    layer = neq.convert(nn.Sequential(constant(Conv1D(4, 4))))[0]
    y, channel_dim = layer.by_neuron(layer(torch.randn(4, 4, 4)))
    assert all((v == i).all() for i, v in enumerate(y.unbind(channel_dim)))


class Several(nn.Module):
    """One layer twice, one never, in an order other than the modules'."""

    def __init__(self):
        super().__init__()
        self.last, self.shared, self.unused = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, scale=1.0):
        x = checkpoint(self.shared, x * scale, use_reentrant=False)
        return self.last(self.shared(x).relu_())


def test_each_call_of_a_layer_is_seen_and_unused_layers_are_not():
    model, x = Several(), torch.randn(3, 4)
    seen = observe(model, x)
    once = model.shared(x)
    assert [group for group, *_ in seen] == [1, 1, 0]
    assert torch.equal(seen[0][1], once)


@pytest.mark.parametrize("kind", [tuple, list])
def test_what_the_model_is_given(kind):
    model, x, labels = Several(), torch.randn(3, 4), torch.arange(3)
    expected = observe(model, x)
    batches = {
        "labels are not for a forward that needs one argument": kind([x, labels]),
        "keywords": {"x": x, "scale": 1.0},
        "any mapping": UserDict(x=x),
        "a loader": DataLoader(TensorDataset(x, labels), batch_size=3),
        "several batches": [kind([x, labels])],
    }
    for what, data in batches.items():
        seen = observe(model, data)
        assert len(seen) == 3, what
        for (_, y, _), (_, y_, _) in zip(seen, expected, strict=True):
            assert torch.equal(y, y_), what
    seen = observe(model, neq.Probe({"x": x}, forward=lambda model, b: model(b["x"], scale=2.0)))
    assert torch.equal(seen[0][1], model.shared(2 * x))


def test_a_model_of_two_inputs_gets_both():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, a, b, c=None):
            return self.linear(a + b)

    model, a, b = Two(), torch.ones(1, 2), torch.ones(1, 2)
    ((_, y, _),) = observe(model, (a, b, torch.zeros(7)))
    assert torch.equal(y, model.linear(a + b))


def test_noise_is_the_same_each_time_and_of_the_models_dtype():
    model = nn.Linear(4, 2, dtype=torch.float64)
    probe = neq.NoiseProbe((100, 4), seed=3)
    first, second = observe(model, probe), observe(model, probe)
    assert first[0][1].dtype == torch.float64
    assert torch.equal(first[0][1], second[0][1])
    assert abs(probe.data.mean()) < 0.2
    assert 0.8 < probe.data.std() < 1.2
    assert not torch.equal(probe.data, neq.NoiseProbe((100, 4), seed=4).data)


def numpy_random():
    return np.random.rand()  # noqa: NPY002, what users' data sets still call


class Shaky(nn.Module):
    """Consumes random numbers even in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        noise = random.random() + numpy_random()
        return self.linear(F.dropout(self.drop(self.norm(x)), 0.5, training=True)) + noise


def test_random_state_is_left_as_it_was_and_is_the_same_in_each_pass():
    model, x = Shaky(), torch.randn(8, 4)
    loader = DataLoader(TensorDataset(x), batch_size=2, shuffle=True)

    def draws():
        return random.random(), numpy_random(), torch.rand(2).tolist()

    for probe in (x, loader):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(5)
        first = observe(model, probe)
        after = draws()
        second = observe(model, probe)
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(5)
        assert draws() == after
        for (_, y, _), (_, y_, _) in zip(first, second, strict=True):
            assert torch.equal(y, y_)


def test_modules_are_left_as_they_were():
    class Counting(nn.Linear):
        calls = 0

        def train(self, mode=True):
            Counting.calls += 1
            return super().train(mode)

    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), Counting(4, 4))
    model[1].eval()  # the user's own choice
    Counting.calls = 0
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    seen = observe(model, torch.randn(6, 4) + 3)
    assert [m.training for m in model.modules()] == flags
    assert Counting.calls == 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())
    assert not any(y.requires_grad for _, y, _ in seen)
    assert torch.is_grad_enabled()
    # in eval mode: the running statistics, not the batch's
    assert seen[0][1].mean() > 2


def test_modules_are_left_as_they_were_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    random.seed(1)
    expected = random.getstate()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        observe(model, torch.ones(2, 4))
    assert model.training
    assert model[1].training
    assert not model[0]._forward_hooks
    assert random.getstate() == expected


def test_users_hooks_stay_and_what_they_return_is_what_is_seen():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    calls = []

    def double(module, args, output):
        calls.append(len(args))
        return 2 * output

    handle = model[0].register_forward_hook(double)
    seen = observe(model, x)
    assert calls == [1]
    assert torch.equal(seen[0][1], model(x))
    assert list(model[0]._forward_hooks) == [handle.id]


def test_autocast_goes_on_but_its_cache_is_not_touched():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        seen = observe(model, x)
        assert torch.is_autocast_cache_enabled()
        model(x).sum().backward()  # a weight cast without gradient must not have been cached
    assert seen[0][1].dtype == torch.bfloat16
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.abs().sum() > 0


def test_compiled_models_are_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups, x = groups_of(model), torch.randn(2, 4)
    model.compile(backend="eager")
    model(x)
    assert len(observe(model, x, groups)) == 2


def test_the_probe_tells_its_samples_from_others():
    model, x = nn.Linear(4, 2), torch.randn(6, 4)
    groups = groups_of(model)

    def marks(data):
        return torch.cat(neq.Probe(data).run(model, groups, lambda *_: None))

    def loader(x, batch_size):
        return DataLoader(TensorDataset(x), batch_size=batch_size)

    assert torch.equal(marks(x), marks(x.clone()))
    assert torch.equal(marks(x), marks(loader(x, 6)))
    others = [x.flip(0), x[:5], x + 1, loader(x.flip(0), 2)]
    assert not any(torch.equal(marks(x), marks(other)) for other in others)
    assert torch.equal(marks({"input": x}), marks(x))


def test_probe_refuses():
    model = nn.Linear(4, 2)
    with pytest.raises(TypeError, match="list_iterator can be read only once"):
        neq.Probe(iter([torch.ones(1)]))
    with pytest.raises(TypeError, match="got int"):
        neq.Probe(3)
    with pytest.raises(ValueError, match="gave no batch"):
        observe(model, [])
    with pytest.raises(ValueError, match=r"positive sizes.*got \(0, 3\)"):
        neq.NoiseProbe((0, 3))


def test_weights_as_a_probe():
    model = nn.Sequential(
        nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.RMSNorm(5)
    )
    seen = observe(model, neq.WeightProbe())
    linear, norm, conv, _ = model
    assert [group for group, *_ in seen] == [0, 1, 2]  # a single parameter has no direction
    rows = {group: y[0] for group, y, dim in seen if dim == 1}
    assert torch.equal(rows[0], torch.cat([linear.weight, linear.bias[:, None]], 1))
    assert torch.equal(rows[1], torch.stack([norm.weight, norm.bias], 1))
    for out in range(6):  # neuron 3g + i is column i of the weights of group g
        group, column = divmod(out, 3)
        expected = conv.weight[2 * group : 2 * group + 2, column].flatten()
        assert torch.equal(rows[2][out, :-1], expected)


class Tagger(nn.Module):
    """Looks up some entries of one vocabulary, twice; never those of the other."""

    def __init__(self):
        super().__init__()
        self.words, self.unused = nn.Embedding(7, 3), nn.Embedding(4, 3)
        self.single = nn.Embedding(5, 1)
        self.head = nn.Linear(3, 7, bias=False)

    def forward(self, tokens):
        return self.head(self.words(tokens) + self.words(tokens.flip(1)) + self.single(tokens))


def test_an_embedding_is_measured_on_its_rows():
    """Whatever the probe looks up. A row of one parameter has no direction."""
    model = Tagger()
    words, unused, *_ = groups = groups_of(model)
    for tokens in torch.tensor([[1, 2]]), torch.tensor([[0, 0, 3]]):
        seen = observe(model, tokens, groups)
        assert [group for group, *_ in seen] == [3, 0, 1]
        for group, rows, dim in seen[1:]:
            assert torch.equal(rows, (words, unused)[group][0].weight.detach()[None])
            assert dim == 1
    seen = observe(model, neq.WeightProbe(), groups)
    assert [group for group, *_ in seen] == [0, 1, 3]


def test_of_a_tied_weight_the_heads_outputs_and_the_rows_are_measured():
    model = Tagger()
    model.head.weight = model.words.weight
    neq.convert(model)
    tokens = torch.tensor([[1, 2]])
    seen = observe(model, tokens, [[model.words, model.head]])
    assert [(group, y.shape) for group, y, _ in seen] == [(0, (1, 2, 7)), (0, (1, 7, 3))]
    assert torch.equal(seen[0][1], model(tokens))
    assert [dim for *_, dim in seen] == [2, 1]


def test_weights_of_transformers_conv1d():
    layer = neq.convert(nn.Sequential(Conv1D(4, 4)))[0]  # square: [inputs, n]
    assert torch.equal(
        layer.parameter_rows(), torch.cat([layer.weight.t(), layer.bias[:, None]], 1)
    )
