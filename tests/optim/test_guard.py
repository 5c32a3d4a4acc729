"""Frozen means frozen: the same bits after any steps, for every optimizer in torch.optim."""

import copy
import inspect

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import neq
from neq.optim import Guard

EVERY = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
}
# it cannot train a layer: see test_sparse_adam_takes_no_dense_gradient
OPTIMIZERS = [kind for kind in EVERY.values() if kind is not torch.optim.SparseAdam]
ARGUMENTS = {kind: inspect.signature(kind).parameters for kind in OPTIMIZERS}
BY_KIND = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
VARIANTS = [
    pytest.param(kind, flags, id="-".join([kind.__name__, *flags]))
    for kind in OPTIMIZERS
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": True})
    if all(flag in ARGUMENTS[kind] for flag in flags)
]
CAPTURABLE = [kind for kind in OPTIMIZERS if "capturable" in ARGUMENTS[kind]]

# the tensors are so small that threads would only wait for each other
pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Every way in which neurons can lie in a parameter, and a tail that is not converted."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2, groups=2),
            nn.ConvTranspose2d(6, 5, 2),
            nn.LayerNorm([5, 7, 7]),
            nn.Flatten(),
            nn.Linear(245, 6),
            nn.LayerNorm(6),
            nn.RMSNorm(6),
        )
        self.tail = nn.Linear(6, 4)

    def forward(self, x):
        return self.tail(self.body(x))


def make_model(kind):
    model = Model()
    if kind is not torch.optim.LBFGS:  # which flattens gradients as views
        model.to(memory_format=torch.channels_last)
    return neq.convert(model, filter_fn=lambda module, name: name != "tail")


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, neq.NeuronLayer)]


def make_optimizer(kind, model, **flags):
    """With all that moves a parameter without a gradient, and two groups that differ in it."""
    params = [p for p in model.parameters() if kind is not torch.optim.Muon or p.dim() == 2]
    options = {"lr": 0.05, **flags}
    if "momentum" in ARGUMENTS[kind]:
        options["momentum"] = 0.9
    if kind is torch.optim.LBFGS:
        return kind(params, **options, max_iter=3)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02}]
    if "weight_decay" in ARGUMENTS[kind]:
        groups[0]["weight_decay"] = 0.1
    return kind([group for group in groups if group["params"]], **options)


def loss_of(model, x):
    # the penalty reaches frozen rows too
    return model(x).square().mean() + sum(p.square().sum() for p in model.parameters())


