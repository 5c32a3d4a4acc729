"""The optimizers that step active rows only: their operators, and their being torch's otherwise."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from steps import ADAMW_OPTIONS, SGD_OPTIONS, SHARES, laid_out, lr, problem, same
from torch import nn
from torch.library import opcheck

import neq
from neq_kernels import compiled, native_step, ops, pack_step, reference, row_step

if compiled.why_not("cpu"):
    raise RuntimeError(compiled.why_not("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["compiled", "packed"])
def backend(request, monkeypatch):
    if request.param == "packed":
        monkeypatch.setattr(row_step, "backend", lambda *tensors: pack_step)
    return request.param


def check_sgd(options, share, dtype, device, layout, close=None):
    (p, g, m), rows, counts = problem(1, share, dtype, device, layout)
    m = m if options[0] else []
    truth = copy.deepcopy((p, g, m))
    ops.sgd_rows_(p, g, m, rows, counts, lr(0.5), *options)
    reference.sgd_rows_(*truth, rows, counts, lr(0.5), *options)
    same(p, truth[0], close)
    same(m, truth[2], close)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("device", DEVICES)
def test_sgd_exact(options, share, device, backend):
    for dtype in (torch.float32, torch.float64):
        check_sgd(options, share, dtype, device, "plain")


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("share", SHARES)
def test_sgd_exact_in_any_layout(options, share, layout, backend):
    for dtype in (torch.float32, torch.float64):
        check_sgd(options, share, dtype, "cpu", layout)


def test_sgd_exact_with_gradients_in_another_layout(backend):
    (p, g, m), rows, counts = problem(1, 0.5)
    truth = copy.deepcopy((p, g, m))
    g = [laid_out(t, "transposed") for t in g]
    ops.sgd_rows_(p, g, m, rows, counts, lr(0.5), *SGD_OPTIONS[3])
    reference.sgd_rows_(*truth, rows, counts, lr(0.5), *SGD_OPTIONS[3])
    same(p, truth[0])


def test_parameters_without_neurons_or_weights(backend):
    shapes, counts = [(0, 3), (4, 0), (2, 2)], [torch.tensor(k) for k in (0, 2, 1)]
    p, g = ([torch.ones(shape) for shape in shapes] for _ in "pg")
    rows = [torch.arange(shape[0]) for shape in shapes]
    ops.sgd_rows_(p, g, [], rows, counts, lr(0.5), *SGD_OPTIONS[0])
    assert p[2].tolist() == [[0.5, 0.5], [1, 1]]


def test_rows_that_lie_apart(backend):
    (p, g, m), rows, counts = problem(1, 0.5)
    truth = copy.deepcopy((p, g, m))
    apart = [torch.stack([r, r.new_full((), 99).expand_as(r)], 1)[:, 0] for r in rows]
    ops.sgd_rows_(p, g, m, apart, counts, lr(0.5), *SGD_OPTIONS[3])
    reference.sgd_rows_(*truth, rows, counts, lr(0.5), *SGD_OPTIONS[3])
    same(p, truth[0])


@pytest.mark.parametrize(
    ("device", "dtype", "elements", "chosen"),
    [
        ("cpu", torch.float32, 9, "native_step"),
        ("cpu", torch.bfloat16, 9, "pack_step"),
        ("cuda", torch.float32, 9, "triton_step"),
        ("cuda", torch.bfloat16, 9, "triton_step"),
        ("cuda", torch.float8_e5m2, 9, "pack_step"),
        ("cuda", torch.float32, 2**31, "pack_step"),
        ("mps", torch.float32, 9, "pack_step"),
    ],
    ids=str,
)
def test_who_steps(device, dtype, elements, chosen):
    p = mock.Mock(dtype=dtype, is_cpu=device == "cpu", is_cuda=device == "cuda")
    p.numel.return_value = elements
    assert row_step.backend(p).__name__ == f"neq_kernels.{chosen}"


def test_who_steps_a_transposed_matrix():
    whole, transposed = torch.ones(3, 4), torch.ones(4, 3).t()
    assert row_step.backend(transposed, transposed) is native_step
    assert row_step.backend(transposed, whole) is pack_step
    assert row_step.backend(whole, transposed) is pack_step
    assert row_step.backend(torch.ones(4, 3, 2).transpose(0, 1)) is pack_step


def test_without_triton_torch_steps_on_a_gpu():
    p = mock.Mock(is_cpu=False, is_cuda=True, numel=lambda: 9)
    with mock.patch.object(row_step, "triton_is_there", return_value=False):
        assert row_step.backend(p) is pack_step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sgd_in_half_precision(dtype):
    check_sgd(SGD_OPTIONS[3], 0.5, dtype, "cpu", "plain", close=0.05)


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_adamw(options, share, dtype, device, backend):
    check_adamw(options, share, dtype, device, "plain")


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw_of_transposed_matrices(options, backend):
    for dtype in (torch.float32, torch.float64):
        check_adamw(options, 0.5, dtype, "cpu", "transposed")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99999), (1 - 1e-6, 1 - 1e-7)], ids=str)
def test_adamw_is_as_exact_as_torchs_for_betas_close_to_1(betas, backend):
    rows, counts = [torch.arange(64)], [torch.tensor(64)]
    start, grads = torch.randn(64, 9), [torch.randn(64, 9) for _ in range(3)]
    results = {}
    for name, dtype in (("ours", torch.float32), ("exact", torch.float64)):
        p, m, v = start.to(dtype, copy=True), *(torch.zeros(64, 9, dtype=dtype) for _ in "mv")
        step = torch.tensor(0.0)
        for g in grads:
            lists = [p], [g.to(dtype)], [m], [v], [], [step], rows, counts
            ops.adamw_rows_(*lists, lr(1e-3), *betas, 1e-8, 0.0, False, False)
        results[name] = v, p - start
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], betas=betas, weight_decay=0.0, fused=True)
    for theirs.grad in grads:
        optimizer.step()
    results["theirs"] = optimizer.state[theirs]["exp_avg_sq"], theirs.detach() - start

    def error(name, i):
        exact = results["exact"][i]
        return ((results[name][i].double() - exact) / exact).abs().median()

    for i in range(2):
        assert error("ours", i) <= 2 * error("theirs", i)


def check_adamw(options, share, dtype, device, layout):
    amsgrad, maximize, decay = options
    (p, g, m, v, v_max), rows, counts = problem(3, share, dtype, device, layout)
    v_max = v_max if amsgrad else []
    steps = [torch.tensor(float(i)) for i in range(len(p))]
    mine = [p, g, m, v, v_max, steps]
    truth = [[t.double() for t in tensors] for tensors in copy.deepcopy(mine)]
    after = rows, counts, lr(0.25), 0.75, 0.9375, 1e-3, decay, amsgrad, maximize
    ops.adamw_rows_(*mine, *after)
    reference.adamw_rows_(*truth, *after)
    for tensors, exact in zip(mine, truth, strict=True):
        same([t.double() for t in tensors], exact, 1e-6 if dtype == torch.float32 else 1e-14)


def test_any_number_of_threads_gives_the_same_bits():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        p, g, m = (torch.randn(301, 200) for _ in range(3))
        ops.sgd_rows_([p], [g], [m], [torch.randperm(301)], [torch.tensor(290)], lr(0.1), 0.9, 0.0,
                      0.1, True, False, False)  # fmt: skip
        results.append(p)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def one(**changed):
    """Arguments of ``sgd_rows_`` for one parameter [4, 2]."""
    args = {
        "params": [torch.ones(4, 2)],
        "grads": [torch.ones(4, 2)],
        "momentum_buffers": [torch.ones(4, 2)],
        "rows": [torch.arange(4)],
        "counts": [torch.tensor(2)],
        "lr": lr(0.5),
        "momentum": 0.5,
    }
    return (*(args | changed).values(), 0.0, 0.0, False, False, False)


def one_adamw(**changed):
    like = {name: [torch.ones(4, 2)] for name in ("params", "grads", "m", "v")}
    args = like | {
        "max_exp_avg_sqs": [],
        "steps": [torch.tensor(0.0)],
        "rows": [torch.arange(4)],
        "counts": [torch.tensor(2)],
        "lr": lr(0.5),
    }
    return (*(args | changed).values(), 0.9, 0.99, 1e-8, 0.0, changed.get("v_max", False), False)


def test_opcheck():
    opcheck(ops.sgd_rows_, one())
    opcheck(ops.sgd_rows_, one(momentum=0.0, momentum_buffers=[]))
    opcheck(ops.adamw_rows_, one_adamw())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grads": []}, r"grads must have one entry for each of the 1 params, got 0"),
        ({"grads": [torch.ones(4, 3)]}, r"grads\[0\] must be like params\[0\], .* got \[4, 3\]"),
        ({"grads": [torch.ones(4, 2).half()]}, r"grads\[0\] must be like .* got .* torch.float16"),
        ({"momentum_buffers": []}, r"momentum_buffers must have one entry for each of the 1"),
        ({"momentum": 0.0}, r"momentum_buffers must be empty without momentum"),
        ({"rows": [torch.arange(3)]}, r"rows must be int64 of shape \[4\].* got torch.int64 \[3\]"),
        ({"counts": [torch.ones(1)]}, r"count must be a 0-dim int64 tensor on the CPU"),
        ({"lr": torch.ones(2)}, r"lr must have no dimensions, got \[2\]"),
        (
            {name: [torch.ones(4, dtype=torch.int64)] for name in ("params", "grads")},
            r"params\[0\] must be \[neurons, ...\] and floating point, got \[4\] torch.int64",
        ),
    ],
    ids=str,
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=message):
        ops.sgd_rows_(*one(**changed))


def test_bad_input_of_adamw():
    with pytest.raises(ValueError, match="max_exp_avg_sqs must be empty without amsgrad"):
        ops.adamw_rows_(*one_adamw(max_exp_avg_sqs=[torch.ones(4, 2)]))
    with pytest.raises(ValueError, match="steps must have one entry for each of the 1 params"):
        ops.adamw_rows_(*one_adamw(steps=[]))


def test_the_kernel_refuses_rows_beyond_the_parameter():
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 4\), got 4"):
        ops.sgd_rows_(*one(rows=[torch.tensor([0, 4, 1, 2])]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads must be one tensor for each of 1 params, got 0"),
        (
            {"counts": [torch.tensor(2)] * 2},
            "counts must be one tensor for each of 1 params, got 2",
        ),
        ({"momentum_buffers": [torch.ones(4, 3)] * 2}, "momentum_buffers must be one .*, got 2"),
        ({"grads": [torch.ones(3, 4).t()]}, "gradient and state must be like their parameter in"),
        ({"grads": [torch.ones(4, 4)]}, "gradient and state must be like their parameter"),
        ({"grads": [torch.ones(4, 3).double()]}, "gradient and state must be like their parameter"),
        ({"momentum": 0.5}, "momentum_buffers must be given with momentum"),
        (
            {"params": [torch.ones(4, 6)[:, ::2]], "grads": [torch.ones(4, 6)[:, ::2]]},
            "a parameter must be in memory neuron by neuron, or column-major",
        ),
        ({"params": [torch.tensor(1.0)]}, "dimensions of a parameter must be at least 1, got 0"),
        ({"orders": [torch.arange(5)]}, "size of order must be neurons = 4, got 5"),
        ({"orders": [torch.arange(4).int()]}, "order must be contiguous int64 of one dimension"),
        ({"counts": [torch.tensor(5)]}, "count must be between 0 and neurons = 4, got 5"),
        ({"counts": [torch.tensor([2, 2])]}, "a tensor must have one value"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_the_kernel_refuses_what_it_would_misread(change, message):
    p, g = torch.ones(4, 3), torch.ones(4, 3)
    lists = {"params": [p], "grads": [g], "momentum_buffers": []}
    lists |= {"orders": [torch.arange(4)], "counts": [torch.tensor(2)]}
    lists |= {name: change[name] for name in lists if name in change}
    change = {name: value for name, value in change.items() if name not in lists}
    numbers = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    flags = dict.fromkeys(("nesterov", "maximize", "first"), False) | {"threads": 1}
    with pytest.raises(ValueError, match=message):
        native_step._C.cpu_sgd_rows(tuple(lists.values()), **numbers | flags | change)
    assert p.eq(1).all()


ADAMW_NUMBERS = 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1  # lr to threads


def test_the_kernel_refuses_adamw_without_its_states():
    p, orders, counts = [torch.ones(4, 3)], [torch.arange(4)], [torch.tensor(2)]
    lists = {"params": p, "grads": p, "exp_avgs": p, "exp_avg_sqs": p, "max_exp_avg_sqs": []}
    lists |= {"steps": [torch.tensor(1.0)], "orders": orders, "counts": counts}
    for name in lists.keys() - {"params", "max_exp_avg_sqs"}:
        with pytest.raises(
            ValueError, match=f"^{name} must be one tensor for each of 1 params, got"
        ):
            native_step._C.cpu_adamw_rows(tuple((lists | {name: []}).values()), *ADAMW_NUMBERS)
    assert p[0].eq(1).all()


def test_the_kernels_refuse_other_lists():
    sgd, adamw = native_step._C.cpu_sgd_rows, native_step._C.cpu_adamw_rows
    numbers = 0.1, 0.0, 0.0, 0.0, False, False, False, 1
    names = "params, grads, momentum_buffers, orders, counts"
    with pytest.raises(ValueError, match=f"lists must be the 5: {names}, got 4"):
        sgd(([],) * 4, *numbers)
    names = "params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, orders, counts"
    with pytest.raises(ValueError, match=f"lists must be the 8: {names}, got 5"):
        adamw(([],) * 5, *ADAMW_NUMBERS)
    with pytest.raises(TypeError, match="orders must be a list of tensors"):
        sgd(([], [], [], None, []), *numbers)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        sgd([[]] * 5, *numbers)
    sgd(([],) * 5, *numbers)
    adamw(([],) * 8, *ADAMW_NUMBERS)


def test_autograd_sees_the_step():
    """A backward that needs the old weight fails, as it does after a step of torch's."""
    args = one()
    x = torch.ones(4, 2, requires_grad=True)
    y = (args[0][0] * x).sum()
    ops.sgd_rows_(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- the optimizers


class Model(nn.Module):
    """Every way in which neurons can lie in a parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.grouped_up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.layer_norm = nn.LayerNorm([4, 2])
        self.whole = nn.Linear(4, 3)
        self.linear = nn.Linear(5, 7)
        self.plain = nn.Embedding(3, 2)


MASKED = ("conv", "norm", "up", "grouped_up", "layer_norm", "linear")


def make_model(dtype=torch.float64):
    torch.manual_seed(3)
    return neq.convert(Model().to(dtype).to(memory_format=torch.channels_last))


def freeze(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name in MASKED:
        layer = getattr(model, name)
        layer.set_active(torch.rand(layer.n_neurons, generator=generator) < 0.6)
    model.whole.set_active([])


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def active_elements(model):
    """True where a parameter's element trains."""
    found = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, neq.NeuronLayer):
            mask = layer.active_mask
            found[f"{name}.weight"] = layer.spread(mask).expand_as(layer.weight)
            found[f"{name}.bias"] = mask.view(layer.bias.shape)
    return found


