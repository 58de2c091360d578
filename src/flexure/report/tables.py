"""Tables for reports and terminals, and how numbers are written in them.

Turns results into rows of text; the layout is `page.py`'s and the terminal's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexure.contracts import FlexureError

__all__ = ["Table", "gain_text", "percent", "run_table", "site_table", "table_of"]


_SPACE = "\N{NO-BREAK SPACE}"  # no line may end between a number and its sign


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
    """What a site report offers to a table: one dictionary a row, the same keys in each."""

    def rows(self) -> Sequence[Mapping[str, str]]: ...


def site_table(report: SiteRows) -> Table:
    """Every activation site, and every activation left out: what it is and what happens to it."""
    rows = report.rows()
    columns = tuple(rows[0]) if rows else ("site",)
    numbers = {"calls", "axis", "channels"} & set(columns)
    return Table(columns, tuple(tuple(row.values()) for row in rows), frozenset(numbers))


def run_table(payload: Mapping[str, Any]) -> Table:
    """How a run was made, from its result file: settings, versions, commit and date."""
    rows = [*_flat("", payload["config"]), *_flat("version", payload["versions"])]
    rows += [(name, payload[name]) for name in ("commit", "platform", "date")]
    return table_of(("setting", "value"), rows)


def percent(share: float, *, digits: int = 1) -> str:
    """A share in [0, 1] as per cent."""
    return f"{100 * share:.{digits}f}{_SPACE}%"


def gain_text(points: float, low: float, high: float, *, level: float = 0.95) -> str:
    """A difference in percentage points with its interval."""
    return f"{points:+.2f} points ({100 * level:.0f}{_SPACE}% interval {low:+.2f} to {high:+.2f})"


def table_of(columns: Iterable[str], rows: Iterable[Iterable[Any]], *numeric: str) -> Table:
    """A table from any values; None is shown as a dash."""
    return Table(
        tuple(columns),
        tuple(tuple(_cell(cell) for cell in row) for row in rows),
        frozenset(numeric),
    )


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Nested settings as rows, the names of the outer ones in front."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [row for key, inner in value.items() for row in _flat(f"{name} {key}".strip(), inner)]


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return "–" if value is None else str(value)