def step(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def freeze_some(model, seed):
    """Another mask for each layer: everything, nothing and about half of it, in turns."""
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(layers_of(model)):
        share = (0.5, 0.5, 0.0, 1.0)[(i + seed) % 4]
        layer.set_active(torch.rand(layer.n_neurons, generator=generator) < share)


def masks(model):
    """True where a parameter's element trains, for every parameter of a layer."""
    found = {}
    for layer in layers_of(model):
        active = layer.active_mask
        found[layer.weight] = layer.spread(active).expand_as(layer.weight)
        if layer.bias is not None:
            found[layer.bias] = active.view(layer.bias.shape)
    return found


def bits(t):
    return t.detach().view(torch.int32 if t.dtype == torch.float32 else torch.int64).clone()


def train(model, optimizer, steps=12, seed=0, device="cpu"):
    """Steps under changing masks. Returns how many frozen and how many active elements moved."""
    x = torch.randn(4, 3, 7, 7, device=device)
    moved = {"frozen": 0, "active": 0}
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    for i in range(steps):
        if i % 3 == 0:
            freeze_some(model, seed + i // 3)
        before = {p: bits(p) for p in stepped}
        step(model, optimizer, x)
        for p, active in masks(model).items():
            if p in stepped:
                changed = bits(p) != before[p]
                moved["frozen"] += int((changed & ~active).sum())
                moved["active"] += int((changed & active).sum())
    return moved


@pytest.mark.parametrize(("kind", "flags"), VARIANTS)
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_frozen_rows_keep_their_bits(kind, flags, on_thaw):
    model = make_model(kind)
    optimizer = make_optimizer(kind, model, **flags)
    Guard(optimizer, model, on_thaw)
    moved = train(model, optimizer)
    assert moved["frozen"] == 0
    assert moved["active"] > 100


@BY_KIND
def test_without_a_guard_they_move(kind):
    """That is, the test above can fail."""
    model = make_model(kind)
    assert train(model, make_optimizer(kind, model))["frozen"] > 100


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CAPTURABLE, ids=lambda kind: kind.__name__)
def test_capturable(kind):
    model = make_model(kind).cuda()
    optimizer = make_optimizer(kind, model, capturable=True)
    Guard(optimizer, model)
    moved = train(model, optimizer, device="cuda")
    assert moved["frozen"] == 0
    assert moved["active"] > 100


@pytest.mark.gpu
@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_nothing_waits_for_the_gpu(on_thaw):
    model = make_model(torch.optim.SGD).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Guard(optimizer, model, on_thaw)
    freeze_some(model, 0)
    loss_of(model, torch.randn(4, 3, 7, 7, device="cuda")).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sparse_adam_takes_no_dense_gradient():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        torch.optim.SparseAdam([p]).step()


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_grad_scaler_that_skips_steps(flags):
    model = make_model(torch.optim.AdamW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **flags)
    Guard(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x = torch.randn(4, 3, 7, 7)
    for i in range(6):
        freeze_some(model, i // 2)
        before = {p: bits(p) for p in model.parameters()}
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        if i % 2:
            model.tail.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        for p, active in masks(model).items():
            assert torch.equal(bits(p)[~active], before[p][~active])
        assert torch.equal(bits(model.tail.weight), before[model.tail.weight]) == bool(i % 2)


def test_a_layer_frozen_entirely_is_not_stepped():
    """As under DDP, which gives it gradients of zero."""
    layer = neq.NEqLinear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    Guard(optimizer, [layer])
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    layer.set_active([])
    layer.weight.grad, layer.bias.grad = zeros = torch.zeros(2, 3), torch.zeros(2)
    before = bits(layer.weight)
    with Operations() as seen:
        optimizer.step()
    assert seen.elements == 0
    assert torch.equal(bits(layer.weight), before)
    assert layer.weight.grad is zeros[0]
    assert layer.bias.grad is zeros[1]
    assert str(optimizer.state_dict()["state"]) == str(state)


def test_a_parameter_without_a_gradient():
    layer = neq.NEqLinear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, [layer])
    layer.set_active([1])
    layer.bias.grad = torch.ones(2)
    before = bits(layer.weight), bits(layer.bias)
    optimizer.step()
    assert layer.weight.grad is None
    assert torch.equal(bits(layer.weight), before[0])
    assert torch.equal(bits(layer.bias) != before[1], torch.tensor([False, True]))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_that_makes_the_first_gradients(kind):
    layer = neq.NEqLinear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1)
    Guard(optimizer, [layer])
    for rows in ([1], []):
        layer.set_active(rows)
        optimizer.zero_grad()
        before = bits(layer.weight)

        def closure():
            optimizer.zero_grad()
            loss = (layer.weight - 3).square().sum()
            loss.backward()
            return loss

        for call in (lambda c: optimizer.step(c), lambda c: optimizer.step(closure=c)):
            call(closure)
            frozen = ~layer.active_mask
            assert torch.equal(bits(layer.weight)[frozen], before[frozen])


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_embedding_that_shares_the_heads_weight(flags):
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    model = neq.convert(nn.Sequential(embedding, head))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **flags)
    Guard(optimizer, model)
    head.set_active([1, 2, 3])
    before = bits(head.weight)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(10)).square().sum().backward()
        assert head.weight.grad[5].abs().sum() > 0  # the embedding's gradient stays whole
        optimizer.step()
    changed = (bits(head.weight) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2, 3]


