"""Tables for reports and terminals, and how numbers are written in them.

Turns results into rows of text; the layout is `page.py`'s and the terminal's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexure.contracts import FlexureError

__all__ = ["Table", "gain_text", "percent", "points", "site_table", "table_of"]


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns.

    Attributes:
        columns: the names.
        rows: one text for each column.
        numeric: names of the columns that hold numbers (set flush right).
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise FlexureError(
                f"expected {len(self.columns)} cells in every row ({', '.join(self.columns)}), "
                f"got {len(wrong[0])} in {wrong[0]}"
            )
        unknown = self.numeric - set(self.columns)
        if unknown:
            raise FlexureError(
                f"expected numeric columns among {', '.join(self.columns)}, got {sorted(unknown)}"
            )


class SiteRows(Protocol):
    """What a site report offers to a table."""

    @property
    def sites(self) -> Sequence[Any]:
        """Rows with name, kind, activation, calls, axis, channels and action."""


def site_table(report: SiteRows) -> Table:
    """Every activation site: where it is, what it is, and what happens to it."""
    fields = ("kind", "activation", "calls", "axis", "channels", "action")
    rows = tuple(
        (str(site.name), *(_cell(getattr(site, field)) for field in fields))
        for site in report.sites
    )
    return Table(("path", *fields), rows, frozenset({"calls", "axis", "channels"}))


def percent(share: float, *, digits: int = 1) -> str:
    """A share in [0, 1] as per cent."""
    return f"{100 * share:.{digits}f} %"


def points(difference: float, *, digits: int = 2) -> str:
    """A difference of two shares as signed percentage points."""
    return f"{100 * difference:+.{digits}f}"


def gain_text(value: float, low: float, high: float) -> str:
    """A difference of two shares with its interval, in percentage points."""
    return f"{points(value)} points, 95 % interval {points(low)} to {points(high)}"


def table_of(columns: Iterable[str], rows: Iterable[Iterable[Any]], *numeric: str) -> Table:
    """A table from any values; None is shown as a dash."""
    return Table(
        tuple(columns),
        tuple(tuple(_cell(cell) for cell in row) for row in rows),
        frozenset(numeric),
    )


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)
