"""Tables of text for terminals; what is in them is the results' business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a table, its head first, columns as wide as their widest cell.

    Args:
        rows: at least one, with the same keys in each: the head.
    """
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
