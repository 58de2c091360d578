"""The spiral and the sine: exact at beta = 1, repeatable, and written as measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexure.recipes import spiral

TINY = spiral.Config(train=60, test=100, spiral_steps=20, sine_steps=10, grid=9)


@pytest.fixture(scope="module")
def tiny() -> spiral.Findings:
    return spiral.measure(TINY)


def test_every_setting_is_measured_and_c_means_nothing_at_beta_1(tiny: spiral.Findings):
    settings = [(c, beta) for c in TINY.cs for beta in TINY.betas]
    assert [(b.setting.c, b.setting.beta) for b in tiny.boundaries] == settings
    assert [(f.setting.c, f.setting.beta) for f in tiny.fitted] == settings
    margins = {(b.setting.beta, b.setting.c): b.margin for b in tiny.boundaries}
    assert torch.equal(margins[1.0, 0.5], margins[1.0, 1.0])
    assert not torch.equal(margins[0.9, 0.5], margins[0.9, 1.0])
    curves = {(f.setting.beta, f.setting.c): f.y for f in tiny.fitted}
    assert torch.equal(curves[1.0, 0.5], curves[1.0, 1.0])
    assert not torch.equal(curves[0.9, 0.5], curves[1.0, 0.5])


def test_accuracy_and_margin_are_those_of_the_trained_network():
    config = replace(TINY, sine_steps=0, spiral_steps=400, grid=41)
    found = spiral.measure(config).boundaries[0]
    points, arms = spiral.spiral(4000, config, torch.Generator().manual_seed(7))
    # The margin at the nearest grid point classifies fresh points as the network does.
    index = ((points + 1.15) / 2.3 * 40).round().long().clamp(0, 40)
    answers = (found.margin[index[:, 1], index[:, 0]] > 0).long()
    assert (answers == arms).double().mean().item() == pytest.approx(found.accuracy, abs=0.08)
    assert found.accuracy > 0.7  # so that a transposed grid could not pass


def test_the_arms_are_half_a_turn_apart():
    config = replace(TINY, noise=0.0)
    points, arms = spiral.spiral(500, config, torch.Generator().manual_seed(0))
    radius = points.norm(dim=1)
    angle = torch.atan2(points[:, 1], points[:, 0]) - 2 * math.pi * radius - math.pi * arms
    assert torch.allclose(torch.cos(angle), torch.ones(500), atol=1e-4)
    assert radius.min() > 0.1
    assert radius.max() <= 1


def test_the_same_seed_measures_the_same(tiny: spiral.Findings):
    torch.rand(3)
    again = spiral.measure(TINY)
    assert spiral.numbers(again) == spiral.numbers(tiny)
    assert spiral.numbers(spiral.measure(replace(TINY, seed=1))) != spiral.numbers(tiny)


def test_the_regression_can_be_left_out():
    found = spiral.measure(replace(TINY, sine_steps=0))
    assert found.fitted == ()
    assert [section.title for section in spiral.sections(found)] == [
        "Decision boundary of a spiral"
    ]
    assert len(spiral.summary(found)) == 1


def test_wilson_against_its_defining_equation():
    # Its ends are the p with |share - p| = z sqrt(p (1 - p) / n).
    for share, n in ((0.9, 50), (0.5, 2000), (0.0, 10), (1.0, 10)):
        low, high = spiral.wilson(share, n)
        assert 0 <= low <= share <= high <= 1
        for end in {low, high} - {0.0, 1.0}:
            wide = 1.959963984540054 * math.sqrt(end * (1 - end) / n)
            assert abs(share - end) == pytest.approx(wide, rel=1e-9)
    assert spiral.wilson(0.0, 10)[1] > 0.2
    assert spiral.wilson(1.0, 10)[0] < 0.8


def test_accuracies_have_intervals_and_the_sine_says_why_not(tiny: spiral.Findings):
    accuracy, error = spiral.summary(tiny)
    low, high = tiny.boundaries[0].interval
    assert f"({100 * low:.1f} to {100 * high:.1f}) at beta 1," in accuracy
    assert "100 fresh points" in accuracy
    assert "no interval" in error
    assert spiral.numbers(tiny)["spiral"][0]["test_points"] == 100


def test_run_writes_what_it_returns(tmp_path: Path):
    results = spiral.run(TINY, tmp_path)
    assert json.loads((tmp_path / "spiral.json").read_text()) == results
    assert results["seed"] == TINY.seed
    page = (tmp_path / "spiral.html").read_text()
    assert page.count("<svg ") == 12
    assert "does not show" in page


def test_the_full_size_is_the_papers():
    config = spiral.Config()
    assert (config.spiral_steps, config.sine_steps) == (2000, 20_000)
    assert config.betas == (1.0, 0.9, 0.5)
    assert spiral.Config.small().spiral_steps == 2000
