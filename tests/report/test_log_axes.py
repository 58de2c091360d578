"""Logarithmic axes: two to five labels on each, none upon another, and every value inside."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexure.report.canvas import PANEL, canvas
from flexure.report.log_axes import decimal, drawable, log_axis, log_ends

POSITIVE = st.floats(1e-300, 1e300)


@given(st.lists(st.one_of(st.floats(), POSITIVE), max_size=5))
def test_ends_hold_every_value_that_can_be_drawn(values: list[float]) -> None:
    low, high = log_ends(values)
    assert 0 < low < high < math.inf
    assert high / low > 1.9
    for value in values:
        if drawable(value) and 1e-300 < value < 1e300:
            assert low < value < high


@settings(max_examples=40, deadline=None)
@given(POSITIVE, st.one_of(st.floats(1, 100), POSITIVE))
def test_an_axis_has_two_to_five_labels_inside_it(value: float, ratio: float) -> None:
    _, axes = canvas(PANEL)
    low, high = log_ends([value, value * ratio])
    log_axis(axes, "x", (low, high))
    ticks = axes.get_xticks()
    assert 2 <= len(ticks) <= 5
    assert all(low <= tick <= high for tick in ticks)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(set(labels)) == len(labels)
    assert not any(text.get_text() for text in axes.get_xticklabels(minor=True))


@pytest.mark.parametrize("ends", [(0.2, 0.9), (20, 50), (2e-5, 7e-5), (1, 1), (1e-14, 1e3)])
@pytest.mark.parametrize("which", ["x", "y"])
def test_labels_do_not_overlap_in_the_smallest_picture(
    ends: tuple[float, float], which: str
) -> None:
    figure, axes = canvas(PANEL)
    axes.plot(ends, ends)
    log_axis(axes, which, log_ends(ends))
    figure.draw_without_rendering()
    labels = getattr(axes, f"get_{which}ticklabels")(which="both")
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert len(boxes) >= 2
    for k, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def test_numbers_keep_their_power_of_ten() -> None:
    assert decimal(1e-7) == "10⁻⁷"
    assert decimal(1000.0) == "10³"
    assert decimal(2e4) == "2·10⁴"
    assert decimal(1.5e-12) == "1.5·10⁻¹²"
