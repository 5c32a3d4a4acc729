"""Weight gradients, similarities and optimizer steps for the active neurons of a layer only.

Importing this package registers the ``neq::`` operators. It knows nothing of training: the caller
chooses which neurons are active.
"""

from neq_kernels import ops, reference
from neq_kernels.ops import adamw_rows_, conv_wgrad, linear_wgrad, row_similarity, sgd_rows_
from neq_kernels.wgrad import planner

__all__ = [
    "adamw_rows_",
    "conv_wgrad",
    "linear_wgrad",
    "ops",
    "planner",
    "reference",
    "row_similarity",
    "sgd_rows_",
]
