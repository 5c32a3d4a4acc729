"""The five operators, from a folder for each family.

In a family, ``ops.py`` holds schemas, checks and fakes, ``reference.py`` the meaning, and
``planner.py`` the choice of a backend. The backends are ``in_torch``, ``pack``, ``dense``,
``native``, ``narrow`` and ``grouped``; ``*_kernels.py`` hold Triton kernels.
"""

from neq_kernels.similarity.ops import row_similarity
from neq_kernels.step.ops import adamw_rows_, sgd_rows_
from neq_kernels.wgrad.ops import conv_wgrad, linear_wgrad

__all__ = ["adamw_rows_", "conv_wgrad", "linear_wgrad", "row_similarity", "sgd_rows_"]
