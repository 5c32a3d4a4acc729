import pytest

from tests.support.interpreter import INTERPRETED

# test_interpreter.py runs it, in the interpreter that it is about
collect_ignore = [] if INTERPRETED else ["test_addresses.py"]


@pytest.fixture(autouse=True, scope="session")
def addresses_are_checked():
    """In Triton's interpreter: of every lane that is not masked."""
    if not INTERPRETED:
        yield
        return
    from tests.support import addresses

    with addresses.checked():
        yield


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """The driver that records launches, in place of CUDA's."""
    from tests.support.recording_cuda import build

    return build(tmp_path_factory.mktemp("recording"))
