"""The compact form of layers: what goes in and comes out is that of the masked form."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq
from neq.layers import base
from tests.support.compact import ROWS, Net, assert_same_weights, batch, loss_of, set_rows, twins
from tests.support.layers import CONV, EMBEDDING, LINEAR, NORM, TRANSPOSED
from tests.support.tensors import integers


def in_both_forms(case, rows):
    _, masked = case.twins(exact=True)
    masked.set_active(rows)
    return masked, neq.compact(copy.deepcopy(masked), leave_alone=())


def has_leaves(case):
    masked = case.twins()[1]
    return masked.neuron_dim is not None and not case.options.get("sparse")


CASES = [case for case in (*LINEAR, *CONV, *TRANSPOSED, *EMBEDDING, *NORM) if has_leaves(case)]
in_cases = pytest.mark.parametrize("case", CASES, ids=repr)


@in_cases
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_gradients_are_the_active_rows_of_the_masked_ones(case, share):
    n = case.twins()[1].n_neurons
    rows = sorted({*range(0, n, 2)}) if share < 1 else range(n)
    masked, compact = in_both_forms(case, rows)
    outputs, given = [], case.input(exact=True)
    for layer in masked, compact:
        x = given.clone().requires_grad_(given.is_floating_point())
        y = layer(x, **case.forward)
        y.backward(integers(y.shape, generator=torch.Generator().manual_seed(0)))
        outputs.append((y, x.grad) if x.requires_grad else (y,))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, dim in compact.leaves.dims.items():
        whole, few = getattr(masked, name).grad, compact.leaf(name).grad
        assert few.shape == compact.leaf(name).shape
        expected = whole.index_select(dim, torch.tensor(list(rows)))
        torch.testing.assert_close(few, expected)


@in_cases
def test_no_active_neuron_leaves_the_graph(case):
    _, compact = in_both_forms(case, [])
    assert not compact(case.input(), **case.forward).requires_grad
    assert all(p.numel() == 0 for p in compact.parameters())


@in_cases
def test_a_copy_pickled_and_expanded_is_the_plain_layer(case, tmp_path):
    plain = case.twins(exact=True)[0]
    masked, compact = in_both_forms(case, [0])
    torch.save(compact, tmp_path / "layer")
    loaded = torch.load(tmp_path / "layer", weights_only=False)
    for layer in (compact, copy.deepcopy(compact), loaded):
        assert_same_weights(layer, masked)
        neq.expand(layer)
        assert list(dict(layer.named_parameters())) == list(dict(plain.named_parameters()))
        assert_same_weights(layer, masked)
        assert layer.active_rows.tolist() == [0]


def test_names_shapes_and_strides_of_the_state_dict_stay():
    torch.manual_seed(0)
    plain = Net().to(memory_format=torch.channels_last)
    state = copy.deepcopy(plain.state_dict())
    compact = neq.compact(plain, capacity=0.5)
    for (name, a), (other, b) in zip(state.items(), compact.state_dict().items(), strict=True):
        assert (name, a.dtype, a.shape, a.stride()) == (other, b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)
    assert {name for name, _ in compact.named_buffers()} == {
        name for name in state if not name.startswith("head")
    }


def test_a_plain_state_loads_into_a_compact_model_and_back():
    _, compact = twins()
    torch.manual_seed(1)
    plain = Net()
    compact.load_state_dict(plain.state_dict())
    assert_same_weights(compact, plain)
    assert torch.equal(compact.mlp.active_weight, plain.mlp.weight[list(ROWS["mlp"])])
    torch.manual_seed(2)
    other = Net()
    other.load_state_dict(compact.state_dict())
    assert_same_weights(other, plain)


def test_a_missing_weight_is_reported_and_no_leaf():
    _, compact = twins()
    state = compact.state_dict()
    del state["mlp.weight"]
    result = compact.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["mlp.weight"], [])


def test_a_weight_that_someone_writes_is_read():
    masked, compact = twins()
    for model in (masked, compact):
        with torch.no_grad():
            model.mlp.weight.mul_(2)
    assert torch.equal(loss_of(masked), loss_of(compact))
    assert torch.equal(compact.mlp.active_weight, compact.mlp.weight[list(ROWS["mlp"])])


def test_a_leaf_that_someone_writes_is_written():
    _, compact = twins()
    with torch.no_grad():
        compact.mlp.active_weight.zero_()
    assert not compact.state_dict()["mlp.weight"][list(ROWS["mlp"])].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_moves_keeps_its_ties_and_leaves(dtype):
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "c": nn.Linear(6, 2)})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    neq.convert(model)["a"].set_active([1, 4])
    neq.compact(model)
    leaf = model["a"].active_weight
    assert model["b"].active_weight is leaf
    model.to(dtype)
    assert model["a"].weight is model["b"].weight
    assert model["a"].active_weight is leaf is model["b"].active_weight
    assert (leaf.dtype, model["a"].weight.dtype) == (dtype, dtype)


def test_transforms_see_the_leaves():
    masked, compact = twins()
    parameters = dict(compact.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(compact, parameters, (batch(),)).square().sum()

    got = torch.func.grad(loss)(parameters)
    loss_of(masked).backward()
    rows = torch.tensor(list(ROWS["mlp"]))
    torch.testing.assert_close(got["mlp.active_weight"], masked.mlp.weight.grad[rows])
    torch.testing.assert_close(got["norm.active_bias"], masked.norm.bias.grad[list(ROWS["norm"])])
    doubled = {name: p * 2 for name, p in parameters.items()}
    assert loss(doubled) != loss(parameters)


def test_more_rows_than_active_neurons_are_zeros():
    _, compact = twins(capacity=20)
    loss_of(compact).backward()
    for name in ROWS:
        layer = getattr(compact, name)
        for part, dim in layer.leaves.dims.items():
            leaf = layer.leaf(part)
            assert leaf.shape[dim] == 20
            assert not leaf.narrow(dim, 16, 4).any()
            assert not leaf.grad.narrow(dim, 16, 4).any()


def test_rows_move_with_the_mask():
    _, compact = twins(capacity=18)
    layer, leaf = compact.mlp, compact.mlp.active_weight
    before = layer.weight.clone()
    for rows in ([3, 5, 31], range(20), [], [0], None, range(18)):
        layer.set_active(rows)
        rows = layer.active_rows
        assert layer.active_weight is leaf
        assert len(leaf) == min(32, max(18, len(rows)))
        assert torch.equal(leaf[: len(rows)], before[rows])
        assert not leaf[len(rows) :].any()
    assert torch.equal(layer.weight, before)


def test_without_a_capacity_leaves_follow_the_masks():
    _, compact = twins(rows={})
    assert len(compact.mlp.active_weight) == 32
    compact.mlp.set_active([4, 7])
    assert compact.mlp.active_weight.shape == (2, 32)


def test_gradients_need_no_gradient_of_the_input_layer():
    """A layer whose weight has a leaf and whose bias does not train."""
    model = neq.convert(Net())
    model.mlp.bias.requires_grad_(False)
    set_rows(model, ROWS)
    neq.compact(model)
    loss_of(model).backward()
    assert model.mlp.leaf("bias") is None
    assert model.mlp.bias.grad is None
    assert model.mlp.active_weight.grad.any()


@pytest.mark.parametrize("view", [False, True])
def test_wrappers_that_exchange_parameters_are_refused(view):
    """As FullyShardedDataParallel does: by views of a flat one, or by others of its own."""
    _, compact = twins()
    layer = compact.mlp
    other = layer.active_weight.detach().clone()
    del layer.active_weight
    layer.active_weight = other if view else nn.Parameter(other)
    with (
        mock.patch.object(base, "in_process_group", return_value=True),
        pytest.raises(TypeError, match="'mlp': active_weight is not the Parameter that"),
    ):
        loss_of(compact)


def test_data_parallel_replicas_train_the_leaves():
    _, compact = twins()
    replica = compact.mlp._replicate_for_data_parallel()
    for name, p in compact.mlp.named_parameters():
        setattr(replica, name, p * 1)
        replica._parameters.pop(name, None)
    x = torch.randn(4, 32)
    replica(x).square().sum().backward()
    through, compact.mlp.active_weight.grad = compact.mlp.active_weight.grad, None
    compact.mlp(x).square().sum().backward()
    torch.testing.assert_close(through, compact.mlp.active_weight.grad)


class Language(nn.Module):
    """A language model whose output shares the weight of its input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16, padding_idx=3)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 24, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(F.gelu(self.mix(self.embed(x))))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("capacity", [None, 10, 1.0])
