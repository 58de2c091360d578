"""Pictures of measures: what is drawn, what is said of it, and what cannot be drawn."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from flexure.contracts import FlexureError
from flexure.report import geometry_plots
from flexure.report.canvas import PANEL, WIDE, Picture, canvas, draw_legend, look, title_text
from flexure.report.geometry_plots import (
    Bin,
    Fit,
    NoiseLine,
    Samples,
    against_doubt,
    contributions,
    distributions,
    fits,
    reliability,
    under_noise,
)

VALUES = Samples("plain", [0.1, 1.0, 10.0, math.nan, 0.0])
STEERED = Samples("steered", [0.2, 0.3, 0.4])
BAND = ([0.005, 0.05, 0.5], [0.02, 0.2, 2.0])
LINE = NoiseLine("measured", [0.001, 0.01, 0.1], [0.01, 0.1, 1.0], BAND, 0, is_bound=False)
BOUND = NoiseLine("bound", [0.001, 0.01, 0.1], [0.02, 0.3, 40.0], None, 0, is_bound=True)

PICTURES = {
    "distributions": distributions([VALUES, STEERED], title="T", axis="curvature (1/unit)"),
    "under_noise": under_noise([LINE, BOUND], title="T", x_label="radius", y_label="change"),
    "fits": fits(
        [Fit("a", [1, 2], [0.0, 1.5], 1.5, -1.5), Fit("b", [1, 2], [1.0, 1.0], 0.0, 1.0)],
        title="T",
        x_label="order n",
        y_label="log v",
    ),
    "against_doubt": against_doubt(
        [(Samples("T", VALUES.values), [0.5, 0.1, 0.0, 0.0, 0.0])], axis="curvature (1/unit)"
    )[0],
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


def steps(monkeypatch: pytest.MonkeyPatch, *networks: Samples) -> list[tuple[list[float], ...]]:
    """What `distributions` draws: x and y of every curve."""
    found: list[tuple[list[float], ...]] = []

    def spying(size: tuple[float, float]) -> tuple[Any, Any]:
        figure, axes = canvas(size)
        draw = axes.step

        def step(x: Any, y: Any, **style: Any) -> Any:
            found.append((list(x), list(y)))
            return draw(x, y, **style)

        axes.step = step
        return figure, axes

    monkeypatch.setattr("flexure.report.geometry_plots.canvas", spying)
    distributions(networks, title="T", axis="a")
    return found


def test_distributions_start_at_the_share_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0] * 16 + [float(k) for k in range(1, 25)]
    ((x, y),) = steps(monkeypatch, Samples("s", values))
    assert y[0] == pytest.approx(40)
    assert y[1] == pytest.approx(42.5)  # at 1, the smallest that is drawn
    assert y[-1] == pytest.approx(100)
    assert x[1:-1] == values[16:]
    assert x[0] < 1
    assert x[-1] > 24


def test_distributions_are_of_what_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, y),) = steps(monkeypatch, Samples("s", [1.0, 2.0, math.inf, math.inf, math.nan]))
    assert y == pytest.approx([0, 25, 50, 50])


def test_distributions_say_how_many_samples_they_leave_out() -> None:
    told = PICTURES["distributions"].alt
    assert "plain: median of those drawn 1, 3 of 5 (1 zero, 1 not defined) samples" in told
    assert "steered: median of those drawn 0.3, 3 of 3 samples" in told
    assert Samples("s", [1.0, math.inf]).counts == "1 of 2 (1 infinite)"
    one = distributions([STEERED], title="T", axis="curvature")
    assert lines(one) < lines(PICTURES["distributions"])


def test_samples_without_doubt_are_shown_apart() -> None:
    assert "of 3 samples against doubt, 1 of them without any" in PICTURES["against_doubt"].alt
    none = against_doubt([(Samples("s", [1.0, 2.0]), [0.5, 0.25])], axis="a")[0]
    assert "0 of them without any" in none.alt
    assert "from 2 for the surest to 1 for the least" in none.alt
    all_sure = against_doubt([(Samples("s", [1.0, 2.0]), [0.0, 0.0])], axis="a")[0]
    assert "2 of them without any" in all_sure.alt


def test_networks_have_the_same_axes_of_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def keeping(size: tuple[float, float]) -> tuple[Any, Any]:
        made.append(canvas(size))
        return made[-1]

    monkeypatch.setattr("flexure.report.geometry_plots.canvas", keeping)
    doubtful, sure = Samples("a", [1.0, 3.0]), Samples("b", [100.0, 0.01])
    pictures = against_doubt([(doubtful, [0.5, 0.2]), (sure, [1e-20, 1e-12])], axis="a")
    assert [picture.alt[0] for picture in pictures] == ["a", "b"]
    (_, one), (_, other) = made
    assert one.get_xlim() == other.get_xlim()
    assert one.get_ylim() == other.get_ylim()
    assert one.get_xlim()[0] < 1e-20  # not clipped
    assert one.get_ylim()[1] > 100


@pytest.mark.parametrize("count", [1, 2, 55, 120])
def test_contributions_are_numbered_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def keeping(size: tuple[float, float]) -> tuple[Any, Any]:
        made.append(canvas(size))
        return made[-1]

    monkeypatch.setattr("flexure.report.geometry_plots.canvas", keeping)
    contributions([1 / count] * count, title="T", highest="act")
    (figure, axes) = made[0]
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) and 1 <= tick <= count for tick in ticks if tick > 0)
    assert len(ticks) <= 15


def test_text_has_one_size_on_the_page_whatever_the_picture() -> None:
    panel, wide = PICTURES["distributions"], PICTURES["under_noise"]
    assert panel.width / PANEL[0] == pytest.approx(wide.width / WIDE[0])
    assert 3 * panel.width + 2 <= 68 - 5  # three and two gaps fit into the page's text width


@pytest.mark.parametrize("name", ["a" * 60, "a name of many words " * 3, "$x$ & <b> _{", "_hidden"])
def test_names_of_any_kind_stay_in_the_picture(name: str) -> None:
    figure, axes = canvas(PANEL)
    from flexure.report.canvas import label_text

    axes.plot([0, 1], [0, 1], label=label_text(name))
    axes.set_title(title_text(name, PANEL))
    draw_legend(figure)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 1
    assert axes.get_window_extent().height > 0.6 * 72 * PANEL[1]  # the axes are not pressed flat
    for text in (legend.get_texts()[0], axes.title):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
    shown = legend.get_texts()[0].get_text().replace("\n", "").replace("\\$", "$")
    assert shown.replace(" ", "") == name.replace(" ", "")


def test_nothing_to_draw_is_an_error() -> None:
    empty = Samples("zero", [0.0, math.nan, math.inf])
    with pytest.raises(FlexureError, match="none among 3"):
        distributions([empty], title="T", axis="a")
    with pytest.raises(FlexureError, match="none among 3"):
        against_doubt([(empty, [0.1, 0.2, 0.3])], axis="a")
    with pytest.raises(FlexureError, match="at least one bin"):
        reliability([], title="T")
    with pytest.raises(FlexureError, match="at least one line"):
        under_noise([], title="T", x_label="x", y_label="y")


def test_texts_give_the_numbers() -> None:
    assert "a 1.5, b 0." in PICTURES["fits"].alt
    assert "bound: from 0.02 to 40" in PICTURES["under_noise"].alt
    assert "75.0 %, layer1.relu" in PICTURES["contributions"].alt
    assert "0.55: 0.50 of 6" in PICTURES["reliability"].alt
    assert "from 10 for the surest to 0.1 for the least" in PICTURES["against_doubt"].alt


def test_a_dozen_looks_are_told_apart_by_shape_and_by_colour_with_dashes() -> None:
    looks = [look(k) for k in range(12)]
    assert len({one.marker for one in looks}) == 12
    assert len({(one.colour, str(one.dashes)) for one in looks}) == 12
    assert len({(one.colour, one.hollow) for one in looks}) == 12


def test_bounds_may_share_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[str] = []
    draw = geometry_plots.draw_legend

    def spying(figure: Any) -> None:
        labels.extend(figure.axes[0].get_legend_handles_labels()[1])
        draw(figure)

    monkeypatch.setattr(geometry_plots, "draw_legend", spying)
    for bounds in ("", "bounds"):
        under_noise([LINE, BOUND], title="T", x_label="x", y_label="y", bounds=bounds)
    under_noise([LINE], title="T", x_label="x", y_label="y", bounds="bounds")
    assert labels == ["measured", "bound", "measured", "bounds", "measured"]
