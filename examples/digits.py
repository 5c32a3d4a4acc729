"""scikit-learn's digits, for the examples that train on them."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Data = dict[str, tuple[Tensor, Tensor]]  # images [n, 64] from 0 to 1 and labels [n], by part


def load(seed: int, **ends: float) -> Data:
    """Parts of the data, drawn anew for each seed. ends: the share of all at which each ends."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts, start = {}, 0
    for name, share in ends.items():
        end = int(share * len(x))
        parts[name] = x[order[start:end]], y[order[start:end]]
        start = end
    return parts
