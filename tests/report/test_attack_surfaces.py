"""Pictures of losses around samples: what is wrong is told, undefined losses are drawn."""

from __future__ import annotations

import math
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest

from flexure.contracts import FlexureError
from flexure.report.attack_surfaces import Ray, Spread, Surface, rays, spreads, surfaces
from flexure.report.canvas import Picture
from tests.report.attack_results import images_of

TITLES = {"title": "t $x$", "x_label": "x", "y_label": "y"}


def parsed(picture: Picture) -> str:
    ElementTree.fromstring(picture.svg)
    return picture.alt


@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("count", [1, 4])
def test_surfaces_tell_how_much_is_wrong_whatever_the_losses(ball: str, count: int) -> None:
    offsets = np.linspace(-1, 1, 9)
    losses = np.repeat(offsets[:, None], 9, 1)
    odd = [losses, np.full((9, 9), math.nan), np.zeros((9, 9)), np.full((9, 9), -math.inf)]
    maps = [Surface(f"sample {k}", offsets, odd[k]) for k in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = parsed(surfaces(maps, ball=ball, x_label="x", y_label="y", value="loss (nats)"))
    assert "sample 0: above 0 in 44% of the map" in told


def test_the_gradient_is_drawn_to_the_right() -> None:
    offsets = np.linspace(-1, 1, 3)
    along = np.array([[0.0] * 3, [0.0] * 3, [5.0] * 3])  # row j is at offsets[j] along it
    words = {"ball": "l2", "x_label": "x", "y_label": "y", "value": "v"}
    first, *_ = images_of(surfaces([Surface("s", offsets, along)], **words).svg)
    right, left = first[:, -1], first[:, 0]
    assert (right[:, 2] < left[:, 2]).all()  # orange, less blue
    assert np.ptp(first[:, -1], axis=0) == pytest.approx(0)


def test_rays_and_spreads_are_told_and_may_be_undefined() -> None:
    nan = math.nan
    x = [0.0, 0.5, 1.0]
    lines = [Ray("a", x, [-1.0, 0.0, 1.0], [-1.0, 0.5, 2.0]), Ray("b", x, [nan] * 3, [nan] * 3)]
    assert "a: from -1 to 1" in parsed(rays(lines, **TITLES))
    rows = [Spread("cross-entropy", (0.0, 0.0, 0.1, 1.0, 10.0)), Spread("margin", (1.0,) * 5)]
    assert "cross-entropy: median 0.1" in parsed(spreads(rows, title="t", axis="a"))
    with pytest.raises(FlexureError, match="above 0"):
        spreads([Spread("zero", (0.0,) * 5)], title="t", axis="a")
    with pytest.raises(FlexureError, match="at least one ray"):
        rays([], **TITLES)
    with pytest.raises(FlexureError, match="at least one loss surface"):
        surfaces([], ball="l2", x_label="", y_label="", value="")
