"""What the five operators mean, in plain torch, under their names."""

from neq_kernels.similarity.reference import row_similarity
from neq_kernels.step.reference import adamw_rows_, sgd_rows_
from neq_kernels.wgrad.reference import active_mask, conv_wgrad, linear_wgrad

__all__ = [
    "active_mask",
    "adamw_rows_",
    "conv_wgrad",
    "linear_wgrad",
    "row_similarity",
    "sgd_rows_",
]
