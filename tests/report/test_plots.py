"""Pictures: valid, described, the same bytes every time, and without global state."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from flexure.contracts import FlexureError
from flexure.report import (
    Curve,
    Estimate,
    Picture,
    boundary,
    curves,
    estimates,
    histogram,
    over_depth,
    score_against_beta,
)

BETAS = [0.7, 0.8, 0.9, 1.0]


def score_picture(**changes: object) -> Picture:
    arguments: dict = {
        "chosen": (0.9, 88.0),
        "within": [(0.8, 87.5), (0.9, 88.0)],
        "baseline": 86.0,
    }
    line = Curve("mean", BETAS, [85.0, 87.5, 88.0, 86.0], [0.6] * 4)
    return score_against_beta([line], **(arguments | changes))


def boundary_picture() -> Picture:
    grid = np.linspace(-1, 1, 20)[None, :].repeat(20, 0)
    points = np.array([[-0.5, 0.0], [0.5, 0.2]])
    return boundary(grid, extent=(-1, 1, -1, 1), points=points, labels=[0, 1], title="beta 0.9 <x>")


PICTURES: dict[str, Callable[[], Picture]] = {
    "score": score_picture,
    "score of two dials": lambda: score_against_beta(
        [Curve(f"c = {c}", BETAS, [c, c + 1, c + 2, c]) for c in (0.0, 0.5)],
        chosen=(0.9, 2.5),
        within=[],
        baseline=None,
    ),
    "boundary": boundary_picture,
    "histogram": lambda: histogram(
        [np.array([0.0, 0.5, 0.99]), np.array([0.5, 0.5, 1.0])],
        title="dial",
        axis="beta",
        start=0.8,
    ),
    "over depth": lambda: over_depth(
        [[np.array([0.1, 0.2]), np.array([0.3])], [np.array([0.5, 0.9]), np.array([0.7])]],
        title="dial over depth",
        axis="beta",
        start=0.5,
    ),
    "estimates": lambda: estimates(
        [Estimate("seed 1", 0.5, -1, 2), Estimate("all", 0.7, 0.2, 1.2)],
        axis="gain (points)",
        highlight=["all"],
    ),
    "curves": lambda: curves(
        [Curve("network", [0, 1, 2], [0, 1, 0]), Curve("target", [0, 1, 2], [0, 0.9, 0.1])],
        title="beta 0.5",
        points=Curve("data", [0, 2], [0.1, 0.0]),
    ),
}


@pytest.fixture(params=PICTURES)
def make(request: pytest.FixtureRequest) -> Callable[[], Picture]:
    return PICTURES[request.param]


def test_it_is_one_svg_element_that_scales_and_is_described(make: Callable[[], Picture]):
    picture = make()
    root = ElementTree.fromstring(picture.svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    assert root.get("role") == "img"
    assert root.get("aria-label") == picture.alt != ""


def test_ids_are_its_own_and_every_reference_resolves(make: Callable[[], Picture]):
    svg = make().svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert len(ids) == len(set(ids)) > 0
    assert {a or b for a, b in references} <= set(ids)
    others = [build() for name, build in PICTURES.items() if build is not make]
    for other in others:
        assert not set(ids) & set(re.findall(r'\bid="([^"]+)"', other.svg))


def test_the_same_numbers_give_the_same_bytes(make: Callable[[], Picture]):
    assert make() == make()


def test_ink_and_background_follow_the_page(make: Callable[[], Picture]):
    svg = make().svg
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "#ffffff" not in svg


def test_rc_parameters_are_left_alone(make: Callable[[], Picture]):
    before = dict(matplotlib.rcParams)
    make()
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported():
    code = (
        "import sys; from flexure.report import *; "
        "assert 'matplotlib' not in sys.modules, 'imported too early'; "
        "curves([Curve('a', [0, 1], [0, 1])], title='t'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_alternative_text_says_what_the_score_picture_says():
    alt = score_picture().alt
    assert "chosen beta is 0.9 with 88.0, against 86.0 at beta = 1" in alt
    assert "2 values of beta" in alt
    assert "against 86" not in score_picture(baseline=None).alt


def test_the_boundary_lies_where_the_margin_changes_sign():
    # The left half of the margin is negative: its region must be left of the other one.
    root = ElementTree.fromstring(boundary_picture().svg)
    filled = [
        element.get("d")
        for element in root.iter("{http://www.w3.org/2000/svg}path")
        if "opacity: 0.3" in element.get("style", "")
    ]
    assert len(filled) == 2
    centres = []
    for outline in filled:
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", outline or "")]
        centres.append(sum(xs) / len(xs))
    assert centres[0] < centres[1]


def test_a_network_with_one_answer_everywhere_can_be_drawn(recwarn: pytest.WarningsRecorder):
    picture = boundary(
        np.ones((5, 5)), extent=(-1, 1, -1, 1), points=np.zeros((2, 2)), labels=[0, 1], title="t"
    )
    assert picture.svg
    assert not recwarn.list


@pytest.mark.parametrize(
    "call",
    [
        lambda: Curve("a", [1, 2], [1]),
        lambda: Curve("a", [1], [1], [1, 2]),
        lambda: Curve("a", [], []),
        lambda: estimates([], axis="gain"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(call: Callable[[], object]):
    with pytest.raises(FlexureError, match="expected"):
        call()


def test_a_histogram_tells_its_mean_and_holds_every_value() -> None:
    picture = histogram([np.array([0.0, 1.0]), np.array([0.5, 0.9])], title="t", axis="beta")
    assert "mean 0.600" in picture.alt


def test_depth_tells_the_first_and_the_last_median() -> None:
    sites = [[np.array([0.1, 0.2, 0.3])], [np.array([0.4]), np.array([0.6])]]
    picture = over_depth(sites, title="t", axis="beta")
    assert "2 sites; the median goes from 0.200 at the first site to 0.500" in picture.alt


def test_curves_of_several_decades_have_a_logarithmic_axis() -> None:
    lines = [Curve("a", [1, 2, 3], [1e-3, 1.0, 1e3]), Curve("b", [1, 2, 3], [0.0, 1.0, -1.0])]
    plain, log = (curves(lines, title="T", log=log, looks=[2, 0]) for log in (False, True))
    assert plain.svg != log.svg
    assert curves(lines, title="T", log=True).svg != log.svg  # other colours
    with pytest.raises(ValueError, match="zip"):
        curves(lines, title="T", looks=[1])
