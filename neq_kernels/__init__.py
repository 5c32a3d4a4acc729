"""Weight gradients for the active rows of a layer only.

Importing this package registers the ``neq::`` operators. It knows nothing of training: which rows
are active is the caller's business.
"""

from neq_kernels import ops, reference
from neq_kernels.ops import conv_wgrad, linear_wgrad, row_similarity
from neq_kernels.wgrad import planner

__all__ = ["conv_wgrad", "linear_wgrad", "ops", "planner", "reference", "row_similarity"]
