"""What a comparison says in a report: every number with its interval, and nothing too much."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexure.methods.tune_result import ArmResult, Candidate, Run, TuneResult, compared
from flexure.report import tune_page, tune_sections, tune_summary

LABELS = torch.arange(40) % 4


def run(arm: str, seed: int, wrong: int, learned: float | None = None) -> Run:
    predictions = LABELS.clone()
    predictions[seed : seed + wrong] += 1
    values = torch.linspace(0, 1, 8) if learned is None else torch.full((8,), learned)
    sites = {"a": values, "b": values / 2} if arm == "trainable_ct" else {}
    return Run(
        arm=arm,
        setting="",
        seed=seed,
        parameters=32 if sites else 0,
        head_parameters=12,
        losses=(1.0, 0.5),
        val_accuracy=(0.5, 0.75),
        kept=2,
        seconds=1.5,
        step_bytes=3 * 2**20,
        predictions=predictions,
        betas=sites,
        cs=sites,
    )


def arm(name: str, runs: tuple[Run, ...], probe: tuple[Run, ...], **changes: Any) -> ArmResult:
    accuracy, accuracies, difference = compared(runs, probe, LABELS)
    given: dict[str, Any] = {
        "name": name, "method": {"method": name, "init_beta": 0.8, "init_c": 0.5}, "setting": "",
        "candidates": (Candidate("", 0.75),), "runs": runs, "accuracy": accuracy,
        "accuracies": accuracies, "difference": difference,
    }  # fmt: skip
    return ArmResult(**(given | changes))


def result(seeds: tuple[int, ...] = (1, 2, 3)) -> TuneResult:
    probe = tuple(run("probe", seed, 10) for seed in seeds)
    better = tuple(run("trainable_ct", seed, 2) for seed in seeds)
    rated = (Candidate("rate 0.01", 0.75, 0.01), Candidate("rate 0.1", None, 0.1, "not finite"),
             Candidate("rate 0.001", 0.5, 0.001))  # fmt: skip
    arms = (
        arm("probe", probe, probe),
        arm("steered", tuple(replace(r, arm="steered") for r in probe), probe),
        arm("trainable_ct", better, probe, setting="rate 0.01", candidates=rated),
    )
    return TuneResult(
        arms=arms,
        seeds=seeds,
        epochs=2,
        batch_size=32,
        schedule=(1.0, 1.0),
        head="head",
        classes=4,
        samples={"train": 100, "val": 50, "test": 40},
        shared={"val-train": 1},
        timing={"probe": 1.0},
    )


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_summary_has_every_arm_and_its_interval() -> None:
    text = plain("\n".join(tune_summary(result())))
    assert "3 ways to adapt one network, 3 seeds, 2 epochs; samples: 100 train, 50 val" in text
    assert re.search(r"probe: 75\.0 % on test data, \d\d\.\d % to \d\d\.\d %\.", text)
    assert "steered: 75.0 % on test data; right on the same samples as the probe" in text
    assert re.search(r"trainable_ct \(rate 0\.01\): 95\.0 % on test data; against the probe "
                     r"\+20\.00 points \(95 % interval \+\d", text)  # fmt: skip
    assert "Note: 1 samples are in both val-train." in text
    assert "trainable_ct, rate 0.1: failed (not finite)." in text
    assert (
        "Note: trainable_ct: the chosen learning rate is the largest of the sweep; widen it."
        in text
    )


def test_the_sections_of_several_seeds() -> None:
    sections = {section.title: section for section in tune_sections(result())}
    assert list(sections) == [
        "The arms", "Against the probe", "Learning curves", "What was tried",
        "What trainable_ct learned", "What trainable_ct learned, over depth",
    ]  # fmt: skip
    table = sections["The arms"].table
    assert table is not None
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["probe"]["against the probe, points"] == "–"
    assert rows["steered"]["against the probe, points"] == "right on the same samples"
    assert rows["trainable_ct"]["trained numbers + head"] == "32 + 12"
    assert rows["trainable_ct"]["won / lost"] == "10 / 0"
    assert rows["trainable_ct"]["step, MiB"] == "3.0"
    assert "test samples and 3 seeds" in sections["The arms"].caption
    assert "The bands are one standard deviation over seeds" in sections["Learning curves"].caption
    assert "18.8 % of all values" in plain(
        sections["What trainable_ct learned"].text[0]
    )  # 2 and 1 of 8
    assert len(sections["What trainable_ct learned, over depth"].pictures) == 2


def test_one_seed_claims_no_spread_over_seeds() -> None:
    sections = {section.title: section for section in tune_sections(result((1,)))}
    assert "over test samples;" in sections["The arms"].caption
    assert "bands" not in sections["Learning curves"].caption
    assert "one seed" in sections["What trainable_ct learned"].caption


def test_without_test_data_nothing_is_claimed() -> None:
    found = result()
    arms = tuple(replace(a, accuracy=None, accuracies=(), difference=None) for a in found.arms)
    found = replace(found, arms=arms)
    assert "no test data given" in tune_summary(found)[1]
    assert "Against the probe" not in [section.title for section in tune_sections(found)]


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_the_page_needs_nothing_else(seeds: tuple[int, ...], tmp_path: Path) -> None:
    path = tune_page(tmp_path / "page.html", result(seeds), title="A & B")
    page = path.read_text()
    assert "A &amp; B" in page
    assert page.count("<svg") == 7
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_wide_table_names_its_columns_in_every_cell_and_a_long_title_breaks(
    tmp_path: Path,
) -> None:
    """So that a narrow page can show its rows one below the other."""
    page = tune_page(tmp_path / "page.html", result(), title="A").read_text()
    assert page.count('class="stacks"') == 2
    assert page.count('<td data-column="against the probe, points" class="number">') == 3
    style = page[page.index("h1 {") :]
    assert "overflow-wrap: anywhere" in style[: style.index("}")]


def test_no_difference_anywhere_is_drawn_with_its_interval() -> None:
    told = result().arms[1].difference
    assert told is not None
    assert (told.wins, told.losses, told.points) == (0, 0, 0.0)
    assert told.low < 0 < told.high
