"""What a search says in a report, for every kind of search there is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexure.report import search_page, search_sections, search_summary


def setting(beta: float | None, c: float | None, score: float) -> SimpleNamespace:
    return SimpleNamespace(beta=beta, c=c, score=score, error=0.01)


def search(**changes: Any) -> SimpleNamespace:
    settings = [setting(0.8, 0.5, 0.9), setting(0.9, 0.5, 0.92), setting(1.0, 0.5, 0.85)]
    gain = SimpleNamespace(points=2.0, low=0.5, high=3.5, level=0.95, wins=9, losses=3, n=300)
    rows = [{"site": "body.1", "kind": "module", "calls": "1", "what will happen": "swap"}]
    found = {
        "settings": settings,
        "best": settings[1],
        "baseline": settings[2],
        "within_one_se": settings[1:2],
        "gain": gain,
        "test": SimpleNamespace(best=0.91, baseline=0.89),
        "report": SimpleNamespace(rows=lambda: rows, summary="1 site to steer"),
        "notes": (),
        "samples": {"train": 200, "val": 100, "test": 300},
    }
    return SimpleNamespace(**(found | changes))


def plain(texts: Any) -> str:
    return " ".join(texts).replace("\N{NO-BREAK SPACE}", " ")


def gain(low: float, high: float) -> SimpleNamespace:
    return SimpleNamespace(points=1.0, low=low, high=high, level=0.95, wins=1, losses=1, n=10)


def test_the_summary_says_choice_baseline_and_gain_with_its_interval():
    text = plain(search_summary(search()))
    assert "Chosen on 100 validation samples: beta = 0.9, c = 0.5, accuracy 92.0 % ± 1.0" in text
    assert "beta = 1: 85.0 % ± 1.0" in text
    assert "1 of 3 settings" in text
    assert "On 300 test samples: +2.00 points (95 % interval +0.50 to +3.50)" in text
    assert "91.0 % against 89.0 % at beta = 1; 9 samples won, 3 lost" in text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 2.0, "lies above zero"),
        (-0.1, 2.0, "no gain has been shown"),
        (0.0, 2.0, "no gain has been shown"),
        (-2.0, -0.1, "made it worse"),
    ],
)
def test_the_verdict_is_the_intervals(low: float, high: float, words: str):
    assert words in plain(search_summary(search(gain=gain(low, high))))


def test_without_test_data_no_gain_is_claimed():
    text = plain(search_summary(search(gain=None, test=None)))
    assert "no gain is reported" in text
    assert "interval" not in text


def test_choosing_the_baseline_gains_nothing():
    same = search().settings[2]
    text = plain(search_summary(search(best=same, baseline=same)))
    assert "nothing was gained and nothing lost" in text


def test_an_untouched_network_as_baseline_is_called_that():
    text = plain(search_summary(search(baseline=setting(None, None, 0.88))))
    assert "the untouched network: 88.0 %" in text
    assert "at beta = 1" not in text
    assert "The untouched network took no part in the choice." in text


def test_nothing_is_said_of_beta_one_where_that_is_not_the_unchanged_network(tmp_path: Path):
    page = search_page(
        tmp_path / "s.html", search(baseline=setting(None, None, 0.88)), title="A search"
    ).read_text()
    assert "gained over the untouched network" in page
    assert "1 is the unchanged network" not in page
    relu = search_page(tmp_path / "r.html", search(), title="A search").read_text()
    assert "gained over beta = 1" in relu
    assert "1 is the unchanged network" in relu


def test_notes_and_missing_discordance_are_told():
    same = SimpleNamespace(points=0.0, low=0.0, high=0.0, level=0.95, wins=0, losses=0, n=10)
    text = plain(search_summary(search(gain=same, notes=("interpolated features, computed at 7",))))
    assert "no discordant samples" in text
    assert "Interpolated features, computed at 7." in text


def test_one_curve_for_each_choice_of_the_second_dial():
    rows = [setting(b, c, 0.9) for c in (0.0, 0.5) for b in (0.8, 0.9)] + [setting(1, 0, 0.9)]
    (picture,) = search_sections(search(settings=rows))[0].pictures
    labels = [text for text in re.findall(r"<!-- (.*?) -->", picture.svg) if text.startswith("c =")]
    assert labels == ["c = 0", "c = 0.5"]


def test_a_balanced_row_is_one_curve():
    rows = [setting(b, b * b / (1 + b * b), 0.9) for b in (0.7, 0.8, 0.9, 1.0)]
    (picture,) = search_sections(search(settings=rows))[0].pictures
    assert "<!-- balanced c -->" in picture.svg


def test_a_grid_of_beta_1_alone_can_be_drawn():
    only = setting(1.0, 0.5, 0.9)
    found = search(settings=[only], best=only, baseline=only, within_one_se=[only])
    assert search_sections(found)[0].pictures


def test_the_page_has_sites_score_and_limits(tmp_path: Path):
    text = search_page(tmp_path / "report.html", search(), title="A search").read_text()
    for words in ("What is steered", "body.1", "Score against beta", "does not show"):
        assert words in text
