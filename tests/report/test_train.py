"""What training by several methods says in a report: true sentences, every number, odd results."""

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

from flexure.contracts import FlexureError
from flexure.measure.calibration import Calibration
from flexure.measure.curvature import Curvature
from flexure.measure.robustness_of_gradients import GradientChange
from flexure.measure.summary import Summary
from flexure.methods.flat_result import FlatRun, FlatTraining, Plane
from flexure.report import run_table
from flexure.report.page import Section
from flexure.report.train import flat_page, flat_sections, flat_summary
from flexure.report.train_sections import boundary_figure, noise_figure

RADII = (0.05, 0.1, 0.15, 0.2)
NOISE = (0.01, 0.1)
SAMPLES, GRID = 40, 12
NINE = ("standard", "relu", "softplus-wd", "lcnn", "gradreg", "lcnn+gradreg", "cure", "at", "sam")


def _plane(classes: int = 2) -> Plane:
    points = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 4 - 2
    labels = (points[:, 0] > 0).long() + (classes > 2) * (points[:, 1] > 0).long()
    return Plane(torch.linspace(-2, 2, GRID), torch.linspace(-1, 1, GRID), points, labels)


def _probabilities(plane: Plane, steep: float, classes: int = 2) -> torch.Tensor:
    """Class 1 to the right of class 0; of three, the last is above."""
    y, x = torch.meshgrid(plane.y, plane.x, indexing="ij")
    logits = torch.stack([-x, x, 3 * y][:classes], -1)
    return (steep * logits).softmax(-1).float()


def geometry(scale: float, seed: int, **columns: Any) -> Summary[Any]:
    drawn = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(seed)).double() + 0.5
    yes = torch.ones(SAMPLES, dtype=torch.bool)
    given: dict[str, Any] = {
        "converged": yes, "gradient_norm": 0.1 * scale * drawn, "hessian_norm": scale * drawn**2,
        "normalized": 10 * scale * drawn, "zero_gradient": ~yes, "residual": 0 * drawn,
        "products": 3 * yes.long(), "value": drawn, "probability": drawn / 2, "tol": 1e-2,
        "max_products": 20,
    }  # fmt: skip
    return Summary(Curvature(**(given | columns)))


def calibrated(wrong: int) -> Summary[Any]:
    correct = torch.arange(SAMPLES) >= wrong
    nll = torch.where(correct, 0.1, 2.0).double()
    return Summary(
        Calibration(torch.ones_like(correct), (-nll).exp(), correct, nll, correct.long(), nll / 10)
    )


def noisy(scale: float, **columns: Any) -> Summary[Any]:
    ones = torch.ones(SAMPLES, len(NOISE)).double()
    given: dict[str, Any] = {
        "converged": torch.ones(SAMPLES, dtype=torch.bool),
        "change": ones * torch.tensor(NOISE) * scale,
        "estimated_bound": ones * torch.tensor(NOISE) * 2 * scale,
        "violations": 0.25 * ones, "normalized": ones[:, 0], "zero_gradient": ones[:, 0] < 0,
        "radii": NOISE, "directions": 2, "points": 2, "tol": 1e-2,
    }  # fmt: skip
    return Summary(GradientChange(**(given | columns)))


def run(method: str, seed: int, *, scale: float = 1.0, wrong: int = 4, **changes: Any) -> FlatRun:
    """A run whose curvature is 10·scale on average, and which errs on so many of 40 samples."""
    lcnn = "lcnn" in method
    correct = torch.arange(SAMPLES) >= wrong
    robust = torch.stack([correct & (torch.arange(SAMPLES) >= wrong + k) for k in range(4)], 1)
    given: dict[str, Any] = {
        "method": method, "seed": seed, "start": f"start {seed}", "parameters": 1234,
        "losses": (2.0, 1.0 * scale, 0.01 * scale), "val_accuracy": (0.5, 0.75, 0.9),
        "val_loss": (1.5, 1.0, 0.5), "penalties": {}, "learning_rates": (0.1, 0.1, 0.01),
        "kept": 3, "seconds": 3.0, "seconds_per_epoch": 1.5 if lcnn else 1.0,
        "test": {
            "curvature": geometry(scale, seed), "calibration": calibrated(wrong),
            "gradient_change": noisy(scale),
        },
        "train": {"curvature": geometry(scale / 2, seed + 100)},
        "robust": robust, "probabilities": _probabilities(_plane(), scale), "lipschitz": scale,
        "betas": {f"body.{k}": 5.0 - 0.5 * k for k in range(6)} if lcnn else {},
        "gammas": {f"bn.{k}": 1.0 + k for k in range(2)} if lcnn else {},
    }  # fmt: skip
    return FlatRun(**(given | changes))


