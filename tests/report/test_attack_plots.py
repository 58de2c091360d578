"""Pictures of dials and shares: every value told, odd numbers drawn, no empty pictures."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from flexure.contracts import FlexureError
from flexure.report.attack_plots import (
    Candidates,
    GroupDial,
    candidate_scatter,
    dial_map,
    group_dials,
    side_by_side,
)
from flexure.report.canvas import Picture
from flexure.report.plots import Estimate

TITLES = {"title": "t $x$", "x_label": "x", "y_label": "y"}


def parsed(picture: Picture) -> str:
    ElementTree.fromstring(picture.svg)
    return picture.alt


def test_a_scatter_tells_its_choice() -> None:
    groups = [Candidates(f"kind {k}", [90.0, 91.0], [10.0, 20.0 + k]) for k in range(7)]
    told = parsed(
        candidate_scatter(groups, chosen=(90.0, 26.0), plain=(91.0, 16.0), limit=90.0, **TITLES)
    )
    assert "of 14 settings; chosen: 90.0 clean, 26.0 robust" in told
    assert "of 0 settings" in parsed(candidate_scatter([], chosen=(0.0, 0.0), **TITLES))


def test_a_map_tells_its_range_and_leaves_out_what_is_missing() -> None:
    values = [[10.0, math.nan], [20.0, 30.0]]
    words = {"title": "t", "value": "robust accuracy (%)"}
    told = parsed(dial_map([0.7, 1.0], [0.0, 0.5], values, chosen=(0.7, 0.5), **words))
    assert "10.0 to 30.0" in told
    assert "Chosen: beta = 0.7, c = 0.5" in told
    assert "0.0 to 0.0" in parsed(dial_map([1.0], [0.5], [[0.0]], **words))
    with pytest.raises(FlexureError, match="at least one value"):
        dial_map([1.0], [0.5], [[math.nan]], **words)


def test_crosses_mark_what_must_not_be_chosen() -> None:
    words = {"title": "t", "value": "v"}
    plain, barred = (
        dial_map([0.7, 1.0], [0.5], [[10.0, 20.0]], barred=each, **words)
        for each in (None, np.array([[True, False]]))
    )
    assert plain.svg != barred.svg


@pytest.mark.parametrize("count", [1, 40])
def test_groups_are_all_told(count: int) -> None:
    groups = [GroupDial(f"a.{'long.' * 20}layer{k}", 0.5, k / 40) for k in range(count)]
    told = parsed(group_dials(groups, title="t"))
    assert f"layer{count - 1}: beta 0.5" in told
    with pytest.raises(FlexureError, match="at least one group"):
        group_dials([], title="t")


def test_shares_side_by_side_are_all_told_and_may_be_missing() -> None:
    one = Estimate("", 50.0, 40.0, 60.0)
    bare = Estimate("", 70.0, math.nan, math.nan)
    series = [("plain", [one, None]), ("$steered_", [bare, one])]
    told = parsed(side_by_side(["noise", "blur*"], series, title="t", axis="accuracy (%)"))
    assert "plain, noise: 50.0; $steered_, noise: 70.0; $steered_, blur*: 50.0" in told
    with pytest.raises(FlexureError, match="at least one row"):
        side_by_side([], [], title="t", axis="a")
