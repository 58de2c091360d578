"""What a search for a robust dial says: validation chooses, test data tell, oracles are named."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import ORACLE, RobustDialSearch
from flexure.report.attack_dials import (
    robust_dial_page,
    robust_dial_sections,
    robust_dial_summary,
)
from flexure.report.canvas import Picture
from flexure.report.page import Section
from tests.report.dial_results import (
    BETAS,
    CS,
    EPS,
    candidate,
    curve,
    grid,
    groups_dial,
    row,
    searched,
    shared,
)

PICTURES = {
    "attack_dials": ("labelled_lines", "side_by_side"),
    "attack_dial_search": ("candidate_scatter", "dial_map", "group_dials"),
}
Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the pictures are given; none is drawn."""
    calls: Calls = {}
    for module, names in PICTURES.items():
        for name in names:

            def spying(*given: Any, _name: str = name, **words: Any) -> Picture:
                calls.setdefault(_name, []).append((given, words))
                return Picture("<svg></svg>", _name)

            monkeypatch.setattr(f"flexure.report.{module}.{name}", spying)
    return calls


def sections(found: RobustDialSearch) -> dict[str, Section]:
    return {section.title: section for section in robust_dial_sections(found)}


@cache
def without_test() -> RobustDialSearch:
    candidates = (candidate(None, "plain", 0.91, 0.16), *grid((None,)))
    return searched(
        candidates=candidates, chosen=candidates[5], rows=(), oracle=None, curve=(),
        shared_samples=3,
    )  # fmt: skip


def test_sentences_are_true_and_separate_validation_from_test(drawn: Calls) -> None:
    chosen, attacked, clean, oracle = robust_dial_summary(searched())
    assert chosen.startswith("Chosen for l∞ 1/255 on 300 validation samples, among 28 candidates")
    assert "beta 0.6 to 0.9, c 0 to 0.6 by 4 groups, calibrated (mean)" in chosen
    assert "50.0\N{NO-BREAK SPACE}% right under attack" in chosen
    found = searched()
    assert found.gain is not None
    assert f"difference {found.gain} points, sample by sample" in attacked
    assert "On 100 test samples, by apgd-ce" in attacked
    assert "-1.0 [" in clean
    assert "within 1 point in the mean; the interval goes beyond" in clean
    assert oracle.startswith(
        "Oracle: best shared dial on test data, for comparison only: beta = 0.6"
    )


def test_the_loss_is_told_by_mean_and_interval() -> None:
    found = searched()
    for mean, interval, text in (
        (True, True, "within 1 point by the interval, too"),
        (False, False, "The loss is beyond 1 point."),
    ):
        last = replace(found.rows[-1], mean_within=mean, interval_within=interval)
        told = robust_dial_summary(replace(found, rows=(*found.rows[:-1], last)))
        assert text in told[2]


def test_without_test_data_no_gain_is_told(drawn: Calls) -> None:
    _, told, note = robust_dial_summary(without_test())
    assert told.startswith("No test data was given, so no gain is reported")
    assert note.startswith("Note: 3 samples occur in the validation and the test data")
    assert list(sections(without_test())) == ["Both dials", "What the choice rests on", "Account"]


def test_a_choice_of_the_plain_network_is_told(drawn: Calls) -> None:
    found = searched()
    plain = replace(
        found, candidates=found.candidates[:1], chosen=found.candidates[0], rows=found.rows[:1]
    )
    assert "nothing was gained and nothing lost" in robust_dial_summary(plain)[1]
    assert "The chosen dial, group by group" not in sections(plain)


def test_every_part_is_there(drawn: Calls) -> None:
    assert list(sections(searched())) == [
        "The chosen dials on test data",
        "The chosen dials at every radius",
        "Accuracy against beta",
        "The chosen dial, group by group",
        "Both dials",
        "What the choice rests on",
        "Account",
    ]


def test_the_curve_marks_the_choice_and_the_oracle_and_says_c(drawn: Calls) -> None:
    found = searched(curve=curve(0.25, "mean"))
    caption = sections(found)["Accuracy against beta"].caption
    assert "c = 0.25, calibrated (mean)" in caption
    ((lines,), words) = drawn["labelled_lines"][0]
    assert [line.label for line in lines] == ["no attack", "l∞ 0.5/255", "l∞ 2/255", "l∞ 1/255"]
    assert lines[-1].role == "worst"  # the radius it was chosen for, on top
    assert list(lines[0].x) == list(BETAS)
    clean = [100 * point.clean.value for point in found.curve]
    assert [value.value for value in lines[0].y] == pytest.approx(clean)
    chosen, oracle = words["marks"]
    assert chosen.label == "best shared dial on validation data: beta = 0.6, c = 0.25"
    assert oracle.label == f"{ORACLE}: beta = 0.6, c = 0.25"
    assert (chosen.x, oracle.x) == (0.6, 0.6)


def test_tables_hold_every_row_and_the_oracle_last(drawn: Calls) -> None:
    found = searched()
    table = sections(found)["The chosen dials on test data"].table
    assert table is not None
    assert len(table.rows) == len(found.rows) + 1
    assert table.rows[0][0] == "plain network"
    assert table.rows[-1][0].startswith(ORACLE)
    assert table.rows[1][0] == "shared, c = 0.5: beta = 0.8, c = 0.5, not calibrated"
    assert table.rows[1][4] == str(found.rows[1].robust_difference[EPS])
    every = sections(found)["The chosen dials at every radius"].table
    assert every is not None
    assert len(every.rows) == 3 * (len(found.rows) + 1)
    told = found.rows[1].robust_difference[EPS]
    assert every.rows[4][3:] == (str(told), f"{told.won} / {told.lost}")


