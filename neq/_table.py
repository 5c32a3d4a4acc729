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
