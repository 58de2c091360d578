"""What a measurement says in a report: every number with its interval, and nothing too much."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from flexure.methods.measurements import Measurements, measure_model
from flexure.report.measure import measure_page, measure_sections, measure_summary


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
    assert {"Normalised curvature, median", "Curvature rate", "Accuracy"} <= heads
    assert not any("mean" in head for head in heads)  # of norms: those of a few samples
    for line in told[1:]:
        if not line.startswith("Note:"):
            assert line.count("[") == 3, line  # one, the other, and the pair
            assert "Ratio" in line or "Difference" in line


def test_numbers_in_the_table_are_those_of_the_result() -> None:
    found = measured(nn.Tanh, nn.SiLU)
    table = measure_sections(found)[0].table
    assert table is not None
    by_name = {row[0]: row for row in table.rows}
    assert len(by_name) == len(found.rows())
    summary = found.models[0].curvature
    assert summary is not None
    told = float(by_name["Hessian norm, mean"][1].split(" ")[0])
    assert told == pytest.approx(float(summary.mean["hessian_norm"]), rel=1e-3)


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


def test_samples_without_gradient_leave_the_page_whole(tmp_path: Path) -> None:
    constant = nn.Sequential(nn.Linear(6, 3)).eval()
    nn.init.zeros_(constant[0].weight)
    found = measure_model(constant, [(torch.randn(8, 6), torch.arange(8) % 3)])
    measure_page(tmp_path / "r.html", found, title="constant")