STARTS = {(torch.optim.Rprop, "step_size"): 0.05, (torch.optim.Adagrad, "sum"): 0.25}


def rows_of_state(optimizer, layer):
    """What the optimizer's state holds for each of the layer's neurons."""
    state = optimizer.state.get(layer.weight, {})
    n = layer.n_neurons
    return {k: t for k, t in state.items() if isinstance(t, torch.Tensor) and t.shape[:1] == (n,)}


def prepared(kind, on_thaw):
    """A linear layer, stepped twice, then twice with rows 1 and 4 frozen."""
    layer = neq.NEqLinear(3, 5, bias=False)
    options = {"momentum": 0.9} if "momentum" in ARGUMENTS[kind] else {}
    if kind is torch.optim.Adagrad:
        options["initial_accumulator_value"] = 0.25
    if "weight_decay" in ARGUMENTS[kind]:
        options["weight_decay"] = 0.1
    optimizer = kind([layer.weight], lr=0.05, **options)
    Guard(optimizer, [layer], on_thaw)
    push(layer, optimizer, 2)
    left = {key: t.clone() for key, t in rows_of_state(optimizer, layer).items()}
    layer.set_active([0, 2, 3])
    push(layer, optimizer, 2)
    return layer, optimizer, left


def push(layer, optimizer, steps):
    for _ in range(steps):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()


BY_ROW = [kind for kind in OPTIMIZERS if kind is not torch.optim.LBFGS]


@pytest.mark.parametrize("kind", BY_ROW, ids=lambda kind: kind.__name__)
def test_keep_lets_time_stand_still(kind):
    layer, optimizer, left = prepared(kind, "keep")
    assert left
    for key, t in rows_of_state(optimizer, layer).items():
        assert torch.equal(bits(t)[[1, 4]], bits(left[key])[[1, 4]]), key
        assert kind is torch.optim.ASGD or not torch.equal(t[[0, 2, 3]], left[key][[0, 2, 3]]), key


@pytest.mark.parametrize("kind", BY_ROW, ids=lambda kind: kind.__name__)
def test_reset_gives_thawed_rows_what_a_new_optimizer_has(kind):
    layer, optimizer, left = prepared(kind, "reset")
    assert left
    for key, t in rows_of_state(optimizer, layer).items():
        assert torch.all(t[[1, 4]] == STARTS.get((kind, key), 0.0)), key
    layer.set_active([])  # entirely frozen: hidden from the optimizer, and reset all the same
    push(layer, optimizer, 1)
    for key, t in rows_of_state(optimizer, layer).items():
        assert torch.all(t == STARTS.get((kind, key), 0.0)), key


def test_reset_holds_for_a_state_that_is_loaded_later():
    layer, optimizer, _ = prepared(torch.optim.Adam, "reset")
    dirty = copy.deepcopy(optimizer.state_dict())
    dirty["state"][0]["exp_avg"].fill_(7.0)
    layer.set_active([])
    push(layer, optimizer, 1)
    optimizer.load_state_dict(dirty)
    push(layer, optimizer, 1)
    assert torch.all(optimizer.state[layer.weight]["exp_avg"] == 0)


@pytest.mark.parametrize("on_thaw", ["keep", "reset"])
def test_state_that_begins_while_rows_are_frozen(on_thaw):
    """Weight decay would put the weight itself into the momentum of the frozen rows."""
    layer = neq.NEqLinear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    Guard(optimizer, [layer], on_thaw)
    layer.set_active([1])
    push(layer, optimizer, 1)
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    assert torch.all(momentum[0] == 0)
    assert torch.all(momentum[1] != 0)


def lbfgs(layer, loss=torch.square):
    """The guarded optimizer's step, as a function."""
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=2)
    Guard(optimizer, [layer])

    def closure():
        optimizer.zero_grad()
        total = loss(layer(torch.ones(1, 3))).sum()
        total.backward()
        return total

    return optimizer, lambda: optimizer.step(closure)


