"""What common corruptions say in a report: every mean with its interval, substitutes marked."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flexure.methods.corruption_accuracy_result import CorruptedCell, CorruptionAccuracy
from flexure.report.attack_corruptions import (
    corruption_page,
    corruption_sections,
    corruption_summary,
)
from flexure.report.canvas import Picture
from tests.report.attack_results import hits

GROUPS = {"noise": ("gaussian_noise", "shot_noise"), "weather": ("frost",)}
N = 100


def cell(name: str, group: str, severity: int | None, right: int, both: bool) -> CorruptedCell:
    other = hits(N, max(0, right - 8)) if both else None
    text = "drawn, <no> photographs" if name == "frost" else None
    return CorruptedCell(name, group, severity, hits(N, right), other, text)


@cache
def evaluated(both: bool = True, severities: tuple[int, ...] = (1, 3, 5)) -> CorruptionAccuracy:
    cells = [
        cell(name, group, s, 90 - 10 * s - 5 * k, both)
        for group, names in GROUPS.items()
        for k, name in enumerate(names)
        for s in severities
    ]
    clean = cell("clean", "clean", None, 91, both)
    shift = cell("JPEG 75", "shift", None, 80, both)
    return CorruptionAccuracy(clean, tuple(cells), (shift,), ("steered <.7>", "plain"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the pictures are given; none is drawn."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for name in ("labelled_lines", "side_by_side", "estimates"):

        def spying(*given: Any, _name: str = name, **words: Any) -> Picture:
            calls[_name] = (given, words)
            return Picture("<svg></svg>", _name)

        monkeypatch.setattr(f"flexure.report.attack_corruptions.{name}", spying)
    return calls


def test_sentences_are_true_of_the_numbers() -> None:
    found = evaluated()
    told = corruption_summary(found)
    assert told[0].startswith("steered <.7> and plain on 100 images; 3 corruptions, 1 shift.")
    assert told[1].startswith("As they are: steered <.7> 91.0 [")
    assert told[2].startswith("Shift “JPEG 75”: steered <.7> 80.0 [")
    mean = found.mean
    assert mean is not None
    assert mean.difference is not None
    assert f"steered <.7> {100 * mean.accuracy.mean:.1f} [" in told[3]
    difference = mean.difference
    assert f"difference {100 * difference.mean:+.1f} [{100 * difference.low:+.1f}" in told[3]
    assert [line.split(":")[0] for line in told[4:6]] == ["Mean over noise", "Mean over weather"]
    assert any(line == "Note: * frost: drawn, <no> photographs." for line in told)
    assert not any("plain" in line for line in corruption_summary(evaluated(both=False)))


def test_a_difference_that_may_be_none_is_said_to_be_so() -> None:
    right = hits(N, 90)
    clean = CorruptedCell("clean", "clean", None, right, right)
    (_, told) = corruption_summary(CorruptionAccuracy(clean, ()))
    assert "the interval includes 0, no difference is shown" in told


def test_rows_are_clean_shifts_corruptions_and_the_mean(drawn: Any) -> None:
    found = evaluated()
    titles = [section.title for section in corruption_sections(found)]
    assert titles == [
        "Corruption by corruption",
        "steered <.7> minus plain",
        "Accuracy against the severity",
        "All numbers",
    ]
    ((rows, series), _) = drawn["side_by_side"]
    assert rows == [
        "as they are", "shift: JPEG 75", "gaussian_noise", "shot_noise", "frost*",
        "mean: all corruptions",
    ]  # fmt: skip
    (name, values), (other, _) = series
    assert (name, other) == ("steered <.7>", "plain")
    assert values[3].value == pytest.approx(100 * found.over("shot_noise").accuracy.mean)
    ((differences,), words) = drawn["estimates"]
    assert differences[3].value == pytest.approx(8.0)
    assert words["highlight"] == ["mean: all corruptions"]


def test_severities_start_at_the_images_as_they_are(drawn: Any) -> None:
    found = evaluated()
    corruption_sections(found)
    ((lines,), _) = drawn["labelled_lines"]
    assert [list(line.x) for line in lines] == [[0, 1, 3, 5]] * 2
    assert lines[0].y[0].value == pytest.approx(91.0)
    assert lines[0].y[2].value == pytest.approx(100 * found.at(3).accuracy.mean)
    reference = found.at(3).reference_accuracy
    assert reference is not None
    assert lines[1].y[2].value == pytest.approx(100 * reference.mean)


def test_the_table_has_all_numbers_and_marks_substitutes(drawn: Any) -> None:
    found = evaluated()
    section = corruption_sections(found)[-1]
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == [row["images"] for row in found.rows()]
    assert "frost*" in [row[0] for row in section.table.rows]
    assert "*: differs in kind" in section.caption
    assert section.table.columns[-3:] == ("1", "3", "5")


def test_shifts_alone_and_one_model_have_what_there_is(drawn: Any) -> None:
    whole = evaluated(both=False)
    alone = CorruptionAccuracy(whole.clean, (), whole.shifts)
    titles = [section.title for section in corruption_sections(alone)]
    assert titles == ["Corruption by corruption", "All numbers"]
    assert "estimates" not in drawn


@pytest.mark.parametrize("both", [True, False])
def test_pages_are_drawn_escaped_and_say_what_is_not_official(both: bool, tmp_path: Path) -> None:
    found = evaluated(both, (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = corruption_page(tmp_path / "r.html", found, title="A & B")
    text = path.read_text()
    assert "A &amp; B" in text
    assert "<.7>" not in text
    assert "are not the official files" in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    official = CorruptionAccuracy(found.clean, found.cells, official="cifar10-c:FOLDER")
    text = corruption_page(tmp_path / "o.html", official, title="t").read_text()
    assert "are not the official files" not in text
    assert "Corrupted images: cifar10-c:FOLDER." in text
