"""Small runs of examples/airbench.py, and what their weights are."""

import torch

from examples.airbench_settings import Settings

TINY = Settings(width=0.125, images=80, evaluated=40, batch=20, epochs=5)


def weights(run):
    return {name: t.clone() for name, t in run.model.state_dict().items()}


def same(run, before, *parts):
    now = run.model.state_dict()
    return all(torch.equal(now[name], before[name]) for name in now if name.startswith(parts))
