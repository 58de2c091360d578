"""The HTML page of a report: one file that needs nothing else.

Takes finished texts, tables and pictures; computing them is done elsewhere. Every report says what
it shows and what it does not show: both lists are required.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexure.contracts import FlexureError
from flexure.record import write_bytes
from flexure.report.canvas import Picture
from flexure.report.tables import Table

__all__ = ["Section", "render", "write_page"]


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        title: its heading.
        text: paragraphs, plain text.
        pictures: side by side where the page is wide enough.
        table: scrolls in its own box where it is wider than the page; one of more than three
            columns is a list of rows on a narrow page.
        caption: how to read the picture or the table.
    """

    title: str
    text: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    caption: str = ""


def render(
    *,
    title: str,
    summary: Sequence[str],
    sections: Sequence[Section],
    shows: Sequence[str],
    does_not_show: Sequence[str],
    run: Table | None = None,
) -> str:
    """The page as text.

    Args:
        title: of the report.
        summary: what was found, one sentence each, with intervals.
        sections: in their order.
        shows: what the results support.
        does_not_show: what a reader might think they support, and they do not.
        run: how it was run: settings, seeds, versions.

    Raises:
        FlexureError: `shows` or `does_not_show` is empty.
    """
    if not shows or not does_not_show:
        raise FlexureError(
            "expected at least one statement each of what the report shows and does not show, "
            f"got {len(shows)} and {len(does_not_show)}"
        )
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flexure.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title,
        summary=summary,
        sections=sections,
        shows=shows,
        does_not_show=does_not_show,
        run=run,
    )


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Sequence[str],
    sections: Sequence[Section],
    shows: Sequence[str],
    does_not_show: Sequence[str],
    run: Table | None = None,
) -> Path:
    """Writes the page (see `render`) to `path`, whole or not at all, and returns its path.

    Raises:
        FlexureError: as `render`, or the folder of `path` cannot be written.
    """
    text = render(
        title=title,
        summary=summary,
        sections=sections,
        shows=shows,
        does_not_show=does_not_show,
        run=run,
    )
    return write_bytes(path, text.encode())
