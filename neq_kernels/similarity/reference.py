"""What ``row_similarity`` means, in plain torch. Every test compares with it."""

import torch
from torch import Tensor


def row_similarity(current: Tensor, previous: Tensor, channel_dim: int, per_sample: bool) -> Tensor:
    """⟨y, y'⟩, |y|² and |y'|² of each neuron's outputs y and y'.

    Args:
        current: y, of any shape.
        previous: y', in the same shape.
        channel_dim: The dimension that counts the n neurons.
        per_sample: Sum over each sample (dimension 0) by itself.

    Returns:
        float64 [3, n], or [3, samples, n] if ``per_sample``.

    Examples:
        >>> current = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # 2 samples, 2 neurons
        >>> previous = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> neq_kernels.row_similarity(current, previous, 1, False)
        tensor([[ 4.,  4.],
                [10., 20.],
                [ 2.,  1.]], dtype=torch.float64)
    """
    y, y_ = current.double().movedim(channel_dim, -1), previous.double().movedim(channel_dim, -1)
    start = 1 if per_sample else 0
    products = (y * y_, y * y, y_ * y_)
    return torch.stack([p.unsqueeze(start).flatten(start, -2).sum(start) for p in products])
