"""Does it pay to keep a prefix's outputs? The room they take, and the time they save."""

import os
import shutil
from pathlib import Path

_MEASURED = 4  # batches, of which the first is slow


class Costs:
    """Seconds per sample of the prefix's forward, and of writing and reading its output.

    Each is the fastest of some batches.

    Args:
        views: In how many views a sample comes.
        epochs: How many passes through the loader there will be; None if that is not known.
    """

    def __init__(self, views: int, epochs: int | None) -> None:
        self.views, self.epochs = views, epochs
        self.passes = 0  # that have been started
        self.forget()

    def forget(self) -> None:
        """The prefix is another one."""
        self._measured: list[tuple[float, float, float]] = []

    @property
    def open(self) -> bool:
        """Is there something still to measure?"""
        return len(self._measured) < _MEASURED

    def add(self, prefix: float, write: float, read: float) -> None:
        """The seconds per sample of one batch."""
        self._measured.append((prefix, write, read))

    def refusal(self) -> str | None:
        """Why it does not pay, with its arithmetic; None if it does, or is not known yet."""
        if self.open:
            return None
        prefix, write, read = map(min, zip(*self._measured, strict=True))
        text = (
            "it would not pay to keep the prefix's outputs: for a sample its forward takes "
            f"{_ms(prefix)}, to write its output {_ms(write)}, to find and read it {_ms(read)}"
        )
        if self.epochs is None:
            return None if read < prefix else text
        left = max(0, self.epochs - self.passes + 1)
        written = self.views * (1 - (1 - 1 / self.views) ** left)
        saved, spent = (left - written) * (prefix - read), written * write
        if saved > spent:
            return None
        return (
            f"{text}; in the {left} epochs left it is written {written:.1f} times and read "
            f"{left - written:.1f} times, which saves {_ms(saved)} and costs {_ms(spent)}"
        )


def too_large(size: int, count: str, limit: int | None, directory: Path | None) -> str | None:
    """Why there is no room, with its arithmetic; None if there is.

    Args:
        size: How many bytes the outputs take.
        count: What of, in words.
        limit: How many there may be; None for half of what is free.
        directory: Where; None for memory.
    """
    where = "memory" if directory is None else f"space in {directory}"
    allowed = "limit"
    if limit is None:
        limit = (free_memory() if directory is None else shutil.disk_usage(directory).free) // 2
        allowed = f"half of the free {where}"
    if size <= limit:
        return None
    return (
        f"there is no room to keep the prefix's outputs: {count} take {_gb(size)}, {allowed} is "
        f"{_gb(limit)}; give a higher limit, a directory on a larger disk, or fewer views"
    )


def free_memory() -> int:
    """How many bytes of main memory a process can still get, as far as the system says."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = Path("/proc/meminfo")
    if not known.exists():
        return pages
    lines = (line.split() for line in known.read_text().splitlines())
    free = next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), pages)
    group = Path("/sys/fs/cgroup")  # of a container
    try:
        limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
    except (OSError, ValueError):  # none, or no limit
        return free
    return min(free, limit - used)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
