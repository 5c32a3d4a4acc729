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
        ops.sgd_rows_(*sgd_arguments(rows=[torch.tensor([0, 4, 1, 2])]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "a list must be one tensor for each of 1 parameters, got 0"),
        ({"momentum_buffers": [torch.ones(4, 3)] * 2}, "a list must be one tensor .*, got 2"),
        ({"grads": [torch.ones(3, 4).t()]}, "gradient and state must be like their parameter in"),
        ({"grads": [torch.ones(4, 4)]}, "gradient and state must be like their parameter"),
        ({"grads": [torch.ones(4, 3).double()]}, "gradient and state must be like their parameter"),
        ({"momentum": 0.5}, "momentum_buffers must be given with momentum"),
        (
            {"params": [torch.ones(4, 6)[:, ::2]], "grads": [torch.ones(4, 6)[:, ::2]]},
            "a parameter must be in memory neuron by neuron, or transposed",
        ),
        ({"params": [torch.tensor(1.0)]}, "dimensions of a parameter must be at least 1, got 0"),
        ({"rows": [torch.arange(5)]}, "rows must be one for each neuron, got 5"),
        ({"rows": [torch.arange(4).int()]}, "rows must be contiguous int64 of one dimension"),
        ({"counts": [torch.tensor(5)]}, "count must be between 0 and neurons = 4, got 5"),
        ({"counts": [torch.tensor([2, 2])]}, "a tensor must have one value"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_the_kernel_refuses_what_it_would_misread(change, message):
    p, g = torch.ones(4, 3), torch.ones(4, 3)
    lists = {"params": [p], "grads": [g], "momentum_buffers": []}
    lists |= {"rows": [torch.arange(4)], "counts": [torch.tensor(2)]}
    numbers = {"lr": 0.5, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    flags = dict.fromkeys(("nesterov", "maximize", "first"), False) | {"threads": 1}
    with pytest.raises(ValueError, match=message):
        native_step._C.cpu_sgd_rows(**lists | numbers | flags | change)
    assert p.eq(1).all()


def test_the_kernel_refuses_adamw_without_moments():
    p, rows, counts = [torch.ones(4, 3)], [torch.arange(4)], [torch.tensor(2)]
    numbers = 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1
    with pytest.raises(ValueError, match="moments must be one of each for each parameter, got 0"):
        native_step._C.cpu_adamw_rows(p, p, [], [], [], counts, rows, counts, *numbers)
