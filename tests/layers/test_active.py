"""set_active and what it leaves to read, and each of its errors."""

from unittest import mock
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

import neq
from neq.layers import active as neq_rows
from neq_kernels.wgrad import planner
from tests.support.layers import Operators

each = pytest.mark.parametrize
NEURONS = 8


@pytest.fixture
def layer():
    return neq.NEqLinear(4, NEURONS)


def mask(*rows):
    return torch.isin(torch.arange(NEURONS), torch.tensor(rows))


ROWS = {
    "list": [5, 1, 3],
    "tuple": (3, 5, 1),
    "range": range(1, 7, 2),
    "list of numpy integers": [np.int64(5), np.int32(3), np.uint8(1)],
    "list of tensors": [torch.tensor(5), torch.tensor(1), torch.tensor(3)],
    "numpy": np.array([5, 3, 1]),
    "numpy reversed": np.array([1, 3, 5])[::-1],
    "numpy every second": np.array([1, 0, 3, 0, 5, 0])[::2],
    "numpy uint16": np.array([5, 3, 1], dtype=np.uint16),
    "numpy uint64": np.array([5, 3, 1], dtype=np.uint64),
    "numpy mask": np.isin(np.arange(NEURONS), [1, 3, 5]),
    "int64": torch.tensor([5, 1, 3]),
    "int32": torch.tensor([5, 1, 3], dtype=torch.int32),
    "uint8": torch.tensor([5, 1, 3], dtype=torch.uint8),
    "uint32": torch.tensor([5, 1, 3], dtype=torch.uint32),
    "strided": torch.tensor([5, 0, 1, 0, 3])[::2],
    "mask": mask(1, 3, 5),
    "list of bools": mask(1, 3, 5).tolist(),
    "tuple of bools": tuple(mask(1, 3, 5).tolist()),
}


@each("rows", ROWS.values(), ids=ROWS)
def test_every_way_to_name_three_rows(layer, rows):
    layer.set_active(rows)
    assert layer.active_rows.tolist() == [1, 3, 5]
    assert layer.active_rows.dtype == torch.int64
    assert torch.equal(layer.active_mask, mask(1, 3, 5))
    assert layer.active_fraction == 3 / 8
    assert layer.n_neurons == 8


@each(
    "rows",
    [[], (), range(0), np.array([]), np.array([], dtype=np.int64), torch.tensor([]), mask()],
    ids=["list", "tuple", "range", "numpy float", "numpy int", "tensor", "mask"],
)
def test_no_row(layer, rows):
    layer.set_active(rows)
    assert layer.active_rows.tolist() == []
    assert layer.active_rows.dtype == torch.int64
    assert not layer.active_mask.any()
    assert layer.active_fraction == 0


@each("rows", [None, range(NEURONS), mask(*range(NEURONS))], ids=["None", "range", "mask"])
def test_all_rows(layer, rows):
    assert layer.active_fraction == 1, "to begin with"
    layer.set_active([2])
    layer.set_active(rows)
    assert layer.active_rows.tolist() == list(range(NEURONS))
    assert layer.active_mask.all()
    assert layer.active_fraction == 1


def test_many_rows_come_back_in_order():
    layer = neq.NEqLayerNorm(5000)
    rows = torch.randperm(5000)[:2000]
    layer.set_active(rows)
    assert torch.equal(layer.active_rows, rows.sort().values)
    assert torch.equal(layer.active_mask.nonzero().flatten(), rows.sort().values)


