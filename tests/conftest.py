import shutil
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

from neq_kernels.step import pack as pack_step
from neq_kernels.step import planner as row_step
from neq_kernels.wgrad import planner, tables

settings.register_profile("few", max_examples=10)  # where each may compile a kernel

_COMPILED_BY_NVCC = ["kernels/*/test_cuda_compile.py", "kernels/*/test_cuda_launches.py"]
_RECORDED = ["kernels/test_launches.py", "kernels/*/test_cuda_launches.py"]
_RECORDED += ["bench/test_launch_overhead.py"]
_OF_TRITON = ["kernels/test_interpreter.py", *_RECORDED]
_OF_TRITON += ["kernels/*/test_fused*.py", "kernels/*/test_grouped*.py", *_COMPILED_BY_NVCC]

collect_ignore_glob = [] if shutil.which("nvcc") else [*_COMPILED_BY_NVCC]
if find_spec("triton") is None:
    collect_ignore_glob += _OF_TRITON
elif torch.cuda.is_available():
    # the GPU itself runs the kernels, by its own driver; and Triton 3.6 does not interpret beside
    # numpy 2.4
    collect_ignore_glob += ["kernels/test_interpreter.py", *_RECORDED]


def pytest_report_header():
    """No proof is left out silently."""
    return [f"left out here: {name}" for name in collect_ignore_glob]


def pytest_collection_modifyitems(config, items):
    """Without a GPU, tests marked gpu are deselected: they don't exist there."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """What torch allocates and nothing writes is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    # only warn: cuBLAS wants an environment variable first, to be deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def cuda_on_host(pytestconfig, tmp_path_factory):
    """The CUDA kernels, compiled for the CPU: once for all workers, and for later runs."""
    from tests.support.cuda_on_host import build

    cache = getattr(pytestconfig, "cache", None)  # a plugin that can be left out
    kind = "cuda_on_host"
    return build(cache.mkdir(kind) if cache else tmp_path_factory.mktemp(kind))


@pytest.fixture
def threads():
    """Sets how many threads there are."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For tiny problems, where a second thread only waits, and does so busily."""
    threads(1)


@pytest.fixture(params=["compiled", "packed"])
def step_backend(request, monkeypatch):
    """What steps active rows on a CPU."""
    if request.param == "packed":
        monkeypatch.setattr(row_step, "choose", lambda *tensors: pack_step)
    return request.param


@pytest.fixture
def fresh_planner(monkeypatch, tmp_path):
    """A planner that has met no problem yet and finds no table."""
    monkeypatch.setattr(planner, "_choices", {})
    monkeypatch.setattr(planner, "_measured", {})
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "tables")
    tables.shipped.cache_clear()
    yield
    tables.shipped.cache_clear()