def test_maps_hold_each_candidate_and_bar_those_that_lose_too_much(drawn: Calls) -> None:
    found = searched()
    sections(found)
    assert len(drawn["dial_map"]) == 2  # one a calibration
    ((betas, cs, values), words) = drawn["dial_map"][1]
    assert (tuple(betas), tuple(cs)) == (BETAS, CS)
    for one in found.candidates:
        if one.stage == "shared" and one.dial is not None and one.dial.match == "mean":
            (beta,), (c,) = one.dial.betas.values(), one.dial.cs.values()
            place = cs.index(c), betas.index(beta)
            assert values[place] == pytest.approx(100 * one.robust[EPS])
            assert words["barred"][place] == (not one.allowed)
    assert values[:, -1] == pytest.approx(16.0)  # beta = 1: the plain network, whatever c
    assert words["chosen"] == (0.6, 0.25)
    assert words["title"] == "Calibrated: mean"


def test_beta_1_of_smooth_activations_is_not_called_the_plain_network(drawn: Calls) -> None:
    ends = [candidate(shared(1.0, 0.0, match), "shared", 0.8, 0.3) for match in (None, "mean")]
    below = [one for one in grid() if one.dial and one.dial.betas != {ALL_SITES: 1.0}]
    plain = candidate(None, "plain", 0.91, 0.16)
    by_group = candidate(groups_dial(), "groups", 0.905, 0.5)
    found = searched(
        candidates=(plain, *below, *ends, by_group), plain_at_one=False, notes=("it is <smooth>",)
    )
    shown = sections(found)
    for (_, _, values), words in drawn["dial_map"]:
        assert values[:, -1] == pytest.approx(30.0)
        assert words["barred"][:, -1].all()
    ((_,), words) = drawn["labelled_lines"][0]
    assert "plain network" not in words["x_label"]
    assert "at beta = 1 a unit is piecewise affine" in (
        shown["The chosen dial, group by group"].caption
    )
    assert robust_dial_summary(found)[-1] == "Note: it is <smooth>."
    without = searched(candidates=(plain, *below, by_group), plain_at_one=False)
    sections(without)
    assert drawn["dial_map"][-1][0][0] == list(BETAS[:-1])  # never the plain network's place


def test_the_plain_network_has_no_loss_and_one_sample_no_interval(drawn: Calls) -> None:
    found = searched()
    one = replace(found.rows[1].clean_difference, low=math.nan, high=math.nan)
    rows = (found.rows[0], replace(found.rows[1], clean_difference=one))
    table = sections(replace(found, rows=rows))["The chosen dials on test data"].table
    assert table is not None
    assert [line[-1] for line in table.rows[:2]] == ["\N{EN DASH}", "yes / -"]
    chosen = replace(found.rows[-1], clean_difference=one)
    told = robust_dial_summary(replace(found, rows=(found.rows[0], chosen)))
    assert "one sample has no interval" in told[2]
    assert "nan" not in " ".join(told)


def test_one_dial_alone_has_no_map(drawn: Calls) -> None:
    some = [one for one in grid((None,)) if one.dial and set(one.dial.cs.values()) == {0.5}]
    found = searched(candidates=(candidate(None, "plain", 0.91, 0.16), *some), chosen=some[0])
    assert "Both dials" not in sections(found)


def test_groups_are_those_of_the_choice_or_of_the_best_and_say_which(drawn: Calls) -> None:
    table = sections(searched())["The chosen dial, group by group"].table
    assert table is not None
    assert table.rows[1] == ("layer1", "0.7", "0.2", "layer1.<act>")
    plain = candidate(None, "plain", 0.91, 0.16)
    lower = candidate(groups_dial(4, None), "groups", 0.91, 0.3)
    best = candidate(shared(0.7, 0.25), "shared", 0.91, 0.6)
    found = searched(
        candidates=(plain, best, lower), chosen=best, rows=(row("a", None, 91, (40, 16, 1)),)
    )
    section = sections(found)["The best dial by groups, group by group"]
    assert "It was not chosen" in section.caption
    many = searched(groups={f"layer{k}": [f"s{i}" for i in range(30)] for k in range(4)})
    table = sections(many)["The chosen dial, group by group"].table
    assert table is not None
    assert table.rows[0][3].endswith("s11 and 18 more")


def test_the_scatter_has_all_candidates_the_limit_and_the_choice(drawn: Calls) -> None:
    found = searched()
    sections(found)
    ((groups,), words) = drawn["candidate_scatter"][0]
    assert sum(len(group.clean) for group in groups) == len(found.candidates) - 1
    assert words["limit"] == pytest.approx(90.0)
    assert words["chosen"] == pytest.approx((90.5, 50.0))
    assert words["plain"] == pytest.approx((91.0, 16.0))


@pytest.mark.parametrize("found", [searched, without_test])
def test_pages_are_drawn_escaped_and_need_nothing_else(found: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = robust_dial_page(tmp_path / "r.html", found(), title="A <dial>")
    text = path.read_text()
    assert "A &lt;dial&gt;" in text
    assert "<act>" not in text
    assert not re.search(r'(src|href)="(?!#|data:image/png;base64)', text)
    outside = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert "nan" not in outside
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
