import pytest
import torch

from examples.airbench_settings import Where
from examples.cifar_data import load


@pytest.fixture
def where(tmp_path):
    """Where runs of examples/airbench.py write."""
    return Where(tmp_path, tmp_path / "pretrained", torch.device("cpu"))


@pytest.fixture(scope="module")
def data():
    """Made-up images."""
    return load(None, 1000, 40)