def test_lbfgs_starts_anew_when_other_neurons_train():
    layer = neq.NEqLinear(3, 4)
    optimizer, step = lbfgs(layer)
    iterations = []
    for rows in (None, [0, 1], [1, 0], [0, 1, 2], None):
        layer.set_active(rows)
        step()
        iterations.append(optimizer.state[layer.weight]["n_iter"])
    assert iterations == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("masks", [(None, [0, 1]), ([0, 1], [0, 1]), ([0, 1], None)], ids=str)
def test_lbfgs_resumes_where_other_neurons_begin_to_train(masks):
    """What is saved lies between the change of the mask and the step that starts anew."""
    layer, resumed = neq.NEqLinear(3, 4), neq.NEqLinear(3, 4)
    (optimizer, step), (other, resumed_step) = lbfgs(layer, torch.exp), lbfgs(resumed, torch.exp)
    layer.set_active(masks[0])
    step()
    layer.set_active(masks[1])
    resumed.load_state_dict(layer.state_dict())
    resumed.set_active(masks[1])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step()
        resumed_step()
    assert torch.equal(layer.weight, resumed.weight)
    iterations = optimizer.state[layer.weight]["n_iter"]
    assert iterations == other.state[resumed.weight]["n_iter"]
    assert iterations == (3 if masks[0] == masks[1] else 2)


class Operations(TorchDispatchMode):
    """Counts the elements that operations write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        written = args[3] if func is torch.ops.aten.index_copy_.default else out
        if isinstance(written, torch.Tensor) and func is not torch.ops.aten.slice.Tensor:
            self.elements += written.numel()
        return out


def test_the_cost_is_that_of_the_frozen_rows():
    layer = neq.NEqLinear(100, 64, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    guard = Guard(optimizer, [layer])
    push(layer, optimizer, 1)

    def cost():
        with Operations() as seen:
            guard._before(optimizer, (optimizer,), {})
            guard._after(optimizer, (optimizer,), {})
        return seen.elements

    assert cost() == 0
    for frozen in (1, 10, 40, 64):
        layer.set_active(torch.arange(frozen, 64))
        # weights and momentum, there and back; where all is frozen, nothing
        assert cost() == (4 * frozen * 100 if frozen < 64 else 0)


def test_values_written_by_others_are_kept():
    """What a frozen row holds is its value before the step, not one from some time ago."""
    layer = neq.NEqLinear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    Guard(optimizer, [layer])
    layer.set_active([0])
    push(layer, optimizer, 1)
    loaded = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}
    layer.load_state_dict(loaded)
    push(layer, optimizer, 1)
    assert torch.equal(layer.weight[1:], loaded["weight"][1:])
    assert not torch.equal(layer.weight[0], loaded["weight"][0])


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
        torch.nn.utils.weight_norm,
    ],
    ids=["prune", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_weight_computed_from_other_parameters(compute):
    layer = neq.NEqLinear(3, 4)
    compute(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, [layer])
    layer.set_active([2])
    before = [bits(p) for p in layer.parameters()]
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for p, b in zip(layer.parameters(), before, strict=True):
        changed = (bits(p) != b).view(4, -1).any(1)
        assert changed.tolist() == [False, False, True, False]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_parameter_that_is_no_neurons_own_trains():
    layer = torch.nn.utils.weight_norm(neq.NEqLinear(3, 4), dim=None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, [layer])
    layer.set_active([2])
    scale = bits(layer.weight_g)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(bits(layer.weight_g), scale)


def test_conversion_after_the_guard_and_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    Guard(optimizer, model)
    neq.convert(model)
    model[0].set_active([2])
    for converted in (True, False):
        if not converted:
            neq.revert(model)
        before = bits(model[0].weight)
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        changed = (bits(model[0].weight) != before).any(1).tolist()
        assert changed == ([False, False, True, False] if converted else [True] * 4)


def test_other_parameters_are_left_alone():
    """Two optimizers over one model, each with its own guard."""
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model]
    for optimizer in optimizers:
        Guard(optimizer, model)
    model[0].set_active([0])
    model[1].set_active([1])
    model(torch.ones(1, 3)).sum().backward()
    before = [bits(layer.weight) for layer in model]
    optimizers[1].step()
    assert torch.equal(bits(model[0].weight), before[0])
    optimizers[0].step()
    assert (bits(model[0].weight) != before[0]).any(1).tolist() == [True, False, False, False]
    assert (bits(model[1].weight) != before[1]).any(1).tolist() == [False, True]


def test_remove():
    layer, optimizer, _ = prepared(torch.optim.SGD, "keep")
    guard = Guard(optimizer, [layer])
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    guard.remove()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks[0] - 1
    assert len(optimizer._optimizer_step_post_hooks) == hooks[1] - 1


def test_bad_arguments():
    layer = neq.NEqLinear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    with pytest.raises(
        TypeError, match=r"optimizer must be a torch.optim.Optimizer, got NEqLinear"
    ):
        Guard(layer, optimizer)
    with pytest.raises(ValueError, match="on_thaw must be 'keep' or 'reset', got 'melt'"):
        Guard(optimizer, layer, "melt")
    with pytest.raises(TypeError, match=r"layers must be .* got Parameter among them"):
        Guard(optimizer, layer.parameters())


def test_a_parameter_shared_by_layers_that_decide_apart():
    a, b = neq.NEqLinear(3, 2), neq.NEqLinear(3, 2)
    a.layer_name, b.layer_name = "encoder", "decoder"
    b.weight = a.weight
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1)
    Guard(optimizer, [a, b])
    optimizer.step()  # all of it trains: there is nothing to disagree on
    a.set_active([0])
    with pytest.raises(ValueError, match="'encoder' and 'decoder' share a weight but not"):
        optimizer.step()


class Shrinking(torch.optim.SGD):
    """Of those that change the weights around the step of torch's class, which calls hooks too."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.mul_(0.5)