def failed(method: str, seed: int) -> FlatRun:
    empty: dict[str, Any] = {
        "losses": (), "val_accuracy": (), "val_loss": (), "test": {}, "train": {}, "robust": None,
        "probabilities": None, "lipschitz": None, "betas": {}, "gammas": {}, "kept": 0,
        "seconds_per_epoch": None,
    }  # fmt: skip
    return run(method, seed, failure="the loss is not finite in epoch 2", **empty)


def trained(
    runs: tuple[FlatRun, ...], *, plane: Plane | None = None, **changes: Any
) -> FlatTraining:
    methods = {one.method: f"what {one.method} is" for one in runs}
    given: dict[str, Any] = {
        "methods": methods, "seeds": tuple(dict.fromkeys(one.seed for one in runs)), "runs": runs,
        "baseline": "standard" if "standard" in methods else next(iter(methods)), "radii": RADII,
        "samples": {"train": 100, "val": 20, "test": SAMPLES, "measured": SAMPLES},
        "settings": {"epochs": 3, "attack": "PGD(steps=40)"}, "timing": {},
        "told": ("inputs have no bounds",), "plane": plane,
    }  # fmt: skip
    return FlatTraining(**(given | changes))


@cache
def several(seeds: tuple[int, ...] = (1, 2, 3)) -> FlatTraining:
    runs = [run("standard", s) for s in seeds]
    runs += [run("lcnn", s, scale=0.1, wrong=6) for s in seeds]
    runs += [run("at", s, scale=0.5, wrong=0) for s in seeds]
    return trained(tuple(runs), plane=_plane())


def sections(found: FlatTraining) -> dict[str, Section]:
    return {section.title: section for section in flat_sections(found)}


@cache
def several_sections() -> dict[str, Section]:
    return sections(several())


def cells(section: Section) -> dict[str, dict[str, str]]:
    """Method -> column -> text."""
    table = section.table
    assert table is not None
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_headlines_name_the_best_and_are_true_of_the_numbers() -> None:
    found = several()
    head, curvature, gradient, accuracy, attacked, cost, note = flat_summary(found)
    assert head.startswith("3 methods, 3 seeds, 3 epochs; samples: 100 train")
    assert "over test samples and 3 seeds" in head
    assert curvature.startswith("Lowest mean normalised curvature (1 / input unit): “lcnn”, ")
    told = found["lcnn"].estimates["normalized"]
    assert f"{told.value:.3g} [{told.low:.3g}, {told.high:.3g}] at 85.0" in curvature
    difference = found["lcnn"].differences["normalized"]
    assert "Against “standard”, which has" in curvature
    assert f": {difference.value:+.3g} [{difference.low:+.3g}" in curvature
    assert "“at”" in curvature  # the next one
    assert gradient.startswith("Lowest mean gradient norm (nats / input unit): “lcnn”")
    assert accuracy.startswith("Highest accuracy on test data: “at”, 100.00")
    assert attacked.startswith("Highest accuracy under l2 PGD of radius 0.2: “at”, 92.50")
    assert "+10.00 points" in attacked
    assert cost == "Time of an epoch, over that of “standard”: “lcnn” 1.50, “at” 1.00."
    assert note == "Note: inputs have no bounds."


def test_a_difference_that_may_be_none_is_said_to_be_so() -> None:
    worse = run("lcnn", 1, test=run("lcnn", 1).test | {"curvature": geometry(1.02, 7)})
    found = trained((run("standard", 1), worse))
    told = found["lcnn"].differences["normalized"]
    assert told.low < 0 < told.high
    assert "includes 0, the data do not tell which is lower" in flat_summary(found)[1]
    assert "no difference" not in " ".join(flat_summary(found))


def test_networks_with_kinks_lead_no_curvature() -> None:
    found = trained((run("relu", 1, scale=0.1, kinks=("relu",)), run("lcnn", 1)))
    told = flat_summary(found)[1]
    assert told.startswith("Lowest mean normalised curvature (1 / input unit): “lcnn”")
    assert "Not compared by normalised curvature: “relu”, which has kinks (relu);" in told
    assert flat_summary(found)[2].startswith("Lowest mean gradient norm")
    assert "“relu”" in flat_summary(found)[2].split(",")[0]
    for title in ("Curvature, gradients and accuracy", "Curvature against accuracy"):
        assert "Networks with kinks: “relu”; no Hessian sees" in sections(found)[title].caption
    alone = trained((run("relu", 1, kinks=("relu",)),))
    assert flat_summary(alone)[1].startswith("Not compared by normalised curvature: “relu”")


