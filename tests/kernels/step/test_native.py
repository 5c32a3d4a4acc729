"""What the CPU's own kernels of steps refuse."""

import pytest
import torch

from neq_kernels import ops
from neq_kernels.device import extension as compiled
from neq_kernels.step import native as native_step
from tests.support.steps import lr, sgd_arguments

if compiled.why_not("cpu"):
    raise RuntimeError(compiled.why_not("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")


def test_any_number_of_threads_gives_the_same_bits(threads):
    results = []
    for number in (1, 2, 3):
        threads(number)
        torch.manual_seed(1)
        p, g, m = (torch.randn(301, 200) for _ in range(3))
        ops.sgd_rows_([p], [g], [m], [torch.randperm(301)], [torch.tensor(290)], lr(0.1), 0.9, 0.0,
                      0.1, True, False, False)  # fmt: skip
        results.append(p)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_kernel_refuses_rows_beyond_the_parameter():
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 4\), got 4"):
        ops.sgd_rows_(*sgd_arguments(orders=[torch.tensor([0, 4, 1, 2])]))


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
