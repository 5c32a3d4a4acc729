"""What a device is called."""

from unittest import mock

import pytest

from neq_kernels.device import names


@pytest.fixture(autouse=True)
def fresh():
    for ask in (names.cpu, names.cpu_maker):
        ask.cache_clear()
    yield
    for ask in (names.cpu, names.cpu_maker):
        ask.cache_clear()


@pytest.mark.parametrize(
    ("told", "maker"), [("GenuineIntel", "Intel"), ("AuthenticAMD", "AMD"), ("Other", "Other")]
)
def test_a_cpu_and_its_maker(told, maker):
    text = f"processor : 0\nvendor_id\t: {told}\nmodel name\t: Some CPU\n"
    with mock.patch("pathlib.Path.read_text", return_value=text):
        assert (names.cpu(), names.cpu_maker()) == ("Some CPU", maker)


def test_a_system_that_does_not_tell():
    with mock.patch("pathlib.Path.read_text", side_effect=OSError):
        assert names.cpu_maker() == ""
        assert names.cpu()
