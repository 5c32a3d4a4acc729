"""Tables in text, for what users print."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], right: range) -> str:
    """One line for each row; the columns in ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def si(x: float) -> str:
    """A number with three digits or so and the prefix of its unit, which comes next."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.2f} {unit}"
    return f"{x:.0f} "
