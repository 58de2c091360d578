"""The sections of a report on networks trained by several methods that draw something.

Each maker takes a finished `FlatTraining` and gives the sections that it has, none where nothing
was measured. Boundaries and noise curves are also there as single figures. Tables are in
`train_tables.py`, pictures in `train_plots.py`, the page is `train.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from flexure.contracts import FlexureError
from flexure.methods.flat_quantities import FlatEstimate
from flexure.methods.flat_result import FlatRow, FlatRun, FlatTraining, Plane
from flexure.report.canvas import Curve, Picture
from flexure.report.geometry_plots import NoiseLine, under_noise
from flexure.report.log_axes import drawable
from flexure.report.page import Section
from flexure.report.plots import Estimate, curves
from flexure.report.tables import percent
from flexure.report.train_plots import ClassMap, against_radius, class_map, class_maps, tradeoff
from flexure.report.train_tables import (
    NOISE_COLUMNS,
    attack_names,
    estimate_table,
    head_of,
    kinks_text,
    noise_table,
    site_values,
    site_values_table,
)

__all__ = [
    "attack_sections",
    "boundary_figure",
    "boundary_sections",
    "curve_sections",
    "learned_sections",
    "noise_figure",
    "noise_sections",
    "tradeoff_sections",
]

_POINTS = 400  # samples drawn on a map: more hide it
_FEWEST = 5  # sites; a table tells of fewer
_STEEP = 30.0  # ratio of losses from which their axis is logarithmic
_LEARNED = {
    "betas": ("Learned beta", "beta (1 / unit)", "Of the centered softplus at each site"),
    "gammas": ("Learned gamma", "gamma (no unit)", "Of the Lipschitz BatchNorm at each site"),
}


def tradeoff_sections(found: FlatTraining) -> list[Section]:
    """Curvature against accuracy, one mark a method."""
    x, y = found.quantities["accuracy"], found.quantities["normalized"]
    marks, lost = [], []
    for row in found.rows:
        across, up = row.estimates.get(x.name), row.estimates.get(y.name)
        there = across is not None and up is not None and drawable(up.value)
        lost += [] if there else [row.method]
        marks.append((row.method, _of(across, 100), _of(up)) if there else None)
    if all(mark is None for mark in marks) or len(found.rows) == 1:
        return []
    picture = tradeoff(
        marks, title="Curvature against accuracy", x_label=head_of(x), y_label=head_of(y)
    )
    missing = f" Not drawn, without a positive finite mean: {', '.join(lost)}." if lost else ""
    return [
        Section(
            "Curvature against accuracy",
            pictures=(picture,),
            caption="Lines are 95 % intervals; accuracy is better to the right, curvature is lower "
            f"below, on a logarithmic axis: an interval that goes to 0 ends at the edge."
            f"{missing}{kinks_text(found)}",
        )
    ]


def attack_sections(found: FlatTraining) -> list[Section]:
    """Accuracy under attack: a line a method, and the table."""
    names = attack_names(found)
    rows = [row for row in found.rows if any(name in row.estimates for name in names)]
    if not rows:
        return []
    lines = [
        (row.method, [_of(row.estimates.get(name), 100) for name in ("clean", *names)])
        for row in found.rows
    ]
    picture = against_radius(
        lines,
        [0.0, *sorted(found.radii)],
        title="Accuracy under l2 PGD",
        x_label="radius of the attack (l2 norm, input units)",
        y_label="accuracy (%)",
    )
    measured = found.samples.get("measured")
    first = f"the first {measured} test samples" if measured else "the attacked samples"
    return [
        Section(
            "Accuracy under attack",
            pictures=(picture,),
            table=estimate_table(found, ["clean", *names], found.rows, lambda r: r.estimates),
            caption=f"On {first}, the same ones without attack (radius 0, “clean”); bars are 95 % "
            "intervals. Marks at one radius are drawn side by side. Accuracy in other tables is "
            "that on all test samples. An attack gives an upper limit: a stronger one could "
            f"find more. {_attack(found)}",
        )
    ]


def noise_figure(found: FlatTraining, *, methods: Sequence[str] | None = None) -> Picture:
    """The noise curve as one figure ([LCNN] Fig. 2), with the bounds where they are known.

    Medians over samples of the relative gradient change at each radius, and of the estimated bound
    e^a − 1; their means over runs.

    Args:
        found: the result.
        methods: the ones to draw; default: all. They look as they do among all.

    Raises:
        FlexureError: an unknown method, or nothing that a logarithmic axis can show.
    """
    lines = _noise_lines(found, _chosen(found, methods))
    if not lines:
        raise FlexureError("expected gradient changes above 0 to draw, got none; measure some")
    return under_noise(
        lines,
        title="Relative gradient change",
        x_label="noise (l2 norm, input units)",
        y_label="‖∇f(x+ε) − ∇f(x)‖ / ‖∇f(x)‖, median",
        bounds="thin: bound",
    )


def noise_sections(found: FlatTraining) -> list[Section]:
    """Gradients under noise: a line a method with its bound, and the means."""
    rows = [row for row in found.rows if row.noise]
    if not rows:
        return []
    there = bool(_noise_lines(found, rows))
    lost = [
        f"{row.method} at {', '.join(f'{p.radius:.3g}' for p in row.noise if not _shown(p.change))}"
        for row in rows
        if not all(_shown(point.change) for point in row.noise)
    ]
    missing = f" Not drawn, 0 or not finite: {'; '.join(lost)}." if lost else ""
    return [
        Section(
            "Gradients under noise",
            () if there else ("There is nothing to draw.",),
            (noise_figure(found),) if there else (),
            noise_table(found),
            "In the picture: medians over samples of the change under random noise of each norm, "
            "and of Proposition 1's bound, e to the power of noise times curvature, minus 1. The "
            "curvature in it is the largest that was found on points of the segment: an estimate. "
            f"In the table: means of the change at up to {NOISE_COLUMNS} of the norms, with 95 % "
            "intervals, and in how many draws it is beyond its sample's bound, over all norms. At "
            "kinks of ReLU the gradient jumps, which "
            f"no curvature sees: there the bound does not hold.{missing}",
        )
    ]


def boundary_figure(
    found: FlatTraining,
    *,
    methods: Sequence[str] | None = None,
    seed: int | None = None,
    columns: int | None = None,
) -> Picture:
    """Decision boundaries of two-dimensional data, side by side in one figure ([LCNN] Fig. 1).

    Args:
        found: the result.
        methods: the ones to draw, in this order; default: all that have a map.
        seed: whose runs; default: each method's first that has a map.
        columns: maps in a row; default: all up to three, else three.

    Raises:
        FlexureError: an unknown method, or no run with a map.
    """
    maps = [one for row in _chosen(found, methods) if (one := _map(found, row, seed)) is not None]
    if not maps:
        raise FlexureError(
            f"expected a run with class probabilities on the plane, got none of seed {seed}; train "
            f"on two-dimensional data, and name a seed of {', '.join(map(str, found.seeds))}"
        )
    return class_maps(maps, columns=columns)


def boundary_sections(found: FlatTraining) -> list[Section]:
    """The plane of two-dimensional data as each method sees it."""
    maps = [one for row in found.rows if (one := _map(found, row, None)) is not None]
    if not maps or found.plane is None:
        return []
    total, drawn = len(found.plane.points), len(maps[0].points)
    which = f"{drawn} of the {total}" if drawn < total else f"the {total}"
    several = " Of several seeds, the first is drawn." if len(found.seeds) > 1 else ""
    return [
        Section(
            "Decision boundaries",
            pictures=tuple(class_map(one) for one in maps),
            caption="Colours and shapes are classes, points "
            f"{which} training samples. The shade tells in five steps how far the probability of "
            f"the predicted class is above the next: faint is unsure.{several}",
        )
    ]


def curve_sections(found: FlatTraining) -> list[Section]:
    """Objective and validation accuracy after every epoch."""
    asked: tuple[tuple[str, str, Callable[[FlatRun], Sequence[float]]], ...] = (
        ("Training objective", "mean objective (nats)", lambda run: run.losses),
        ("Validation loss", "mean cross-entropy (nats)", lambda run: run.val_loss),
        ("Validation accuracy", "accuracy (%)", lambda run: [100 * v for v in run.val_accuracy]),
    )
    pictures = []
    for title, label, values in asked:
        lines = [line for row in found.rows if (line := _over_epochs(row, values)) is not None]
        if not lines:
            continue
        heights = [y for line in lines for y in line.y]
        log = label.endswith("(nats)") and _is_steep(heights)
        pictures.append(
            curves(
                lines,
                title=title,
                x_label="epoch",
                y_label=label,
                whole=True,
                log=log,
                looks=_places(found, lines),
            )
        )
    if not pictures:
        return []
    several = len(found.seeds) > 1
    bands = " Means over seeds, with bands of one standard deviation." if several else ""
    return [
        Section(
            "Training",
            pictures=tuple(pictures),
            caption="After each epoch. The objective is what each method "
            "minimises, with its penalties and on the inputs that it makes: compare methods by "
            f"validation loss and accuracy.{bands}",
        )
    ]


def learned_sections(found: FlatTraining) -> list[Section]:
    """Learned betas and gammas over sites."""
    sections: list[Section] = []
    for name, (title, axis, whose) in _LEARNED.items():
        learned = site_values(found, name)
        if not learned:
            continue
        lines = [Curve(method, range(1, 1 + len(values)), [*values.values()])
                 for method, values in learned.items()]  # fmt: skip
        longest = max(len(line.x) for line in lines)
        picture = [
            curves(lines, title=title, x_label="site (number in network order)", y_label=axis,
                   whole=True, log=True, looks=_places(found, lines))
        ] if longest >= _FEWEST else []  # fmt: skip
        means = " Means over seeds." if len(found.seeds) > 1 else ""
        sections.append(
            Section(
                title,
                (),
                tuple(picture),
                site_values_table(learned),
                f"{whose}, in network order.{means}",
            )
        )
    return sections


def _of(told: FlatEstimate | None, scale: float = 1.0) -> Any:
    """A value and its interval as they are drawn; None where it is not finite."""
    if told is None or not math.isfinite(told.value):
        return None
    return Estimate("", scale * told.value, scale * told.low, scale * told.high)


def _attack(found: FlatTraining) -> str:
    told = found.settings.get("attack")
    return f"The attack: {told}." if told else ""


def _chosen(found: FlatTraining, methods: Sequence[str] | None) -> tuple[FlatRow, ...]:
    if methods is None:
        return found.rows
    if unknown := [name for name in methods if name not in found.methods]:
        raise FlexureError(
            f"expected methods among {', '.join(found.methods)}, got {unknown[0]!r}; name others"
        )
    return tuple(found[name] for name in methods)


def _shown(told: FlatEstimate) -> bool:
    return drawable(told.median)


def _noise_lines(found: FlatTraining, rows: Sequence[FlatRow]) -> list[NoiseLine]:
    """The medians of each method, and of its bound, where a logarithmic axis can show them."""
    places = {name: k for k, name in enumerate(found.methods)}
    lines = []
    for row in rows:
        for is_bound in (False, True):
            points = [(p.radius, p.bound if is_bound else p.change.median) for p in row.noise]
            there = [(x, y) for x, y in points if drawable(y)]
            if there:
                x, y = zip(*there, strict=True)
                label = f"{row.method}: bound" if is_bound else row.method
                lines.append(NoiseLine(label, x, y, None, places[row.method], is_bound=is_bound))
    return lines


def _map(found: FlatTraining, row: FlatRow, seed: int | None) -> ClassMap | None:
    """The map of a method's first run, or of the one from a seed; None without a finite one."""
    runs = [
        (run, known) for run in row.finished
        if (known := run.probabilities) is not None and bool(known.isfinite().all())
        and seed in (None, run.seed)
    ]  # fmt: skip
    plane: Plane | None = found.plane
    if not runs or plane is None:
        return None
    run, probabilities = runs[0]
    step = -(-len(plane.points) // _POINTS)
    right = run.test["calibration"].mean["correct"] if "calibration" in run.test else None
    return ClassMap(
        row.method if right is None else f"{row.method}: {percent(float(right))} right",
        plane.x.numpy(),
        plane.y.numpy(),
        probabilities.numpy(),
        plane.points[::step].numpy(),
        plane.labels[::step].numpy(),
    )


def _places(found: FlatTraining, lines: Sequence[Curve]) -> list[int]:
    """Which method each line is: it looks the same in all pictures."""
    order = list(found.methods)
    return [order.index(line.label) for line in lines]


def _over_epochs(row: FlatRow, values: Callable[[FlatRun], Sequence[float]]) -> Curve | None:
    runs = [told for run in row.finished if (told := values(run))]
    epochs = list(zip(*runs, strict=False))
    if not epochs:
        return None
    spread = [_spread(epoch) for epoch in epochs] if len(runs) > 1 else None
    return Curve(row.method, range(1, 1 + len(epochs)), [fmean(e) for e in epochs], spread)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if all(map(math.isfinite, values)) else 0.0


def _is_steep(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis tells more: positive finite numbers of more than a decade."""
    return all(map(drawable, values)) and max(values) > _STEEP * min(values)