OPTIONS = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    ("SGD", {"momentum": 0.9, "lr": torch.tensor(0.02)}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.3, "foreach": True}),
    ("AdamW", {"maximize": True, "fused": True, "betas": (0.8, 0.95), "eps": 1e-4}),
    ("AdamW", {"lr": torch.tensor(0.02, dtype=torch.float64)}),
]
BY_OPTIONS = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)


def make(library, name, model, options, **more):
    """Two groups, of which the second has a smaller step."""
    params = list(model.parameters())
    options = {"lr": 0.05, **options}
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": options["lr"] / 2}]
    return getattr(library, name)(groups, **options, **more)


def state_of(optimizer, p):
    return {key: t for key, t in optimizer.state[p].items() if t is not None and t.shape == p.shape}


@BY_OPTIONS
def test_active_rows_as_torch_and_frozen_rows_untouched(name, options, backend):
    mine, dense = make_model(), make_model()
    optimizer = make(neq.optim, name, mine, options, layers=mine)
    truth = make(torch.optim, name, dense, options)
    freeze(mine, 0)
    before = copy.deepcopy(dict(mine.named_parameters()))
    for i in range(5):
        for model in (mine, dense):
            give_gradients(model, i)
        optimizer.step()
        truth.step()
    for (key, a), b in zip(mine.named_parameters(), dense.parameters(), strict=True):
        active = active_elements(mine)[key]
        torch.testing.assert_close(a[active], b[active], rtol=1e-12, atol=1e-14)
        assert torch.equal(a[~active], before[key][~active]), key
        for state, t in state_of(optimizer, a).items():
            torch.testing.assert_close(t[active], truth.state[b][state][active], rtol=1e-12, atol=0)
            assert torch.all(t[~active] == 0), (key, state)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_rows_have_torchs_bits(name, dtype, monkeypatch):
    monkeypatch.setattr(row_step, "backend", lambda *tensors: pack_step)
    mine, dense = make_model(dtype), make_model(dtype)
    options = {"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {"amsgrad": True}
    optimizer = make(neq.optim, name, mine, options, layers=mine)
    truth = make(torch.optim, name, dense, options)
    freeze(mine, 0)
    for i in range(5):
        for model in (mine, dense):
            give_gradients(model, i)
        optimizer.step()
        truth.step()
    for (key, a), b in zip(mine.named_parameters(), dense.parameters(), strict=True):
        active = active_elements(mine)[key]
        assert torch.equal(a[active], b[active]), key


@BY_OPTIONS
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_as_torch_under_a_guard_while_masks_change(name, options, on_thaw):
    mine, guarded = make_model(), make_model()
    optimizer = make(neq.optim, name, mine, options, layers=mine, on_thaw=on_thaw)
    truth = make(torch.optim, name, guarded, options)
    neq.optim.Guard(truth, guarded, on_thaw)
    for i in range(9):
        for model in (mine, guarded):
            if i % 3 == 0:
                freeze(model, i)
            if i == 6:
                model.whole.set_active(None)
                model.conv.set_active([])
            give_gradients(model, i)
        optimizer.step()
        truth.step()
        exclude = "momentum_buffer" if options.get("dampening") else None
        for (key, a), b in zip(mine.named_parameters(), guarded.parameters(), strict=True):
            if exclude is None or i < 3:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=f"{key} at {i}")
                for state, t in state_of(optimizer, a).items():
                    torch.testing.assert_close(t, truth.state[b][state], rtol=1e-12, atol=1e-14)


