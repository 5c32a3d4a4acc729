"""Which backend steps a parameter's active rows."""

from unittest import mock

import pytest
import torch

from neq_kernels.step import native as native_step
from neq_kernels.step import pack as pack_step
from neq_kernels.step import planner as row_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("device", "dtype", "elements", "chosen"),
    [
        ("cpu", torch.float32, 9, "native"),
        ("cpu", torch.bfloat16, 9, "pack"),
        ("cuda", torch.float32, 9, "fused"),
        ("cuda", torch.bfloat16, 9, "fused"),
        ("cuda", torch.float8_e5m2, 9, "pack"),
        ("cuda", torch.float32, 2**31, "pack"),
        ("mps", torch.float32, 9, "pack"),
    ],
    ids=str,
)
def test_chosen_backend(device, dtype, elements, chosen):
    p = mock.Mock(dtype=dtype, is_cpu=device == "cpu", is_cuda=device == "cuda")
    p.numel.return_value = elements
    assert row_step.choose(p).__name__ == f"neq_kernels.step.{chosen}"


def test_chosen_backend_of_a_transposed_matrix():
    whole, transposed = torch.ones(3, 4), torch.ones(4, 3).t()
    assert row_step.choose(transposed, transposed) is native_step
    assert row_step.choose(transposed, whole) is pack_step
    assert row_step.choose(whole, transposed) is pack_step
    assert row_step.choose(torch.ones(4, 3, 2).transpose(0, 1)) is pack_step


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cpu, is_cuda = False, True


def test_chosen_backend_on_a_gpu_of_neurons_in_many_lines():
    def shaped(*sizes, like=torch.contiguous_format):
        return torch.ones(sizes).contiguous(memory_format=like).as_subclass(OnGpu)

    whole, column_major = shaped(3, 4), shaped(4, 3).t()
    last = torch.channels_last
    convolution, its_last = shaped(3, 4, 2, 2), shaped(3, 4, 2, 2, like=last)
    transposed, transposed_last = (
        t.transpose(0, 1) for t in (shaped(4, 3, 2, 2), shaped(4, 3, 2, 2, like=last))
    )
    for p in (whole, column_major, convolution, its_last, transposed, transposed_last):
        assert row_step.choose(p, p, p).__name__ == "neq_kernels.step.fused"
    for p, state in (
        (whole, column_major),
        (column_major, whole),
        (convolution, transposed),
        (transposed, transposed_last),
        (transposed_last, its_last),
    ):
        assert row_step.choose(p, p, state) is pack_step
    apart = shaped(8, 6).t()[::2]
    assert row_step.choose(apart) is pack_step


def test_without_triton_torch_steps_on_a_gpu():
    p = mock.Mock(is_cpu=False, is_cuda=True, numel=lambda: 9)
    with mock.patch.object(row_step, "triton_is_there", return_value=False):
        assert row_step.choose(p) is pack_step
