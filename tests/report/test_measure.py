"""What a measurement says in a report: every number with its interval, and nothing too much."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from flexure.methods.measurements import Measurements, measure_model
from flexure.report.canvas import Picture
from flexure.report.geometry_plots import Fit, NoiseLine, fits
from flexure.report.measure import measure_page, measure_sections, measure_summary
from flexure.report.page import Section


def network(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), activation(), nn.Linear(12, 3)).eval()


@cache
def measured(*activations: type[nn.Module]) -> Measurements:
    torch.manual_seed(1)
    batches = [(torch.randn(12, 6), torch.arange(12) % 3) for _ in range(1)]
    first, *second = (network(activation) for activation in activations)
    names = ("first <1>", "second")
    return measure_model(
        first,
        batches,
        against=second[0] if second else None,
        names=names,
        noise_samples=4,
        rate_samples=4,
    )


def titles(found: Measurements) -> list[str]:
    return [section.title for section in measure_sections(found)]


def sections(found: Measurements) -> dict[str, Section]:
    return {section.title: section for section in measure_sections(found)}


def test_two_smooth_networks_have_every_section() -> None:
    assert titles(measured(nn.Tanh, nn.SiLU)) == [
        "Numbers",
        "Curvature and gradients over samples",
        "Curvature against confidence",
        "Gradients under noise",
        "Growth of derivatives",
        "A bound for every input: first <1>",
        "A bound for every input: second",
        "Calibration",
    ]


def test_a_relu_network_has_no_rate_and_no_bound_and_says_why() -> None:
    found = measured(nn.ReLU)
    assert "Growth of derivatives" not in titles(found)
    assert not any("bound for every" in title for title in titles(found))
    notes = [line for line in measure_summary(found) if line.startswith("Note:")]
    assert any("rate" in note and "steer" in note for note in notes)
    assert any("bound" in note for note in notes)


def test_headlines_are_medians_and_pooled_values_with_intervals() -> None:
    told = measure_summary(measured(nn.Tanh, nn.SiLU))
    heads = {line.split(":")[0] for line in told}
    curvature = "Normalised curvature (1 / input unit), median"
    assert {curvature, "Curvature rate", "Accuracy"} <= heads
    assert not any("mean" in head for head in heads - {"Note"})  # of norms: those of a few samples
    assert not any("noise" in head for head in heads - {"Note"})
    for line in told[1:]:
        if not line.startswith(("Note:", "Expected calibration error")):  # which has no interval
            assert line.count("[") == 3, line  # one, the other, and the pair
            assert "Ratio" in line or "Difference" in line


def test_numbers_in_the_table_are_those_of_the_result() -> None:
    found = measured(nn.Tanh, nn.SiLU)
    numbers, noise = (
        sections(found)[title].table for title in ("Numbers", "Gradients under noise")
    )
    assert numbers is not None
    assert noise is not None
    by_name = {row[0]: row for row in (*numbers.rows, *noise.rows)}
    assert len(by_name) == len(found.rows()) + 2  # the bound and its looseness
    summary = found.models[0].curvature
    assert summary is not None
    told = float(by_name["Hessian norm (nats / input unit²), mean"][1].split(" ")[0])
    assert told == pytest.approx(float(summary.mean["hessian_norm"]), rel=1e-3)
    assert numbers.columns[-1] == "difference, or median of ratios"


def test_the_bound_is_among_the_numbers() -> None:
    found = measured(nn.Tanh, nn.ReLU)
    table = sections(found)["Numbers"].table
    assert table is not None
    bound, loose = table.rows[-2:]
    smooth = found.models[0]
    assert smooth.bound is not None
    assert smooth.looseness is not None
    assert float(bound[1]) == pytest.approx(smooth.bound.cross_entropy, rel=1e-3)
    assert float(loose[1]) == pytest.approx(smooth.looseness, rel=1e-3)
    assert bound[2:] == loose[2:] == ("–", "–")  # the other is not smooth
    without = sections(measured(nn.ReLU))["Numbers"].table
    assert without is not None
    assert not any("bound" in row[0] for row in without.rows)


def test_shares_of_a_bound_add_up_and_are_sorted() -> None:
    (section,) = (s for s in measure_sections(measured(nn.Tanh)) if "bound" in s.title)
    assert section.table is not None
    shares = [float(re.sub(r"[^\d.]", "", row[-1])) for row in section.table.rows]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    path = measure_page(tmp_path / "r.html", measured(nn.Tanh, nn.SiLU), title="A & B")
    text = path.read_text()
    assert "A &amp; B" in text
    assert "first &lt;1&gt;" in text
    assert "first <1>" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def noise_drawn(
    found: Measurements, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[NoiseLine], Section]:
    """The lines of the noise picture, and its section."""
    drawn: list[NoiseLine] = []

    def spying(lines: list[NoiseLine], **words: str) -> Picture:
        drawn.extend(lines)
        return Picture("<svg></svg>", words["title"])

    monkeypatch.setattr("flexure.report.geometry_sections.under_noise", spying)
    return drawn, sections(found)["Gradients under noise"]


def with_noise(found: Measurements, **columns: list[list[float]]) -> Measurements:
    """The same with other values of the first network's gradient change."""
    model = found.models[0]
    summary = model.summaries["gradient_change"]
    rows = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    changed = replace(summary, result=replace(summary.result, **rows))
    summaries = {**model.summaries, "gradient_change": changed}
    return replace(found, models=(replace(model, summaries=summaries), *found.models[1:]))