ERRORS = {
    "duplicate": ([1, 4, 4], ValueError, "row 4 is named more than once"),
    "too large": ([1, 8], ValueError, r"rows must lie in \[0, 8\), got 8"),
    "negative": ([1, -1], ValueError, r"rows must lie in \[0, 8\), got -1"),
    "float list": ([1.0, 2.0], TypeError, "rows must be integers or bools, got torch.float32"),
    "float tensor": (torch.ones(8), TypeError, "integers or bools, got torch.float32"),
    "float numpy": (np.ones(8), TypeError, "rows must be integers or bools, got torch.float"),
    "complex": ([1j], TypeError, "rows must be integers or bools, got torch.complex64"),
    "one number": (3, ValueError, r"rows must have one dimension, got shape \[\]"),
    "two dimensions": ([[1, 2]], ValueError, r"rows must have one dimension, got shape \[1, 2\]"),
    "two-dimensional mask": (
        torch.ones(8, 1, dtype=torch.bool),
        ValueError,
        r"rows must have one dimension, got shape \[8, 1\]",
    ),
    "short mask": (
        [True, False],
        ValueError,
        "a bool mask must have one entry for each of the 8 neurons, got 2",
    ),
    "empty mask": (torch.zeros(0, dtype=torch.bool), ValueError, "each of the 8 neurons, got 0"),
    "meta": (torch.empty(2, device="meta"), ValueError, "rows are on the meta device"),
    "string": ("all", TypeError, "rows must be indices, a bool mask or None, got str"),
    "set": ({1, 2}, TypeError, "rows must be indices, a bool mask or None, got set"),
    "dict": ({1: 2}, TypeError, "rows must be indices, a bool mask or None, got dict"),
    "ragged": ([[1], [2, 3]], TypeError, "rows must be indices, a bool mask or None, got list"),
    "list of None": ([None], TypeError, "rows must be indices, a bool mask or None, got list"),
    "numpy strings": (np.array(["a"]), TypeError, "a bool mask or None, got ndarray"),
    "iterator": (iter([1]), TypeError, "a bool mask or None, got list_iterator"),
    "layer": (nn.Linear(1, 1), TypeError, "rows must be indices, a bool mask or None, got Linear"),
    "beyond int64": ([2**70], TypeError, "rows must be indices, a bool mask or None, got list"),
}


