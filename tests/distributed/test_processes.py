"""Several processes: no stall, and a single process's gradients and parameters."""

import pytest

from tests.support import processes

SECONDS = 240
MODULES = "sending", "sharded", "replicated"


@pytest.mark.parametrize(
    ("module", "world"),
    [("ranks", 2), *((module, world) for module in MODULES for world in (2, 4))],
    ids=str,
)
def test_every_scenario(module, world, tmp_path):
    """One test for all: see ``SCENARIOS`` of the module."""
    failed = processes.failures(f"tests.support.{module}", world, tmp_path, SECONDS)
    assert not failed, "\n".join(f"{key}:\n{result}" for key, result in failed.items())
