"""neq.cost.units: by which clock times are taken."""

import time

import pytest
import torch

from neq.cost.units import clock_of


@pytest.mark.parametrize(("threads", "its_own"), [(1, True), (2, False)])
def test_other_programs_add_to_no_time_of_one_thread(monkeypatch, threads, its_own):
    """The processor's time stands still while another program has the core; the clock's runs on."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    clock = clock_of(torch.device("cpu"))
    start = clock()
    time.sleep(0.05)
    assert (clock() - start < 0.04) == its_own
    assert clock_of(torch.device("cuda")) is time.perf_counter