def test_an_embedding_that_is_tied_to_the_output(capacity, compiled):
    torch.manual_seed(0)
    masked = neq.convert(Language())
    masked.embed.set_active([1, 3, 5, 23])
    compact = neq.compact(copy.deepcopy(masked), capacity=capacity, leave_alone=["mix"])
    assert compact.embed.active_weight is compact.out.active_weight
    run = masked, torch.compile(compact, backend="aot_eager") if compiled else compact
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (masked, compact)]
    for rows in [1, 3, 5, 23], [0, 3, 4], [], range(10):
        ids = torch.randint(24, (4, 6))
        for model, call, optimizer in zip((masked, compact), run, optimizers, strict=True):
            model.embed.set_active(rows)
            optimizer.zero_grad()
            call(ids).square().sum().backward()
            optimizer.step()
    state = masked.state_dict()
    for name, values in compact.state_dict().items():
        torch.testing.assert_close(values, state[name], msg=name)


def test_a_sparse_embedding_stays_in_the_masked_form():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True))
    with pytest.raises(ValueError, match=r"\(0: its gradients are sparse\)"):
        neq.compact(model, leave_alone=())


@pytest.mark.parametrize("capacity", [None, 20])
def test_a_graph_that_is_kept_hinders_no_other_rows(capacity):
    """As ``loss`` is, which lives on after its step in most training loops."""
    _, model = twins(capacity=capacity)
    kept = []
    for rows in ROWS, {"mlp": [3], "norm": [1], "conv": [2]}, {"mlp": []}, ROWS:
        set_rows(model, rows)
        model.zero_grad()
        kept.append(loss_of(model))
        kept[-1].backward()
        assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("capacity", [None, 20])
def test_other_rows_between_a_forward_and_its_backward_are_refused(capacity, name):
    _, model = twins(capacity=capacity)
    loss = loss_of(model)
    getattr(model, name).set_active(range(1, 17))
    with pytest.raises(RuntimeError, match=f"'{name}': other neurons train since the forward"):
        loss.backward()
