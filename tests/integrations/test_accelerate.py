"""A Controller for accelerate."""

import pytest

from tests.support.trainers import accelerate_parts, bits


@pytest.mark.parametrize(("cut", "options"), [(8, {}), (6, {}), (7, {"every": 3})])
def test_resumes_with_the_same_bits(cut, options, tmp_path):
    whole, resumed = accelerate_parts(tmp_path, cut, **options)
    assert bits(whole) == bits(resumed)


@pytest.mark.filterwarnings("ignore:neq.compact", "ignore:.* more than the capacity")
@pytest.mark.parametrize(("cut", "options"), [(8, {}), (7, {"every": 3})])
def test_a_compact_model_resumes_with_the_same_bits(cut, options, tmp_path):
    whole, resumed = accelerate_parts(tmp_path, cut, compact=True, **options)
    assert whole[0].active_weight.shape == (18, 8)
    assert bits(whole) == bits(resumed)
