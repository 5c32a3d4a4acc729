"""What all operators have in common."""

import pytest
import torch

from neq_kernels import ops


@pytest.mark.parametrize("name", ops.__all__)
def test_no_compiler_captures_what_depends_on_the_number_of_active_neurons(name):
    """A CUDA graph would replay the launches of one mask for all others."""
    operator = getattr(ops, name)
    depends = {argument.name for argument in operator._schema.arguments} & {"count", "counts"}
    assert (torch.Tag.cudagraph_unsafe in operator.tags) == bool(depends)
    assert bool(depends) == (name != "row_similarity")
