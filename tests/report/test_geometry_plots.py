"""Pictures of measures: what is drawn, what is said of it, and what cannot be drawn."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from flexure.contracts import FlexureError
from flexure.report.canvas import Curve, Picture
from flexure.report.geometry_plots import (
    Bin,
    Fit,
    Samples,
    against_confidence,
    contributions,
    distributions,
    fits,
    log_curves,
    reliability,
)

VALUES = Samples("plain", [0.1, 1.0, 10.0, math.nan, 0.0])
STEERED = Samples("steered", [0.2, 0.3, 0.4])
LINE = Curve("measured", [0.001, 0.01, 0.1], [0.01, 0.1, 1.0], [0.02, 0.01, 0.1])
BOUND = Curve("bound", [0.001, 0.01, 0.1], [0.02, 0.3, 40.0])

PICTURES = {
    "distributions": distributions([VALUES, STEERED], title="T", axis="curvature (1/unit)"),
    "log_curves": log_curves([LINE, BOUND], title="T", x_label="radius", y_label="change"),
    "fits": fits(
        [Fit("a", [1, 2], [0.0, 1.5], 1.5, -1.5), Fit("b", [1, 2], [1.0, 1.0], 0.0, 1.0)],
        title="T",
        x_label="order n",
        y_label="log v",
    ),
    "against_confidence": against_confidence(
        VALUES, [0.5, 0.9, 1.0, 1.0, 1.0], title="T", axis="curvature (1/unit)"
    ),
    "contributions": contributions([0.75, 0.25], title="T", highest="layer1.relu"),
    "reliability": reliability(
        [Bin(0.55, 0.5, 0.2, 0.8, 6), Bin(0.95, 1.0, 0.7, 1.0, 9)], title="T"
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_svg_that_says_what_it_shows(name: str) -> None:
    picture = PICTURES[name]
    root = ElementTree.fromstring(picture.svg)
    assert root.tag.endswith("svg")
    assert root.get("aria-label") == picture.alt
    assert picture.alt.startswith("T.")
    assert "nan" not in picture.svg


def lines(picture: Picture) -> int:
    return len(re.findall(r'id="[0-9a-f]+-line2d_', picture.svg))


def test_distributions_say_how_many_samples_they_leave_out() -> None:
    assert "plain: median 1, 3 of 5 samples drawn" in PICTURES["distributions"].alt
    assert "steered: median 0.3, 3 of 3" in PICTURES["distributions"].alt
    one = distributions([STEERED], title="T", axis="curvature")
    assert lines(one) < lines(PICTURES["distributions"])


def test_nothing_to_draw_is_an_error() -> None:
    empty = Samples("zero", [0.0, math.nan, math.inf])
    with pytest.raises(FlexureError, match="none among 3"):
        distributions([empty], title="T", axis="a")
    with pytest.raises(FlexureError, match="none among 3"):
        against_confidence(empty, [0.1, 0.2, 0.3], title="T", axis="a")
    with pytest.raises(FlexureError, match="at least one bin"):
        reliability([], title="T")


def test_texts_give_the_numbers() -> None:
    assert "a 1.500, b 0.000" in PICTURES["fits"].alt
    assert "bound: from 0.02 to 40" in PICTURES["log_curves"].alt
    assert "75.0 %, layer1.relu" in PICTURES["contributions"].alt
    assert "0.55: 0.50 of 6" in PICTURES["reliability"].alt
    assert "from 10 for the surest to 0.1 for the least" in PICTURES["against_confidence"].alt