@BY_OPTIONS
def test_state_dicts_go_both_ways(name, options):
    mine, theirs = make_model(), make_model()
    ours = make(neq.optim, name, mine, options, layers=mine)
    torchs = make(torch.optim, name, theirs, options)

    def train(pair, steps):
        for i in steps:
            for model, optimizer in pair:
                give_gradients(model, i)
                optimizer.step()

    def equal():
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    train([(theirs, torchs)], range(3))
    mine.load_state_dict(theirs.state_dict())
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    freeze(mine, 0)
    before = copy.deepcopy(mine.state_dict())
    train([(mine, ours)], range(3, 5))
    assert any(not torch.equal(before[key], value) for key, value in mine.state_dict().items())
    assert torch.equal(mine.whole.weight, before["whole.weight"])

    theirs.load_state_dict(mine.state_dict())
    saved = pickle.loads(pickle.dumps(ours.state_dict()))
    assert saved.keys() == torchs.state_dict().keys()
    for a, b in zip(saved["param_groups"], torchs.state_dict()["param_groups"], strict=True):
        assert a.keys() == b.keys()
    for index, state in torchs.state_dict()["state"].items():
        assert saved["state"][index].keys() == state.keys()
    torchs.load_state_dict(saved)
    for layer in mine.modules():
        if isinstance(layer, neq.NeuronLayer):
            layer.set_active(None)
    train([(mine, ours), (theirs, torchs)], range(5, 8))
    equal()


