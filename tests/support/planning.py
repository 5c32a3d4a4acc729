"""Problems for the planner, and what it is told of them."""

import json
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from neq_kernels.device import names as machine
from neq_kernels.wgrad import planner, tables
from tests.support.cases import FLOAT32, conv_case, linear_case
from tests.support.checks import meta, problem_of

LINEAR = linear_case((64,), 8, 32, range(8))
CONV = conv_case((4, 8, 10, 10), (3, 3), 32, range(8), padding=1)


@contextmanager
def processor(maker, capability):
    """Inside, the cost models are those of this CPU."""
    with (
        mock.patch.object(machine, "cpu_maker", return_value=maker),
        mock.patch("torch.backends.cpu.get_cpu_capability", return_value=capability),
    ):
        yield


def choose(case, dtypes=FLOAT32, device="cpu"):
    """The planner's choice."""
    args = meta(case.args(dtypes)) if device == "meta" else case.args(dtypes)
    dy, x, weight, order, count, bias, *_ = args
    sizes = x, weight, len(order), int(count), bias, case.conv
    return planner.choose(*sizes) or planner._measure(
        dy, x, weight, order, int(count), bias, case.conv
    )


def measure(case, backend, granule=1):
    """As if tuning had found this backend to be the fastest here."""
    table = planner._measured.setdefault(machine.name(torch.device("cpu")), {})
    problem = replace(problem_of(case.op, *case.args()), granule=granule)
    table.setdefault(problem.key, {})[problem.samples] = backend


def ship(case, backend, device=None):
    """As if a table that says so were part of the package."""
    device = device or machine.name(torch.device("cpu"))
    tables.FOLDER.mkdir(exist_ok=True)
    problem = problem_of(case.op, *case.args())
    table = {device: {problem.key: {problem.samples: backend}}}
    (tables.FOLDER / f"{machine.slug(device)}.json").write_text(json.dumps(table))


def of_samples(samples):
    return linear_case((samples,), 8, 32, range(8))
