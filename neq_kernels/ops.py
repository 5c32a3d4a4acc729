"""The five operators, and where each is: a folder for each family.

In a family, ``ops.py`` holds schema, checks and fake, ``reference.py`` the meaning, ``planner.py``
the choice of a backend. Each other file is a backend; ``fused_kernels.py`` holds what ``fused.py``
launches.
"""

from neq_kernels.similarity.ops import row_similarity
from neq_kernels.step.ops import adamw_rows_, sgd_rows_
from neq_kernels.wgrad.ops import conv_wgrad, linear_wgrad

__all__ = ["adamw_rows_", "conv_wgrad", "linear_wgrad", "row_similarity", "sgd_rows_"]
