"""That `make sanitize` tests the extension that the sanitizers watch, not the one beside it."""

from pathlib import Path

from neq_kernels.device import extension
from tests.support import ROOT


def test_a_sanitizer_sees_the_extension():
    """A process into which the sanitizer is loaded tests an extension that calls it."""
    assert extension.why_not("cpu") is None
    calls_it = b"__asan_init" in Path(extension._C.__file__).read_bytes()
    loaded = "/libasan.so" in Path("/proc/self/maps").read_text()
    assert calls_it == loaded, extension._C.__file__


def test_make_sanitize_asks():
    recipe = (ROOT / "Makefile").read_text().split("\nsanitize:")[1].split("\n\n")[0]
    assert Path(__file__).relative_to(ROOT).as_posix() in recipe.split()