def test_the_lipschitz_bound_is_not_told_of_betas() -> None:
    assert not several_sections()["Learned beta"].text


def test_equals_share_a_headline() -> None:
    runs = (run("standard", 1), run("lcnn", 1), run("at", 1), run("sam", 1, wrong=9))
    (line,) = (
        text for text in flat_summary(trained(runs)) if text.startswith("Highest accuracy on")
    )
    assert "“standard”, “lcnn” and “at”, 90.00" in line
    assert "Against “sam”" in line
    assert "Against “lcnn”" not in line


def test_the_tables_have_every_number() -> None:
    found, page = several(), several_sections()
    geometric = cells(page["Curvature, gradients and accuracy"])
    for row in found.rows:
        for name in ("gradient_norm", "hessian_norm", "normalized"):
            told = row.estimates[name]
            (head,) = (h for h in geometric[row.method] if found.quantities[name].label in h)
            numbers = [float(n) for n in re.findall(r"[\d.e+-]+", geometric[row.method][head])]
            assert numbers == pytest.approx([told.value, told.low, told.high], rel=6e-3)
    assert geometric["at"]["accuracy (%)"].startswith("100.00 [")
    attacked = cells(page["Accuracy under attack"])
    assert attacked["standard"]["PGD 0.05 (%)"].startswith("90.00 [")
    assert attacked["standard"]["PGD 0.2 (%)"].startswith("82.50 [")
    minus = cells(page["Minus standard: accuracy under attack"])
    assert set(minus) == {"lcnn", "at"}
    assert minus["at"]["PGD 0.2 (%)"].startswith("+10.00 [")
    minus = cells(page["Minus standard: curvature, gradients, accuracy"])
    assert minus["lcnn"]["accuracy (%)"].startswith("-5.00 [")
    noise = cells(page["Gradients under noise"])
    assert float(noise["lcnn"]["noise 0.1"].split()[0]) == pytest.approx(0.01)
    assert noise["lcnn"]["beyond the bound"].startswith("25.0")
    discrepancy = cells(page["Training and test data"])["standard"]["normalised curvature"]
    assert discrepancy.startswith(f"{found['standard'].discrepancies['normalized'].value:+.3f} [")
    medians = cells(page["Medians"])["lcnn"]
    told = found["lcnn"].estimates["normalized"].median
    assert float(medians["median normalised curvature (1 / input unit)"]) == pytest.approx(
        told, rel=6e-3
    )
    methods = cells(page["The methods"])
    assert methods["lcnn"]["times standard"] == "1.50"
    assert methods["lcnn"]["trained numbers"] == "1,234"
    assert methods["lcnn"]["finished"] == "3 of 3"


def test_pictures_have_all_methods_and_their_numbers() -> None:
    page = several_sections()
    assert len(page["Decision boundaries"].pictures) == 3
    assert "lcnn: 85.0" in page["Decision boundaries"].pictures[1].alt
    (attack,) = page["Accuracy under attack"].pictures
    assert "standard: 90.0 at 0, 90.0 at 0.05, 87.5 at 0.1, 85.0 at 0.15, 82.5 at 0.2" in attack.alt
    assert len(page["Training"].pictures) == 3
    (betas,) = page["Learned beta"].pictures
    assert "lcnn" in betas.alt
    assert not page["Learned gamma"].pictures  # of two sites; the table tells of them
    gammas = page["Learned gamma"].table
    assert gammas is not None
    assert [row[1:] for row in gammas.rows] == [("bn.0", "1"), ("bn.1", "2")]


def test_clean_accuracy_beside_attacks_is_of_the_attacked_samples() -> None:
    one = run("standard", 1, wrong=4)
    assert one.robust is not None
    found = trained((replace(one, robust=one.robust[:8]),))
    (picture,) = sections(found)["Accuracy under attack"].pictures
    assert "50.0 at 0," in picture.alt  # four of the first eight; of all forty it is 90 %


def test_nothing_is_told_of_trainings_that_all_failed() -> None:
    found = ODD["all failed"]()
    assert list(sections(found)) == ["Curvature, gradients and accuracy", "The methods", "Notes"]
    told = "\n".join(flat_summary(found))
    assert (
        "1 of 1 trainings by “lcnn” failed (seed 1): the loss is not finite in epoch 2.\n" in told
    )
    assert "Lowest" not in told
    assert "Highest" not in told
    assert "ntervals" not in told


