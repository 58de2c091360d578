"""Lines with names at their ends: all there, none over another, whatever the numbers."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexure.contracts import FlexureError
from flexure.report.attack_lines import Line, Mark, _apart, _scale_of, labelled_lines
from flexure.report.canvas import WIDE, canvas
from flexure.report.plots import Estimate


def of(value: float) -> Estimate:
    return Estimate("", value, max(value - 5, 0), min(value + 5, 100))


def line(label: str, values: list[float], **words: object) -> Line:
    return Line(label, range(len(values)), [of(value) for value in values], **words)  # type: ignore[arg-type]


WORDS = {"title": "t", "x_label": "eps", "y_label": "accuracy (%)"}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(2, 12))
def test_names_do_not_overlap_and_are_within_the_axes(wanted: list[float], size: float) -> None:
    wanted = sorted(wanted)
    found = _apart(wanted, [size] * len(wanted), 0.0, 100.0)
    assert all(b - a >= size - 1e-9 for a, b in pairwise(found))
    assert found[0] >= size / 2 - 1e-9
    assert found[-1] <= 100 - size / 2 + 1e-9


def test_names_that_have_room_stay_where_their_lines_end() -> None:
    assert _apart([10.0, 50.0, 90.0], [5.0] * 3, 0.0, 100.0) == [10.0, 50.0, 90.0]
    assert _apart([50.0, 50.0], [10.0] * 2, 0.0, 100.0) == [45.0, 55.0]


def test_every_value_is_in_the_text_for_those_who_do_not_see() -> None:
    picture = labelled_lines(
        [line("apgd $x$", [91, 60.5]), line("worst", [91, 16], role="worst", band=True)], **WORDS
    )
    assert "apgd $x$: 91.0 at 0, 60.5 at 1; worst: 91.0 at 0, 16.0 at 1" in picture.alt
    ElementTree.fromstring(picture.svg)


def test_radii_are_told_in_the_unit_of_the_axis() -> None:
    one = Line("a", [0.0, 1 / 255], [of(90), of(10)])
    assert "10.0 at 1." in labelled_lines([one], scale=255.0, **WORDS).alt


def test_marks_and_missing_values_are_drawn() -> None:
    some = Line("a", [0.6, 0.7, 1.0], [of(50), None, of(math.nan)])
    marks = [Mark("chosen", 0.7), Mark("oracle", 0.6, 50.0), Mark("oracle", 1.0, 40.0)]
    picture = labelled_lines([some], marks=marks, **WORDS)
    assert "a: 50.0 at 0.6." in picture.alt
    assert "chosen: 0.7." in picture.alt


def test_far_apart_radii_are_at_their_square_roots() -> None:
    wide = Line("a", [0.0, 1.0, 64.0], [of(90)] * 3)
    narrow = Line("a", [0.0, 1.0, 2.0], [of(90)] * 3)
    one = Line("a", [0.0, 1.0], [of(90)] * 2)
    for each, differs in ((wide, True), (narrow, False), (one, False)):
        rooted, plain = (labelled_lines([each], rooted=by, **WORDS).svg for by in (True, False))
        assert (rooted != plain) == differs


@pytest.mark.parametrize("lines", [[], [Line("a", [0.0], [None])]])
def test_nothing_to_draw_is_an_error(lines: list[Line]) -> None:
    with pytest.raises(FlexureError, match="at least one accuracy"):
        labelled_lines(lines, **WORDS)


@pytest.mark.parametrize("values", [[0.0] * 21, [100.0], [0.0], [1e-9, 100.0]])
def test_extremes_are_drawn(values: list[float]) -> None:
    lines = [line(f"attack {k} " * 9, values, look=k, band=True) for k in range(13)]
    ElementTree.fromstring(labelled_lines(lines, rooted=True, **WORDS).svg)


def test_the_first_and_the_last_place_keep_their_numbers() -> None:
    _, axes = canvas(WIDE)
    radii = [0.1 * 5 ** (k / 40) for k in range(41)]
    _scale_of(axes, [Line("a", radii, [of(50)] * 41)], 255.0, True, "eps")
    told = [label.get_text() for label in axes.get_xticklabels()]
    assert (told[0], told[-1]) == ("25.5", "128")
    assert 3 < len(told) < 20
