import logging
import warnings

import pytest


@pytest.fixture(autouse=True)
def quiet(one_thread):
    """Libraries that say a lot, and models too small for two threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!neq).*")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)