def test_everything_active_has_torchs_bits():
    mine, theirs = make_model(torch.float32), make_model(torch.float32)
    ours = make(neq.optim, "AdamW", mine, {}, layers=mine)
    torchs = make(torch.optim, "AdamW", theirs, {})
    for i in range(3):
        for model, optimizer in ((mine, ours), (theirs, torchs)):
            give_gradients(model, i)
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def small(**options):
    """A layer with row 1 of 3 active, its SGD, and gradients of one."""
    layer = neq.NEqLinear(2, 3)
    options = {"lr": 0.5, "momentum": 0.5, **options}
    optimizer = neq.optim.SGD(layer.parameters(), **options, layers=layer)
    layer.set_active([1])
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    return layer, optimizer


def changed_rows(layer, step):
    before = layer.weight.detach().clone()
    step()
    return (layer.weight != before).any(1).tolist()


def test_hooks_closures_and_schedulers():
    layer, optimizer = small()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    torch.optim.SGD(layer.parameters())  # which makes torch's own step call hooks
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)

    def closure():
        called.append("closure")
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 2, requires_grad=True)).sum()
        loss.backward()
        return loss

    assert changed_rows(layer, lambda: optimizer.step(closure)) == [False, True, False]
    assert called == ["pre", "closure", "post"]
    layer.set_active([])
    assert changed_rows(layer, lambda: optimizer.step(closure)) == [False, False, False]
    layer.set_active([0])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0
    assert changed_rows(layer, optimizer.step) == [False, False, False]