def test_noise_loses_points_and_no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    inf, nan = math.inf, math.nan
    changes = [[0.0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 3, 6, 9, 12], [1, 9, 9, 9, 90.0]]
    bounds = [[1.0, 1, 1, inf, inf], [2, 2, 2, inf, inf], [3, 3, 3, 4, inf], [4, 4, inf, 5, inf]]
    shares = [[0.0, 0, 0.5, nan, 1]] * 4
    found = with_noise(measured(nn.Tanh), change=changes, estimated_bound=bounds, violations=shares)
    (change, bound), section = noise_drawn(found, monkeypatch)
    radii = list(found.models[0].summaries["gradient_change"].result.radii)
    assert change.y == [2.5, 5, 7.5, 10]  # medians; those at the first radius are 0
    assert change.x == radii[1:]
    assert change.quartiles is not None
    assert all(low <= y <= high for low, y, high in zip(*_around(change), strict=True))
    assert change.quartiles[0] != change.quartiles[1]
    assert bound.y == [2.5, 2.5, 2.5]  # the last is infinite, and half of those before it
    assert bound.is_bound
    assert "median change of first <1>, 0 at 0.001" in section.caption
    assert "median bound of first <1>, infinite at 0.0316, 0.1" in section.caption
    assert "exceeds its sample's bound in 0.0\N{NO-BREAK SPACE}% to 100.0" in section.caption


def _around(line: NoiseLine) -> tuple[Any, Any, Any]:
    assert line.quartiles is not None
    return line.quartiles[0], line.y, line.quartiles[1]


def test_an_infinite_bound_leaves_the_change_in_the_picture() -> None:
    found = model_of(nn.Tanh(), radii=(0.1, 1.0, 100.0))
    section = sections(found)["Gradients under noise"]
    assert section.pictures
    assert "change: from" in section.pictures[0].alt


def test_doubt_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def spying(networks: Any, **words: str) -> tuple[Picture, ...]:
        drawn.extend(networks)
        return (Picture("<svg></svg>", words["axis"]),)

    monkeypatch.setattr("flexure.report.geometry_sections.against_doubt", spying)
    torch.manual_seed(0)
    sure = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double().eval()
    with torch.no_grad():
        sure[2].weight.mul_(200)
    x = torch.randn(8, 6, dtype=torch.float64)
    found = measure_model(sure, [(x, sure(x).argmax(1))], measures=("curvature", "calibration"))
    measure_sections(found)
    ((_, doubts),) = drawn
    logits = sure(x).detach()
    odds = (logits - logits.max(1, keepdim=True).values).exp().sort(1).values[:, :-1].sum(1)
    assert doubts == pytest.approx((odds / (1 + odds)).tolist(), rel=1e-9, abs=0)
    assert min(doubts) < 1e-17  # where 1 − confidence would be 0


def model_of(*layers: nn.Module, samples: int = 6, **settings: Any) -> Measurements:
    """A small network with these layers between its first and its last, measured."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3)).eval()
    x = torch.randn(samples, 4)
    given = {"noise_samples": 4, "rate_samples": 4, **settings}
    return measure_model(network, [(x, network(x).argmax(1))], **given)


def infinite() -> Measurements:
    """A bound whose factors overflow."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    found = measure_model(network, [(torch.randn(4, 4).double(), torch.arange(4) % 3)])
    model = found.models[0]
    assert model.bound is not None
    rows = tuple(replace(row, share=math.nan, bound=math.inf) for row in model.bound.contributions)
    bound = replace(model.bound, vector=math.inf, contributions=rows)
    return replace(found, models=(replace(model, bound=bound, looseness=math.inf),))