@pytest.mark.parametrize("rows", [[1], []], ids=str)
def test_an_optimizer_derived_from_an_optimizer(rows):
    layer = neq.NEqLinear(3, 4)
    torch.optim.SGD(layer.parameters(), lr=0.1)  # from here on torch's own step calls hooks
    optimizer = Shrinking([layer.weight], lr=0.1, momentum=0.9)
    guard = Guard(optimizer, layer)
    layer.set_active(rows)
    for _ in range(3):
        layer.weight.grad = gradient = torch.ones(4, 3)
        before = bits(layer.weight)
        optimizer.step()
        changed = (bits(layer.weight) != before).any(1)
        assert changed.nonzero().flatten().tolist() == rows
        assert layer.weight.grad is gradient
    assert not guard._under_way


def test_steps_that_fail_leave_no_heap_behind():
    layer = neq.NEqLinear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    guard = Guard(optimizer, layer)
    layer.set_active([1])

    def fail():
        raise ArithmeticError

    for _ in range(50):
        with pytest.raises(ArithmeticError):
            optimizer.step(fail)
    assert len(guard._under_way) < 10
    before = bits(layer.weight)
    push(layer, optimizer, 2)
    assert (bits(layer.weight) != before).any(1).tolist() == [False, True, False, False]


class Lookahead(torch.optim.Optimizer):
    """Of those that move the weights themselves after another optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.5)


def test_an_optimizer_around_an_optimizer():
    layer = neq.NEqLinear(3, 4)
    layer.set_active([1])
    optimizer = Lookahead(torch.optim.SGD(layer.parameters(), lr=0.1))
    Guard(optimizer, layer)
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert (before != layer.weight).any(1).tolist() == [False, True, False, False]