@pytest.mark.parametrize("kind", [neq.optim.SGD, neq.optim.AdamW])
def test_a_compiled_step(kind):
    """It steps the rows of the moment, not those for which it was compiled."""
    layer = neq.NEqLinear(2, 4)
    optimizer = kind(layer.parameters(), lr=0.1, layers=layer)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for row in range(4):
        layer.set_active([row])
        assert changed_rows(layer, step) == [i == row for i in range(4)]


def test_copies_and_pickles_follow_their_own_layers():
    for copied in (copy.deepcopy(small()), pickle.loads(pickle.dumps(small()))):
        layer, optimizer = copied
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        assert changed_rows(layer, optimizer.step) == [False, True, False]
        layer.set_active([0, 2])
        assert changed_rows(layer, optimizer.step) == [True, False, True]


def test_conversion_later_and_back():
    model = nn.Sequential(nn.Linear(2, 3))
    optimizer = neq.optim.AdamW(model.parameters(), lr=0.1, layers=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert changed_rows(model[0], optimizer.step) == [True] * 3
    neq.convert(model)[0].set_active([2])
    assert changed_rows(model[0], optimizer.step) == [False, False, True]
    neq.revert(model)
    assert changed_rows(model[0], optimizer.step) == [True] * 3


class Shrinking(neq.optim.SGD):
    """Changes the weights after the step by rows."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)


@pytest.mark.parametrize("rows", [[1], []], ids=str)
def test_an_optimizer_derived_from_ours(rows):
    layer = neq.NEqLinear(2, 3)
    optimizer = Shrinking(layer.parameters(), lr=0.5, momentum=0.5, layers=layer)
    layer.set_active(rows)
    for _ in range(2):
        layer.weight.grad = torch.ones(3, 2)
        assert changed_rows(layer, optimizer.step) == [i in rows for i in range(3)]


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_that_skips_steps(fused):
    layer, optimizer = small(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for poison in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
        if poison:
            layer.weight.grad[1] = torch.inf

        def step():
            scaler.step(optimizer)
            scaler.update()

        assert changed_rows(layer, step) == [False, not poison, False]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_with_a_sparse_gradient(momentum):
    embedding, head = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    model = neq.convert(nn.Sequential(embedding, head))
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, layers=model)
    head.set_active([1, 2])
    for _ in range(2):
        embedding(torch.tensor([0, 1])).sum().backward()
        assert head.weight.grad.is_sparse
        assert changed_rows(head, optimizer.step) == [False, True, False, False]


def test_a_new_group():
    _, optimizer = small()
    other = neq.NEqLinear(2, 3)
    optimizer.add_param_group({"params": other.parameters()})
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    assert changed_rows(other, optimizer.step) == [True] * 3  # it is none of the given layers


def test_bad_arguments():
    layer = neq.NEqLinear(2, 3)
    with pytest.raises(ValueError, match=r"neq.optim.AdamW: differentiable must be False"):
        neq.optim.AdamW(layer.parameters(), differentiable=True, layers=layer)
    with pytest.raises(ValueError, match=r"neq.optim.SGD: on_thaw='reset' is about .* give layers"):
        neq.optim.SGD(layer.parameters(), lr=0.1, on_thaw="reset")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        neq.optim.SGD(layer.parameters(), lr=-1.0, layers=layer)


def test_a_controller_guards_what_follows_other_layers():
    model = torch.nn.Sequential(neq.NEqLinear(2, 3), neq.NEqLinear(3, 4))
    optimizer = neq.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, layers=model[0])
    policy = neq.Fixed({"1": [2]})
    given = {"optimizer": optimizer, "policy": policy, "warmup": 0, "leave_alone": ()}
    neq.Controller(model, **given)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert changed_rows(model[1], optimizer.step) == [False, False, True, False]


def test_layers_that_come_later():
    layer = neq.NEqLinear(2, 3)
    layer.set_active([1])
    optimizer = neq.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    unknowing = copy.deepcopy(optimizer)
    message = "neq.optim.SGD does not know whose neurons rest: give it layers=model, or"
    for one in (optimizer, unknowing):
        assert not one.follows
        with pytest.raises(ValueError, match=message):
            one.step()
    optimizer.follow(layer)
    assert optimizer.follows
    assert changed_rows(layer, optimizer.step) == [False, True, False]
    # of other layers instead: of these it now knows nothing
    optimizer.follow([neq.NEqLinear(2, 3)])
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert changed_rows(layer, optimizer.step) == [True] * 3
    with pytest.raises(TypeError, match="layers must be a module or an iterable of modules"):
        optimizer.follow([1])
    assert len(optimizer._optimizer_step_pre_hooks) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_on_a_gpu(name, flags):
    if name == "SGD" and "capturable" in flags:
        flags = {}
    mine, dense = make_model().cuda(), make_model().cuda()
    optimizer = make(neq.optim, name, mine, flags, layers=mine)
    truth = make(torch.optim, name, dense, flags)
    freeze(mine, 0)
    before = copy.deepcopy(dict(mine.named_parameters()))
    for i in range(5):
        for model in (mine, dense):
            give_gradients(model, i)
        optimizer.step()
        truth.step()
    for (key, a), b in zip(mine.named_parameters(), dense.parameters(), strict=True):
        active = active_elements(mine)[key]
        torch.testing.assert_close(a[active], b[active], rtol=1e-12, atol=1e-14)
        assert torch.equal(a[~active], before[key][~active])