def constant() -> Measurements:
    network = nn.Sequential(nn.Linear(6, 3)).eval()
    nn.init.zeros_(network[0].weight)
    return measure_model(network, [(torch.randn(8, 6), torch.arange(8) % 3)])


ODD_NAMES = ('<b>"&$x$' + "y" * 52, "_" + "long name " * 6)


def oddly_named() -> Measurements:
    torch.manual_seed(1)
    batches = [(torch.randn(6, 6), torch.arange(6) % 3)]
    return measure_model(
        network(nn.Tanh), batches, against=network(nn.SiLU), names=ODD_NAMES, noise_samples=2
    )


def deep() -> Measurements:
    """As many activations as no picture has room to number."""
    layers = [layer for _ in range(110) for layer in (nn.Tanh(), nn.Linear(5, 5))]
    return model_of(*layers, measures=("bound", "calibration"))


@pytest.mark.parametrize(
    "made",
    [
        constant,
        infinite,
        oddly_named,
        deep,
        pytest.param(lambda: model_of(nn.Tanh(), samples=1), id="one sample"),
        pytest.param(lambda: model_of(nn.Tanh(), radii=(0.1,)), id="one radius"),
        pytest.param(lambda: model_of(nn.Tanh(), measures=("bound",)), id="only a bound"),
        pytest.param(lambda: model_of(nn.ReLU(), radii=(1e-4, 1.0)), id="no change between kinks"),
        pytest.param(
            lambda: model_of(nn.Tanh(), orders=(1, 2, 12), measures=("rate",), directions=2),
            id="orders of two digits",
        ),
    ],
)
def test_odd_results_have_whole_pages(made: Callable[[], Measurements], tmp_path: Path) -> None:
    found = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of limits and glyphs that do not fit
        text = measure_page(tmp_path / "r.html", found, title="odd").read_text()
    assert text.rstrip().endswith("</html>")
    for model in found.models:
        assert escape(model.name, quote=False).split("&")[0] in text
        assert model.name.startswith("model") or model.name not in text or "<" not in model.name
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in svg
    words = re.sub(r"<(svg|style).*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", words)


def test_what_cannot_be_drawn_is_said() -> None:
    found = sections(constant())
    for title in (
        "Curvature and gradients over samples",
        "Curvature against confidence",
        "Gradients under noise",
        "Growth of derivatives",
    ):
        (told,) = found[title].text
        assert told.startswith("There is nothing to draw.")
        assert not found[title].pictures
    assert (
        "0 of 8 (8 zero) (Hessian norm, model)"
        in found["Curvature and gradients over samples"].text[0]
    )
    overflowed = sections(infinite())["A bound for every input: model"]
    assert "infinite" in overflowed.text[0]
    assert not overflowed.pictures
    assert overflowed.table is not None
    assert all(row[-1] == "–" for row in overflowed.table.rows)


def test_a_rate_that_is_not_defined_leaves_the_page_whole(tmp_path: Path) -> None:
    found = measured(nn.Tanh)
    model = found.models[0]
    summary = model.summaries["rate"]
    logs = summary.result.log_squares.clone()
    logs[:, 1] = -math.inf  # a slope through the others is refused
    result = replace(summary.result, log_squares=logs)
    summaries = {**model.summaries, "rate": replace(summary, result=result)}
    odd = replace(found, models=(replace(model, summaries=summaries),))
    (told,) = sections(odd)["Growth of derivatives"].text
    assert "first <1>, whose derivatives of order 2 are zero" in told
    measure_page(tmp_path / "r.html", odd, title="odd")


def test_three_digit_orders_and_many_activations_are_drawn() -> None:
    orders = [float(n) for n in (1, 50, 100, 150)]
    picture = fits([Fit("a", orders, [0.0, 50, 100, 150], 1.0, -1.0)], title="T", x_label="n",
                   y_label="log")  # fmt: skip
    assert "a 1" in picture.alt
    section = sections(deep())["A bound for every input: model"]
    assert "110 activations" in section.pictures[0].alt
    assert section.table is not None
    assert len(section.table.rows) == 40
