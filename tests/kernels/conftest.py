import pytest

from tests.support.interpreter import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def addresses_are_checked():
    """In Triton's interpreter: of every lane that is not masked."""
    if not INTERPRETED:
        yield
        return
    from tests.support import addresses

    with addresses.checked():
        yield
