"""What the CUDA bindings do before and after a kernel, without a GPU: the kernels run on the CPU."""

import pytest
import torch


@pytest.fixture
def cuda(cuda_on_host):
    """Three devices, which share the CPU's memory."""
    cuda_on_host.set_device(0)
    cuda_on_host.used()
    yield cuda_on_host
    cuda_on_host.set_device(0)


def pack_columns(cuda, device, stream=0):
    dy, rows = torch.arange(12.0).reshape(2, 6), torch.tensor([1, 4])
    packed, scratch = torch.empty(2, 2), torch.empty(0, dtype=torch.uint8)
    cuda.cuda_pack_columns(dy, rows, packed, None, scratch, device, stream)
    assert torch.equal(packed, dy[:, rows])


@pytest.mark.parametrize("current", [0, 1, 2])
@pytest.mark.parametrize("device", [0, 1, 2])
def test_kernels_run_on_the_device_of_their_tensors(cuda, current, device):
    """And the calling thread's device is afterwards what it was."""
    cuda.set_device(current)
    pack_columns(cuda, device, stream=7)
    assert cuda.used() == [(device, 7)]
    assert cuda.current_device() == current


def test_a_device_that_is_not_there(cuda):
    cuda.set_device(1)
    with pytest.raises(RuntimeError, match="pack_columns on CUDA: invalid device ordinal"):
        pack_columns(cuda, 3)
    assert cuda.used() == []
    assert cuda.current_device() == 1
