"""The demo: one results file and one page, and no work for a folder that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexure.contracts import FlexureError
from flexure.recipes import demo, digits, spiral

TINY = demo.Config(
    digits.Config(seeds=(0, 1), hidden=(16,), epochs=2, betas=(0.5, 1.0)),
    spiral.Config(train=60, test=100, spiral_steps=20, sine_steps=10, grid=9),
)


def test_it_writes_results_and_report_and_says_where(tmp_path: Path):
    found = demo.run(TINY, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.html"}
    assert json.loads(found.results.read_text()) == found.payload
    assert set(found.payload["numbers"]) == {"digits", "spiral"}
    page = found.report.read_text()
    for words in (
        "Score against beta",
        "What the chosen beta gained",
        "Decision boundary",
        "Regression",
        "does not show",
        "digits seeds",
    ):
        assert words in page
    assert str(found.report) in str(found)
    assert all(line in str(found) for line in found.lines)


def test_an_unwritable_folder_fails_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(digits, "measure", lambda config, **more: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FlexureError, match="folder"):
        demo.run(TINY, tmp_path / "file" / "out")


def test_the_demo_is_small():
    assert demo.Config.small().digits == digits.Config.small()
    assert demo.Config.small().spiral == spiral.Config.small(seed=50)


def test_one_seed_decides_both_recipes():
    config = demo.Config.small(seed=7)
    assert config.digits.seeds == (7, 8, 9, 10, 11)
    assert config.spiral.seed == 7


def test_every_stage_is_told(tmp_path: Path):
    told: list[str] = []
    demo.run(TINY, tmp_path, progress=told.append)
    assert told == [
        "digits: seed 0 (1 of 2)",
        "digits: seed 1 (2 of 2)",
        "spiral: 20 steps",
        "sine: 10 steps",
    ]
