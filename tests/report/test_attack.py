"""What attacks say in a report: true sentences, every number, its limits, and odd results."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from flexure.calling import margin
from flexure.methods.attack_model_result import AttackReport, CertifiedShare
from flexure.methods.attack_model_shares import share
from flexure.report import run_table
from flexure.report.attack import attack_page, attack_sections, attack_summary
from flexure.report.attack_lines import Line
from flexure.report.canvas import Picture
from flexure.report.page import Section
from tests.report.attack_results import (
    ATTACKS,
    BOTH,
    attacked,
    certified,
    examples,
    hits,
    masking,
    report,
)

PICTURES = {
    "attack_curves": ("labelled_lines",),
    "attack_examples": ("example_picture",),
    "attack_masking": ("labelled_lines", "rays", "spreads", "surfaces"),
}


@cache
def whole() -> AttackReport:
    """Two models, both norms, both protocols, and everything else that there is."""
    models = (
        attacked("steered <0.7>", radii=BOTH, published=True),
        attacked("plain", radii=BOTH, fall=0.6, clean=92, seed=1, published=True),
    )
    return report(
        *models, examples=examples(2, norms=("linf", "l2")), masking=masking(),
        certified=certified(), notes=("inputs have no bounds",),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def lines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[list[Line]]:
    """The lines of each picture of accuracy; nothing is drawn but in the tests of pages."""
    given: list[list[Line]] = []
    if "tmp_path" in request.fixturenames:
        return given

    def spying(drawn: Any = (), *_: Any, **words: Any) -> Picture:
        if words.get("rooted"):
            given.append(list(drawn))
        return Picture("<svg></svg>", "")

    for module, names in PICTURES.items():
        for name in names:
            monkeypatch.setattr(f"flexure.report.{module}.{name}", spying)
    return given


def whole_sections() -> dict[str, Section]:
    return {section.title: section for section in attack_sections(whole())}


def test_every_part_is_there_in_order() -> None:
    assert list(whole_sections()) == [
        "Accuracy against the radius",
        "steered <0.7> against plain",
        "The published protocol: not an l_p robustness",
        "Adversarial examples",
        "Gradient masking of steered <0.7>: not masked",
        "The loss of steered <0.7> around samples",
        "Gradients and growing radii of steered <0.7>",
        "Certified accuracy",
        "Attack by attack",
        "What attacks warned of",
    ]


def test_what_is_not_there_has_no_section() -> None:
    found = report(attacked(attacks=("square",)))
    titles = [section.title for section in attack_sections(found)]
    assert titles == ["Accuracy against the radius", "Attack by attack"]


def test_sentences_are_true_of_the_numbers() -> None:
    found = whole()
    told = attack_summary(found)
    assert told[0].startswith("steered <0.7> and plain, attacked on 100 samples")
    assert f"steered <0.7> {found.clean} %; plain 92.0" in told[1]
    assert f"difference {found.difference()} points" in told[1]
    assert told[2].startswith("Gradient masking of steered <0.7> (l∞, ")
    assert told[3].startswith("steered <0.7> under l∞ attacks, worst case: ")
    assert f"{found.accuracy('linf', 1 / 255)} % at 1/255" in told[3]
    assert f"{found.accuracy('l2', 0.25)} % at 0.25" in told[4]
    assert f"{found.difference('linf', 1 / 255)} at 1/255" in told[5]
    assert told[7].startswith("steered <0.7>, certified in l2 (a bound from below): 12.0")
    assert told[8] == "Note: inputs have no bounds."


def test_a_difference_that_may_be_none_is_said_to_be_so() -> None:
    same = report(attacked("a"), attacked("b"))
    assert "no difference is shown, at: 0.5/255, 1/255" in attack_summary(same)[3]
    clear = report(attacked("a", fall=0.01), attacked("b", fall=0.9))
    assert "no difference is shown" not in " ".join(attack_summary(clear)).split("under")[1]


def test_of_many_radii_a_sentence_tells_some_with_the_first_and_last() -> None:
    radii = {"linf": tuple(k / 255 for k in range(1, 21))}
    told = attack_summary(report(attacked(radii=radii, fall=0.02)))[2]
    assert told.count("/255") == 5
    assert " at 1/255" in told
    assert " at 20/255." in told


def test_lines_are_the_worst_case_stressed_and_attacks_in_their_order(
    lines: list[list[Line]],
) -> None:
    found = report()
    attack_sections(found)
    ((first, second, third, worst),) = lines
    assert [first.label, second.label, third.label] == ["apgd-ce", "+ apgd-t", "+ fab-t"]
    assert worst.label == "worst case: + square"
    assert (worst.role, worst.band, first.band) == ("worst", True, False)
    values = [found.clean, *(found.accuracy("linf", eps) for eps in worst.x[1:])]
    assert [y.value for y in worst.y if y] == pytest.approx([100 * v.value for v in values])
    after = found.models[0].at[0].after("apgd-ce")
    assert first.y[1] is not None
    assert first.y[1].value == pytest.approx(100 * float(after.double().mean()))


def test_attacks_on_all_samples_have_lines_of_their_own(lines: list[list[Line]]) -> None:
    found = report(attacked(every=True, radii={"linf": (1 / 255,)}))
    section, *_ = attack_sections(found)
    (drawn,) = lines
    assert [line.label for line in drawn] == [*ATTACKS, "worst case"]
    alone = found.models[0].at[0].stages[2].alone
    assert alone is not None
    assert drawn[2].y[1] is not None
    assert drawn[2].y[1].value == pytest.approx(100 * float(alone.double().mean()))
    assert "accuracy under it alone" in section.caption


def test_one_attack_is_the_worst_case(lines: list[list[Line]]) -> None:
    attack_sections(report(attacked(attacks=("square",))))
    assert [line.label for line in lines[0]] == ["worst case: square"]


def test_certified_accuracy_is_drawn_in_its_norm_and_said_to_be_a_lower_bound(
    lines: list[list[Line]],
) -> None:
    sections = whole_sections()
    linf, l2, *others = lines
    assert [line.role for line in linf].count("certified") == 0
    (bound,) = (line for line in l2 if line.role == "certified")
    assert list(bound.x) == [0.1, 0.25, 0.5]
    assert not any(line.role == "certified" for drawn in others for line in drawn)
    assert "bound from below" in sections["Accuracy against the radius"].caption
    table = sections["Certified accuracy"].table
    assert table is not None
    assert table.rows[0][0] == "0.1"
    assert table.rows[0][2] == str(whole().accuracy("l2", 0.1))


def test_attack_by_attack_tells_all_counts_times_and_warnings() -> None:
    sections = whole_sections()
    table = sections["Attack by attack"].table
    assert table is not None
    stages = [(m, at, stage) for m in whole().models for at in m.at for stage in at.stages]
    assert len(table.rows) == len(stages)
    for row, (model, at, stage) in zip(table.rows, stages, strict=True):
        told = dict(zip(table.columns, row, strict=True))
        assert told["model"] == model.name
        assert int(told["tried"]) == int(stage.tried.sum())
        assert int(told["beaten"]) == stage.found
        assert told["right after it, %"] == str(share(at.after(stage.name)))
        left = int(stage.tried.sum()) - stage.found
        assert told["s per survivor"] == (f"{stage.seconds / left:.3g}" if left else "–")
    warned = sections["What attacks warned of"].table
    assert warned is not None
    assert warned.rows == (("apgd-t", "few gradients <0>"),)


def test_the_published_protocol_is_labelled_and_beside_the_standard_one() -> None:
    section = whole_sections()["The published protocol: not an l_p robustness"]
    assert "no l_p robustness" in section.text[0]
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == ["steered <0.7>", "plain"]
    found = whole().models[0]
    published, standard = (found.found("linf", 8 / 255, p) for p in ("published", "standard"))
    assert published is not None
    assert standard is not None
    told = ("2.5", "0.61", str(published.accuracy), str(standard.accuracy))
    assert section.table.rows[0][3:] == told


def test_a_model_that_is_always_wrong_is_no_error() -> None:
    found = report(attacked(clean=0, n=20), attacked("other", clean=1, n=20))
    assert "0.0 [0.0, 16.1] % at 8/255" in " ".join(attack_summary(found))
    titles = [section.title for section in attack_sections(found)]
    assert titles[:2] == ["Accuracy against the radius", "steered against other"]


def test_one_sample_has_no_wrong_intervals() -> None:
    told = " ".join(
        attack_summary(report(attacked("a", n=1, clean=1), attacked("b", n=1, clean=1)))
    )
    assert "nan" not in told


@pytest.mark.parametrize(
    "found",
    [
        whole,
        lambda: report(attacked(radii={"linf": (0.137,)}), examples=examples(3, (5,))),
        lambda: report(masking=masking("undecided", broken=True)),
        lambda: report(
            attacked(clean=0), masking=replace(masking("masked"), surface=None, reasons=())
        ),
        lambda: report(attacked("a_b $x$ " * 9), examples=examples(1, (1, 8, 8))),
    ],
)
def test_pages_are_whole_escaped_and_need_nothing_else(found: Any, tmp_path: Path) -> None:
    made = found()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = attack_page(
            tmp_path / "r.html", made, title="A & B", classes=["<cat>", "dog", "frog"],
            run=run_table({"config": {"eps": 1}, "versions": {}, "commit": "c", "platform": "p",
                           "date": "d"}),
        )  # fmt: skip
    text = path.read_text()
    assert "A &amp; B" in text
    assert not re.search(r'(src|href)="(?!#|data:image/png;base64)', text)
    outside = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert "nan" not in outside
    assert "None<" not in outside
    for name in (model.name for model in made.models):
        assert escape(name.strip()) in text
        assert "<" not in name or name not in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_limits_say_what_was_not_examined(tmp_path: Path) -> None:
    without = attack_page(tmp_path / "a.html", report(), title="t").read_text()
    assert "Whether gradients are masked: that was not examined" in without
    assert "bounds the robust accuracy from above" in without
    assert "bound from below" not in without
    found = report(masking=replace(masking(), surface=None, checks=()), certified=certified())
    text = attack_page(tmp_path / "b.html", found, title="t").read_text()
    assert "that was not examined" not in text
    assert "bound from below" in text


def test_the_same_result_gives_the_same_page(tmp_path: Path) -> None:
    pages = [
        attack_page(tmp_path / f"{k}.html", report(examples=examples(1)), title="t").read_bytes()
        for k in range(2)
    ]
    assert pages[0] == pages[1]


def test_certificates_are_told_without_attacks_at_their_radii() -> None:
    found = report(certified=(CertifiedShare(0.3, share(hits(100, 5))),))
    (section,) = (s for s in attack_sections(found) if s.title == "Certified accuracy")
    assert section.table is not None
    assert section.table.rows[0][2] == "–"


def test_torch_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    attack_sections(report(masking=masking(), examples=examples()))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_flat_cross_entropy_is_not_said_of_all_gradients() -> None:
    found = masking("masked")
    norms = found["gradient norms"]
    entropy, odds = ({"quantiles": [0.0] * 5, "zero": k, "not finite": 0} for k in (50, 0))
    flat = replace(norms, numbers={"cross-entropy": entropy, "margin": odds}, suspicious=True)
    for check, told in (
        (flat, "Attacks on the cross-entropy fail"),
        (norms, "Attacks that follow"),
    ):
        section = next(
            one for one in attack_sections(report(masking=replace(found, checks=(check,))))
            if one.title == "Gradient masking of steered: masked"
        )  # fmt: skip
        assert section.text[0].startswith(told)


def test_above_zero_a_label_may_still_win() -> None:
    """Of logits 0, -0.5, -0.5 the label's log-odds are below 0, and it is predicted."""
    z = torch.tensor([[0.0, -0.5, -0.5]])
    assert float(margin(z, torch.tensor([0]))) < 0
    assert int(z.argmax()) == 0
    section = whole_sections()["The loss of steered <0.7> around samples"]
    assert "of more it may still be right" in section.caption


def test_growing_radii_are_in_levels_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "flexure.report.attack_masking.labelled_lines",
        lambda _, **words: given.append(words) or Picture("<svg></svg>", ""),
    )
    attack_sections(report(masking=masking()))
    assert given[0]["scale"] == 255
    assert "1/255" in given[0]["x_label"]
