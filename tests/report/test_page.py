"""The page: complete, escaped, self-contained, and never without its limits."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flexure.contracts import FlexureError
from flexure.report import Curve, Section, curves, render, table_of, write_page

VOID = {"meta", "link", "br", "hr", "img", "input"}


def page(**changes: object) -> dict:
    picture = curves([Curve("a", [0, 1], [0, 1])], title="a line")
    return {
        "title": "A <title> & more",
        "summary": ["Found <b>nothing</b>."],
        "sections": [
            Section("First", ("Some text.",), (picture,), caption="How to read it."),
            Section("Second", table=table_of(("path", "n"), [("<x>", 3)], "n"), caption="Sites"),
        ],
        "shows": ["this"],
        "does_not_show": ["that"],
    } | changes


class Structure(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [
            value for name, value in attrs if name in {"href", "src", "xlink:href", "data"}
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.headings.append(data)


def test_every_part_is_there_and_every_element_is_closed():
    parser = Structure()
    parser.feed(render(**page(run=table_of(("setting", "value"), [("seed", 1)]))))
    assert parser.open == []
    assert parser.headings == [
        "A <title> & more",
        "What was found",
        "First",
        "Second",
        "What this does and does not show",
        "It shows",
        "It does not show",
        "How it was run",
    ]


def test_texts_are_escaped_and_pictures_are_not():
    text = render(**page())
    assert "&lt;title&gt; &amp; more" in text
    assert "<b>nothing" not in text
    assert "<td>&lt;x&gt;</td>" in text
    assert text.count("<svg ") == 1
    assert '<td class="number">3</td>' in text


def test_nothing_outside_the_file_is_asked_for():
    text = render(**page())
    parser = Structure()
    parser.feed(text)
    assert all(address.startswith("#") for address in parser.addresses)
    # Names of XML languages are the only addresses, and are not fetched.
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "<script" not in text


def test_it_fits_a_phone_and_both_colour_schemes():
    text = render(**page())
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('class="scroll"') == 1


@pytest.mark.parametrize("missing", ["shows", "does_not_show"])
def test_a_report_without_its_limits_is_refused(missing: str):
    with pytest.raises(FlexureError, match="shows and does not show"):
        render(**page(**{missing: []}))


def test_it_is_written_with_its_folder_and_is_the_same_each_time(tmp_path: Path):
    path = write_page(tmp_path / "new" / "report.html", **page())
    assert path.read_text(encoding="utf-8") == render(**page())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(FlexureError, match="folder"):
        write_page(tmp_path / "file" / "report.html", **page())
