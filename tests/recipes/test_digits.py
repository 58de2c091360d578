"""The digits' transfer: disjoint data, paired gains, pooled as stated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexure.contracts import FlexureError
from flexure.recipes import digits

TINY = digits.Config(seeds=(0, 1), hidden=(16,), epochs=2, betas=(0.5, 1.0))


@pytest.fixture(scope="module")
def tiny() -> digits.Findings:
    return digits.measure(TINY)


def test_every_seed_has_a_search_on_disjoint_halves(tiny: digits.Findings):
    assert [t.seed for t in tiny.transfers] == [0, 1]
    for transfer in tiny.transfers:
        # 896 images of 5-9; the search itself refuses splits that share samples.
        assert transfer.search.samples == {"train": 224, "val": 224, "test": 448}
        assert transfer.search.betas == (0.5, 1.0)
        assert transfer.gain.n == 448
        difference = transfer.test.best - transfer.test.baseline
        assert transfer.gain.points == pytest.approx(100 * difference)


def test_the_network_and_the_pixels_are_better_than_guessing(tiny: digits.Findings):
    for transfer in tiny.transfers:
        assert transfer.source_accuracy > 0.5
        assert transfer.pixels > 0.9
        assert transfer.test.baseline > 0.4


def test_the_pool_is_a_t_interval_over_seeds():
    pooled = digits.pool([1.0, 2.0, 3.0])
    half = 4.302652729911275 / 3**0.5  # t quantile of 2 degrees of freedom, sd 1
    assert pooled.points == pytest.approx(2.0)
    assert (pooled.low, pooled.high) == pytest.approx((2 - half, 2 + half))
    assert (digits.pool([-1.0, 0.0, 2.0]).wins, digits.pool([-1.0, 0.0, 2.0]).losses) == (1, 1)


def test_the_pooled_gain_is_the_mean_of_the_seeds(tiny: digits.Findings):
    gains = [t.gain.points for t in tiny.transfers]
    assert tiny.pooled.points == pytest.approx(sum(gains) / 2)


def test_the_same_seeds_measure_the_same(tiny: digits.Findings):
    again = digits.measure(replace(TINY, seeds=(1, 0)))
    kept = [(t.source_accuracy, t.search.scores, t.gain, t.pixels) for t in tiny.transfers]
    assert [(t.source_accuracy, t.search.scores, t.gain, t.pixels) for t in again.transfers] == [
        kept[1],
        kept[0],
    ]
    assert kept[0] != kept[1]


def test_a_loss_is_reported_as_one(tiny: digits.Findings):
    lost = replace(tiny, pooled=digits.pool([-1.0, -1.1]))
    assert "made it worse" in digits.summary(lost)[0]
    none = replace(tiny, pooled=digits.pool([-1.0, 1.2]))
    assert "no gain has been shown" in digits.summary(none)[0]


def test_the_lines_say_what_the_intervals_are(tiny: digits.Findings):
    lines = digits.summary(tiny)
    mean = digits.pool([100 * t.pixels for t in tiny.transfers])
    assert f"{mean.points:.1f} % ({mean.low:.1f} to {mean.high:.1f})" in lines[1]
    assert lines[-1].endswith("t-intervals over seeds, and all seeds share the same images.")


def test_one_seed_is_refused():
    with pytest.raises(FlexureError, match="two seeds"):
        digits.measure(replace(TINY, seeds=(0,)))


def test_run_writes_what_it_returns(tmp_path: Path):
    results = digits.run(TINY, tmp_path)
    assert json.loads((tmp_path / "digits.json").read_text()) == results
    assert len(results["numbers"]["seeds"]) == 2
    page = (tmp_path / "digits.html").read_text()
    assert page.count("<svg ") == 2
    assert "body.1" in page


@pytest.mark.slow
def test_the_small_size_finds_the_gain_that_the_report_speaks_of():
    found = digits.measure(digits.Config.small())
    assert found.pooled.low > 0
    assert all(t.pixels > t.test.best - 0.02 for t in found.transfers)