def test_methods_keep_their_looks_in_pictures_without_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Any] = []
    from flexure.report import plots

    draw = plots.draw_line

    def spying(axes: Any, line: Any, index: int, **words: Any) -> None:
        found.append((line.label, index))
        draw(axes, line, index, **words)

    monkeypatch.setattr(plots, "draw_line", spying)
    sections(trained((failed("standard", 1), run("lcnn", 1), run("at", 1))))
    assert set(found) == {("lcnn", 1), ("at", 2)}


def test_failures_and_refusals_are_told_with_reasons() -> None:
    refused = run("relu", 2, lipschitz=None, refusals={"rate": "it is not smooth"})
    found = trained((run("standard", 1), run("standard", 2), failed("relu", 1), refused))
    text = "\n".join(flat_summary(found))
    assert (
        "1 of 2 trainings by “relu” failed (seed 1): the loss is not finite in epoch 2. Its" in text
    )
    page = sections(found)
    notes = cells(page["Notes"])
    assert "relu has no rate: it is not smooth" in notes
    assert "inputs have no bounds" not in notes  # which the summary has
    assert cells(page["The methods"])["relu"]["finished"] == "1 of 2"


def odd_infinite() -> FlatTraining:
    """Curvature that is infinite at one sample, and noise that changes nothing or everything."""
    normalized = geometry(1, 1).result.normalized.clone()
    normalized[0] = math.inf
    change = torch.zeros(SAMPLES, 2).double()
    change[:, 1] = math.inf
    test = run("relu", 1).test | {
        "curvature": geometry(1, 1, normalized=normalized),
        "gradient_change": noisy(1, change=change, estimated_bound=change * math.nan),
    }
    return trained((run("standard", 1), run("relu", 1, test=test)), plane=_plane())


def odd_undefined() -> FlatTraining:
    """No sample has a curvature, no epoch a loss, and no point of the plane a probability."""
    nothing = torch.full((SAMPLES,), math.nan).double()
    test = {"curvature": geometry(1, 1, normalized=nothing, gradient_norm=0 * nothing)}
    losses = (math.nan, math.inf, 1.0)
    grid = _probabilities(_plane(), 1.0) * math.nan
    one = run("standard", 1, test=test, losses=losses, probabilities=grid, robust=None, train={})
    return trained((one,), plane=_plane())


def odd_three_classes() -> FlatTraining:
    plane = _plane(3)
    grid = _probabilities(plane, 2.0, 3)
    wide = replace(plane, x=plane.x * 100, points=plane.points * torch.tensor([100.0, 1.0]))
    return trained((run("standard", 1, probabilities=grid),), plane=wide)


def odd_sure() -> FlatTraining:
    """One class everywhere, with probability 1."""
    grid = torch.zeros(GRID, GRID, 2)
    grid[..., 1] = 1
    return trained((run("standard", 1, probabilities=grid),), plane=_plane())


def odd_names() -> FlatTraining:
    return trained((run("_<b>$x$", 1), run("lcnn " * 12, 1)), plane=_plane())


def nine(seeds: tuple[int, ...]) -> FlatTraining:
    runs = [run(m, s, scale=1 / (k + 1), wrong=k) for k, m in enumerate(NINE) for s in seeds]
    return trained(tuple(runs), plane=_plane())


