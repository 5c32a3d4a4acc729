"""What ``row_similarity`` means, in plain torch: the truth for every test."""

import torch
from torch import Tensor


def row_similarity(current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool) -> Tensor:
    """⟨y, y'⟩, |y|² and |y'|² of each neuron, over all that is not the channel; float64 [3, n].

    Or over one sample (dimension 0) at a time: [3, samples, n].
    """
    y, y_ = current.double().movedim(channel_dim, -1), previous.double().movedim(channel_dim, -1)
    start = 1 if per_sample else 0
    products = (y * y_, y * y, y_ * y_)
    return torch.stack([p.unsqueeze(start).flatten(start, -2).sum(start) for p in products])
