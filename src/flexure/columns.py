"""Tables of text for terminals; what is in them is the results' business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Mapping[str, str]], *, ruled: bool = False) -> list[str]:
    """The lines of a table, its head first, columns as wide as their widest cell.

    Args:
        rows: with the same keys in each: the head. Without rows there are no lines.
        ruled: whether a line of dashes follows the head.
    """
    if not rows:
        return []
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    if ruled:
        table.insert(1, ["-" * width for width in widths])
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