@each(("rows", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_layer_and_change_nothing(layer, rows, error, message):
    layer.set_active([2, 3])
    with pytest.raises(error, match=f"^NEqLinear: .*{message}"):
        layer.set_active(rows)
    assert layer.active_rows.tolist() == [2, 3]


def test_errors_name_the_layer_in_its_model():
    model = neq.convert(nn.Sequential(nn.ReLU(), nn.ModuleDict({"head": nn.Conv2d(3, 4, 1)})))
    with pytest.raises(ValueError, match=r"^NEqConv2d '1\.head': rows must lie in \[0, 4\), got 9"):
        model[1]["head"].set_active([9])


@each(
    ("layer", "neurons"),
    [
        (neq.NEqLinear(3, 5), 5),
        (neq.NEqConv2d(4, 6, 3, groups=2), 6),
        (neq.NEqConvTranspose2d(4, 6, 3, groups=2), 6),
        (neq.NEqBatchNorm2d(7), 7),
        (neq.NEqGroupNorm(2, 8), 8),
        (neq.NEqLayerNorm((3, 4)), 12),
        (neq.NEqRMSNorm((3, 4)), 12),
        (neq.NEqInstanceNorm1d(5, affine=True), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_n_neurons(layer, neurons):
    assert layer.n_neurons == neurons
    assert layer.active_mask.shape == (neurons,)
    layer.set_active([neurons - 1])
    with pytest.raises(ValueError, match=rf"rows must lie in \[0, {neurons}\)"):
        layer.set_active([neurons])


def test_what_was_given_and_what_is_returned_belong_to_the_caller(layer):
    given = mask(1, 3, 5)
    layer.set_active(given)
    given[:] = True
    layer.active_mask[:] = False
    layer.active_rows[:] = 0
    assert layer.active_rows.tolist() == [1, 3, 5]
    assert torch.equal(layer.active_mask, mask(1, 3, 5))


def test_rows_chosen_in_inference_mode_can_be_trained(layer):
    norm = neq.NEqLayerNorm(NEURONS)
    with torch.inference_mode():
        converted = neq.convert(nn.Linear(4, NEURONS))
        for chosen in torch.tensor([1, 3]), mask(1, 3), [1, 3]:
            layer.set_active(chosen)
            norm.set_active(chosen)
        converted.set_active([1, 3])
    norm(layer(torch.randn(2, 4))).square().sum().backward()
    converted(torch.randn(2, 4)).sum().backward()
    for p in layer.bias, norm.bias, converted.bias:
        assert p.grad.nonzero().flatten().tolist() == [1, 3]


def test_rows_do_not_follow_the_default_device(layer):
    x = torch.randn(2, 4)
    with torch.device("meta"):  # as with a GPU as the default device
        layer.set_active([1, 3])
        layer.set_active(range(3))
        layer.set_active(None)
        layer.set_active(np.array([1, 3]))
        neq.convert(nn.Linear(4, NEURONS, device="cpu")).set_active([1])
    layer(x).sum().backward()
    assert layer.bias.grad.nonzero().flatten().tolist() == [1, 3]


def test_rows_are_not_lost_on_the_meta_device():
    with torch.device("meta"):
        layer = neq.NEqLinear(4, NEURONS)
    layer.set_active([1, 3])
    assert layer.active_rows.is_meta
    layer.to_empty(device="cpu")
    assert layer.active_rows.tolist() == [1, 3]


@pytest.mark.gpu
def test_rows_are_on_the_device_of_the_layer(layer):
    layer.set_active(torch.tensor([5, 1], device="cuda"))
    assert layer.active_rows.device.type == "cpu"
    layer.cuda()
    assert layer.active_rows.is_cuda
    assert layer.active_mask.is_cuda
    layer(torch.randn(2, 4, device="cuda")).sum().backward()
    assert layer.bias.grad.nonzero().flatten().tolist() == [1, 5]


def step(layer):
    layer(torch.ones(1, layer.in_features)).sum().backward()


def test_a_mask_of_the_past_is_freed(layer):
    layer.set_active([1])
    step(layer)
    old = ref(layer.active.mask), ref(layer.active.order)
    layer.set_active([2])
    assert [t() for t in old] == [None, None]


def test_what_a_captured_graph_reads_outlives_its_mask(layer):
    """It would otherwise take for neurons whatever comes to lie in that memory."""
    layer.set_active([1, 4])
    with mock.patch.object(neq_rows, "_is_capturing", return_value=True):
        step(layer)
    mask, order = ref(layer.active.mask), ref(layer.active.order)
    for rows in [2], [], [0, 3]:
        layer.set_active(rows)
    step(layer)
    assert mask().nonzero().flatten().tolist() == [1, 4]
    assert order().tolist() == [1, 4, 0, 2, 3, 5, 6, 7]
    assert layer.active_rows.tolist() == [0, 3]
    later = ref(layer.active.order)
    layer.set_active(None)
    assert later() is None


def test_what_an_optimizer_reads_while_captured_outlives_its_mask(layer):
    optimizer = neq.optim.SGD(layer.parameters(), lr=0.1, layers=layer)
    layer.set_active([1])
    step(layer)
    with mock.patch.object(neq_rows, "_is_capturing", return_value=True):
        optimizer.step()
    order = ref(layer.active.order)
    for rows in [2], [3]:
        layer.set_active(rows)
        step(layer)
        optimizer.step()
    assert order().tolist() == [1, 0, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("rows", "granule", "expected"),
    [
        ([0, 1, 4, 9], 4, [0, 1, 2, 3, 8, 9]),  # one of four is too few, one of the last two enough
        ([0, 1, 4, 9], 1, [0, 1, 4, 9]),
        ([4, 5, 6], 3, [3, 4, 5]),
        ([3], 16, []),
        ([0, 1, 2, 3, 4], 16, [*range(10)]),
        (None, 3, [*range(10)]),
        ([], 3, []),
        ([True] * 3 + [False] * 7, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_granules_of_which_half_is_named(rows, granule, expected):
    layer = neq.NEqLinear(2, 10)
    layer.set_active(rows, granule=granule)
    assert layer.active_rows.tolist() == expected


@pytest.mark.parametrize(
    ("granule", "error", "message"),
    [
        (0, ValueError, "granule must be at least 1, got 0"),
        (2.0, TypeError, "granule must be a number of neurons, got 2.0"),
        (True, TypeError, "granule must be a number of neurons, got True"),
        ("auto", TypeError, "granule must be a number of neurons, got 'auto'"),
    ],
)
def test_granules_that_there_are_not(granule, error, message):
    layer = neq.NEqLinear(2, 10)
    layer.set_active([1])
    with pytest.raises(error, match=f"NEqLinear: {message}|Linear.*: {message}"):
        layer.set_active([2], granule=granule)
    assert layer.active_rows.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "neurons", "granule"),
    [
        (range(16, 48), 64, 16),
        (range(8, 48), 64, 8),
        ([0, 1, 4, 5, 6, 7], 12, 2),
        ([1], 12, 1),
        ([11], 12, 1),
        (range(64, 96), 128, 16),  # no larger ones are told apart
        (range(16, 20), 20, 16),  # the last one is smaller
        ([*range(16), *range(16, 18)], 20, 2),
        ([], 5, 16),
    ],
)
def test_the_granules_that_a_mask_consists_of(monkeypatch, rows, neurons, granule):
    layer = neq.NEqLinear(2, neurons)
    layer.set_active([*rows])
    assert layer.active.granule == 1  # a CPU is indifferent
    monkeypatch.setattr(neq_rows, "_is_gpu", lambda device: True)
    layer.set_active([*rows])
    assert layer.active.granule == granule


@pytest.mark.usefixtures("fresh_planner")
def test_the_planner_learns_of_granules(monkeypatch):
    """Before the forward, and in the backward while it times."""
    monkeypatch.setattr(neq_rows, "_is_gpu", lambda device: True)
    linear, images = neq.NEqLinear(6, 32), neq.NEqConv2d(3, 32, 3)
    asked = []
    problem_of = planner.problem_of
    monkeypatch.setattr(
        planner, "problem_of", lambda *sizes: asked.append(problem_of(*sizes)) or asked[-1]
    )
    for layer, x in (
        (linear, torch.randn(5, 6)),
        (images, torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)),
        (images, torch.randn(2, 3, 5, 5)),  # where each neuron has planes of its own
    ):
        layer.set_active(range(16))
        with planner.tuning():
            layer(x).sum().backward()
        assert {p.granule for p in asked} == {
            16 if asked[0].conv is None or x.stride(1) == 1 else 1
        }
        assert len(asked) >= 3  # two look-ups, and what was measured
        asked.clear()


@pytest.mark.usefixtures("fresh_planner")
@each("layer", [neq.NEqLinear(6, 32), neq.NEqConv2d(6, 32, 1)])
def test_what_watches_operators_changes_no_choice(monkeypatch, layer):
    """A profiler shows the kernels that run without it."""
    monkeypatch.setattr(neq_rows, "_is_gpu", lambda device: True)
    x = torch.randn(2, 6, 5, 6).contiguous(memory_format=torch.channels_last)
    layer.set_active(range(16))
    with mock.patch.object(planner, "choose", return_value="pack") as choose:
        y = layer(x)
        choose.reset_mock()
        with Operators() as seen:
            y.sum().backward()
    (name,) = seen.of_neq
    assert name == f"neq::{'linear' if isinstance(layer, nn.Linear) else 'conv'}_wgrad"
    *_, granule = choose.call_args.args
    assert granule == 16


def test_granules_are_looked_for_where_the_layer_is(monkeypatch):
    monkeypatch.setattr(neq_rows, "_is_gpu", lambda device: device.type == "meta")
    layer = neq.NEqLinear(2, 64)
    layer.set_active(range(16, 48))
    assert layer.active.granule == 1
    layer.to("meta")
    assert layer.active.on(layer.weight.device).granule == 16