ODD: dict[str, Callable[[], FlatTraining]] = {
    "infinite": odd_infinite,
    "undefined": odd_undefined,
    "three classes": odd_three_classes,
    "one class": odd_sure,
    "names": odd_names,
    "nine methods": lambda: nine((1, 2)),
    "one method": lambda: trained((run("lcnn", 1),)),
    "all failed": lambda: trained((failed("standard", 1), failed("lcnn", 1)), plane=_plane()),
    "baseline failed": lambda: trained((failed("standard", 1), run("lcnn", 1))),
    "nothing measured": lambda: trained(
        (run("standard", 1, test={}, train={}, robust=None, probabilities=None, lipschitz=None),)
    ),
    "infinite losses": lambda: trained(
        tuple(run("standard", s, val_loss=(math.inf, 1.0, 1.0 / s)) for s in (1, 2))
    ),
    "one epoch": lambda: trained((run("at", 1, losses=(1.0,), val_loss=(-1.0,)),)),
    "one radius": lambda: trained(
        (run("standard", 1, robust=torch.ones(3, 1, dtype=torch.bool)),), radii=(0.5,)
    ),
    "no settings": lambda: trained((run("standard", 1),), settings={}, samples={}, told=()),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_results_have_whole_pages(name: str, tmp_path: Path) -> None:
    found = ODD[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of limits and glyphs that do not fit
        text = flat_page(tmp_path / "r.html", found, title="odd & <all>").read_text()
    assert text.rstrip().endswith("</html>")
    assert "odd &amp; &lt;all&gt;" in text
    for method in found.methods:
        assert escape(method, quote=False) in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert not re.search(r"\bnan\b", svg)
    words = re.sub(r"<(svg|style).*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\bnan\b", words)


def test_one_seed_and_several_say_what_intervals_cover(tmp_path: Path) -> None:
    made = {
        len(found.seeds): flat_page(tmp_path / "r.html", found, title="T").read_text()
        for found in (trained((run("at", 1),)), trained((run("at", 1), run("at", 2))))
    }
    assert "there is one run of each method" in made[1]
    assert "over test samples.</li>" in made[1]
    assert "there is one run of each method" not in made[2]
    assert "over test samples and 2 seeds.</li>" in made[2]


def test_what_cannot_be_drawn_is_said() -> None:
    found = odd_infinite()
    page = sections(found)
    assert "without a positive finite mean: relu" in page["Curvature against accuracy"].caption
    assert "0 or not finite: relu at 0.01, 0.1" in page["Gradients under noise"].caption
    assert "relu" not in noise_figure(found).alt
    line = flat_summary(found)[1]
    assert "“standard” (the only finite one)" in line
    assert "Decision boundaries" not in sections(odd_undefined())


def test_maps_put_classes_where_they_are() -> None:
    from matplotlib.colors import to_rgb

    from flexure.report.canvas import SERIES, canvas
    from flexure.report.train_plots import ClassMap, _draw_map

    plane = _plane()
    _, axes = canvas((3, 3))
    grid = _probabilities(plane, 5.0).numpy()
    _draw_map(axes, ClassMap("T", plane.x.numpy(), plane.y.numpy(), grid, plane.points.numpy(),
                             plane.labels.numpy()))  # fmt: skip
    centres = {}
    for drawn in axes.collections:
        if drawn.get_facecolor().size:
            for path, colour in zip(drawn.get_paths(), drawn.get_facecolor(), strict=False):
                if len(path.vertices):
                    centres.setdefault(tuple(colour[:3]), []).append(path.vertices[:, 0].mean())
    left, right = (centres[to_rgb(SERIES[k])] for k in (0, 1))
    assert max(left) < 0 < min(right)  # class 1 is where x is positive
    (line,) = (c for c in axes.collections if not c.get_facecolor().size)
    assert abs(line.get_paths()[0].vertices[:, 0]).max() < 0.2
    points = {line.get_marker(): line.get_xdata() for line in axes.lines}
    assert max(points["o"]) < 0 < min(points["^"])


def test_figures_for_documents() -> None:
    found = nine((1, 2))
    two = boundary_figure(found, methods=["standard", "lcnn"], seed=2)
    ElementTree.fromstring(two.svg)
    assert two.alt.startswith("2 decision maps: standard: 100.0")
    five = boundary_figure(found, methods=NINE[:5], columns=2)
    assert "5 decision maps" in five.alt
    assert five.width < two.width * 1.1
    noise = noise_figure(found, methods=["lcnn"])
    assert "lcnn: from" in noise.alt
    assert "standard" not in noise.alt


def test_figures_refuse_what_is_not_there() -> None:
    with pytest.raises(FlexureError, match="got 'none'; name others"):
        boundary_figure(several(), methods=["none"])
    with pytest.raises(FlexureError, match="of seed 9; train on two-dimensional data"):
        boundary_figure(several(), seed=9)
    with pytest.raises(FlexureError, match="gradient changes above 0 to draw, got none"):
        noise_figure(trained((failed("standard", 1),)))


def test_the_page_needs_nothing_else_and_says_how_it_was_run(tmp_path: Path) -> None:
    from flexure.record import record

    payload = record(config={"model": "some:model"}, seed=1, numbers={})
    found = trained((run("standard", 1), run("lcnn", 1)), plane=_plane())
    path = flat_page(tmp_path / "r.html", found, title="T", run=run_table(payload))
    text = path.read_text()
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "some:model" in text
    assert "How it was run" in text


def test_the_table_of_gradient_changes_has_few_of_many_norms() -> None:
    radii = tuple(0.01 * k for k in range(1, 10))
    ones = torch.ones(SAMPLES, len(radii)).double()
    many = noisy(1.0, change=ones, estimated_bound=ones, violations=ones, radii=radii)
    one = run("standard", 1)
    found = trained((replace(one, test={**one.test, "gradient_change": many}),))
    table = sections(found)["Gradients under noise"].table
    assert table is not None
    heads = ["method", "noise 0.01", "noise 0.05", "noise 0.09", "beyond the bound"]
    assert [str(getattr(c, "head", c)) for c in table.columns] == heads
