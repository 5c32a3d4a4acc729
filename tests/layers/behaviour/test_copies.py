"""Copies of converted models, and files of them."""

import copy
import io
import pickle

import pytest
import torch

import neq
from tests.support.layers import (
    assert_gradients_of_active_rows,
    layers_of,
    rows_of,
    step,
    tiny_input,
)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures("one_thread")


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_the_meta_device(model):
    """What ``map_location`` does to tensors must not reach the masks."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False, map_location="meta")
    copied = copied.to_empty(device="cpu")
    copied.load_state_dict(model.state_dict())
    return copied


COPIES = [copy.deepcopy, through_pickle, through_a_file, through_the_meta_device]


@each("duplicate", COPIES, ids=lambda f: f.__name__)
def test_copies_have_masks_of_their_own(plain, model, duplicate):
    other = duplicate(model)
    assert rows_of(other) == rows_of(model)
    step(plain)
    step(other)
    assert_gradients_of_active_rows(other, plain)
    before = rows_of(model)
    for layer in layers_of(other):
        layer.set_active([0])
    assert rows_of(model) == before
    assert repr(other) == repr(plain)
    assert [type(m) for m in neq.revert(other).modules()] == [type(m) for m in plain.modules()]


def test_a_copy_of_one_layer(model):
    layer = copy.deepcopy(model.hidden)
    layer.set_active([])
    assert model.hidden.active_fraction > 0


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_to_and_from_the_plain_model(plain, model):
    step(model)
    state = saved_and_loaded(model.state_dict())
    assert state.keys() == plain.state_dict().keys()
    assert not plain.load_state_dict(state, strict=True).missing_keys
    x = tiny_input()
    assert torch.equal(plain.eval()(x), model.eval()(x))
    step(plain.train())
    model.load_state_dict(saved_and_loaded(plain.state_dict()), strict=True)
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_load_state_dict_keeps_the_mask_and_the_parameters(plain, model):
    before, parameters = rows_of(model), list(model.parameters())
    model.load_state_dict(plain.state_dict())
    assert rows_of(model) == before
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))


def test_load_state_dict_assign(plain, model):
    model.load_state_dict(copy.deepcopy(plain).state_dict(), assign=True)
    for p in model.parameters():
        p.requires_grad_()
    step(plain)
    step(model)
    assert_gradients_of_active_rows(model, plain)


def test_exponential_moving_average(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert rows_of(average.module) == rows_of(model)
    torch.optim.swa_utils.update_bn([tiny_input()], average)


def test_replicas_of_data_parallel_place_their_rows_by_themselves():
    layer = neq.NEqLinear(4, 8)
    layer.set_active([1, 3])
    replica = layer._replicate_for_data_parallel()
    assert replica.active is not layer.active
    assert replica.active.rows.tolist() == [1, 3]
