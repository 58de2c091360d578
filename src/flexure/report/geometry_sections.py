"""The sections of a report on measurements that draw something: one a measure.

Each maker takes measurements and gives the sections that they have, none where nothing was asked
for; what was measured and cannot be drawn is said. The table of all numbers and the page are in
`measure.py`, pictures in `geometry_plots.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flexure.methods.measurements_result import Measurements, ModelMeasurements, Row
from flexure.report.canvas import Picture
from flexure.report.geometry_plots import (
    Bin,
    Fit,
    NoiseLine,
    Samples,
    against_doubt,
    contributions,
    distributions,
    fits,
    reliability,
    under_noise,
)
from flexure.report.log_axes import drawable
from flexure.report.page import Section
from flexure.report.tables import Table, percent, table_of

__all__ = [
    "NOISE",
    "bound_sections",
    "calibration_sections",
    "confidence_sections",
    "distribution_sections",
    "noise_sections",
    "numbers_table",
    "rate_sections",
    "row_measure",
    "violated",
]

NOISE = "gradient_change"
"""The measure that has a table of its own: a row for each radius."""


_NORMS = (
    ("normalized", "Normalised curvature", "C = ‖H‖ / g (1 / input unit)"),
    ("gradient_norm", "Gradient norm", "g (nats / input unit)"),
    ("hessian_norm", "Hessian norm", "‖H‖ (nats / input unit²)"),
)
_LAYERS = 40  # rows of the table of layers; the picture has all


def distribution_sections(found: Measurements) -> list[Section]:
    """How the norms are spread over samples."""
    models = [model for model in found.models if model.curvature is not None]
    if not models:
        return []
    pictures: list[Picture] = []
    everything: list[tuple[str, Samples]] = []
    for name, title, axis in _NORMS:
        samples = [Samples(model.name, _values(model, "curvature", name)) for model in models]
        some = [one for one in samples if one.drawn]
        pictures += [distributions(some, title=title, axis=axis)] if some else []
        everything += [(title, one) for one in samples]
    zeros = any(one.zeros for _, one in everything if one.drawn)
    shares = "; ".join(
        f"{model.name}: {percent(model.curvature.converged)}"
        for model in models
        if model.curvature is not None
    )
    return [
        _pictured(
            "Curvature and gradients over samples",
            pictures,
            "The share of samples at or below each value.",
            "A logarithmic axis has no place for zeros, but they count: a curve starts at their "
            "share." if zeros else "",
            _drawn_counts(everything),
            f"Samples whose Hessian norm has converged: {shares}.",
        )
    ]  # fmt: skip


def confidence_sections(found: Measurements) -> list[Section]:
    """Normalised curvature where a network is sure, and where it is not."""
    pairs, missing = [], []
    for model in found.models:
        if model.curvature is None or model.calibration is None:
            continue
        samples = Samples(model.name, _values(model, "curvature", "normalized"))
        doubts = _values(model, "calibration", "doubt")[: len(samples.values)]
        if samples.drawn:
            pairs.append((samples, doubts))
        else:
            missing.append(f"{samples.counts} ({model.name})")
    if not pairs and not missing:
        return []
    told = f"Samples drawn: {'; '.join(missing)}." if missing else ""
    return [
        _pictured(
            "Curvature against confidence",
            against_doubt(pairs, axis=_NORMS[0][2]),
            "Each dot is a sample's normalised curvature. Doubt is the probability that the "
            "network leaves to the classes it does not predict: samples of which it is sure are "
            "on the left. The line joins medians of groups of equally many samples.",
            told,
        )
    ]


def noise_sections(found: Measurements) -> list[Section]:
    """How much gradients change under noise, beside what the bound allows."""
    models = [model for model in found.models if model.gradient_change is not None]
    if not models:
        return []
    lines: list[NoiseLine] = []
    missing: list[str] = []
    for k, model in enumerate(models):
        mine, lost = _noise_lines(model, k)
        lines, missing = lines + mine, missing + lost
    picture = [
        under_noise(
            lines,
            title="Relative gradient change",
            x_label="noise (l2 norm, input units)",
            y_label="‖∇f(x+ε) − ∇f(x)‖ / ‖∇f(x)‖",
        )
    ] if lines else []  # fmt: skip
    return [
        _pictured(
            "Gradients under noise",
            picture,
            "Medians over samples of the change under random noise of each norm, with the middle "
            "half of samples as a band, and of Proposition 1's bound: e to the power of noise "
            "times curvature, minus 1. The curvature in it is the largest that was found on "
            "points of the segment: an estimate. At kinks of ReLU the gradient jumps, which no "
            "curvature sees: there the bound does not hold.",
            *(_violated(model) for model in models),
            f"Not drawn, since a logarithmic axis has no place for it: {'; '.join(missing)}."
            if missing
            else "",
            table=numbers_table(found, [r for r in found.rows() if row_measure(r) == NOISE]),
        )
    ]


def row_measure(row: Row) -> str:
    """The measure of a row of the table of numbers."""
    return next(one.measure for one in row.estimates if one is not None)


def violated(result: Any) -> str | None:
    """The share of draws in which the gradient changed by more than the bound, over the radii.

    Args:
        result: a `GradientChange`.

    Returns:
        In per cent, the least and the most; None without a bound.
    """
    means = result.violations.double().nanmean(0).tolist()
    shares = [share for share in means if not math.isnan(share)]
    if not shares:
        return None
    least, most = percent(min(shares)), percent(max(shares))
    return least if least == most else f"{least} to {most}"


def numbers_table(
    found: Measurements, rows: Sequence[Row], more: Sequence[Sequence[str | None]] = ()
) -> Table:
    """Rows of numbers with their intervals, and differences where there are two networks.

    Args:
        found: of which the rows are.
        rows: the ones to show.
        more: further ones, of a label and a text for each network.
    """
    several = len(found.models) > 1
    columns = ["quantity", *(model.name for model in found.models)]
    columns += ["difference, or median of ratios"] if several else []
    cells: list[list[Any]] = [
        [row.label, *row.estimates, row.difference][: len(columns)] for row in rows
    ]
    cells += [[*row, None][: len(columns)] for row in more]
    return table_of(columns, cells, *columns[1:])


def rate_sections(found: Measurements) -> list[Section]:
    """How derivatives grow with their order."""
    models = [model for model in found.models if model.rate is not None]
    if not models:
        return []
    lines, missing = [], []
    for model in models:
        result: Any = model.summaries["rate"].result
        logs = result.log_norms.tolist()
        # Asked first: where an order vanishes and a higher one does not, a rate is refused.
        if not all(map(math.isfinite, logs)):
            missing.append(f"{model.name}, {_without_rate(result)}")
            continue
        orders = [float(n) for n in result.orders]
        start = float(result.fitted[0]) - result.rate * orders[0]
        lines.append(Fit(model.name, orders, logs, result.rate, start))
    picture = [
        fits(
            lines,
            title="Curvature rate",
            x_label="order n of the derivative",
            y_label="log of ‖Dⁿf‖ (1 / input unitⁿ)",
        )
    ] if lines else []  # fmt: skip
    return [
        _pictured(
            "Growth of derivatives",
            picture,
            "Natural logarithm of the root mean square n-th derivative of the probability of the "
            "predicted class along random directions; the slope is the curvature rate over these "
            f"orders ({_normalization(found)}).",
            f"Not drawn: {'; '.join(missing)}." if missing else "",
        )
    ]


def bound_sections(found: Measurements) -> list[Section]:
    """The data-free bound of each network that has one, and which activations make it."""
    return [
        _bound_section(model)
        for model in found.models
        if model.bound is not None and model.bound.contributions
    ]


def calibration_sections(found: Measurements) -> list[Section]:
    """How often each network is right where it is as sure as that."""
    pictures, told = [], []
    for model in found.models:
        if model.calibration is None:
            continue
        result = model.calibration.result
        bins = [Bin(b.confidence, b.accuracy, b.low, b.high, b.count) for b in result.reliability()]
        pictures.append(reliability(bins, title=model.name))
        told.append(f"{model.name} {percent(result.ece)}")
    if not pictures:
        return []
    return [
        Section(
            "Calibration",
            pictures=tuple(pictures),
            caption="The share of right predictions among samples of similar confidence, with 95 % "
            f"intervals. Expected calibration error, 15 bins: {'; '.join(told)}.",
        )
    ]


def _drawn_counts(everything: Sequence[tuple[str, Samples]]) -> str:
    """How many samples the pictures have, of each quantity and network."""
    lacking = [(title, one) for title, one in everything if len(one.drawn) < len(one.values)]
    counts = [f"{one.counts} ({title}, {one.label})" for title, one in lacking]
    if len(lacking) < len(everything):
        rest = len(everything[0][1].values)
        counts.append(f"all {rest} of the others" if lacking else f"all {rest} of each")
    return f"Samples drawn: {'; '.join(counts)}."


def _noise_lines(model: ModelMeasurements, network: int) -> tuple[list[NoiseLine], list[str]]:
    """A network's change and its bound where a logarithmic axis can show them, and what is left."""
    result: Any = model.summaries[NOISE].result
    lower, change, upper = (_quantile(result.change, level) for level in (0.25, 0.5, 0.75))
    asked = {"change": change}
    if result.points:
        asked["bound"] = _quantile(result.estimated_bound, 0.5)
    lines, missing = [], []
    for what, values in asked.items():
        there = [k for k, value in enumerate(values) if drawable(value)]
        lost = [k for k in range(len(values)) if k not in there]
        for why in dict.fromkeys(_named(values[k]) for k in lost):
            places = ", ".join(f"{result.radii[k]:.3g}" for k in lost if _named(values[k]) == why)
            missing.append(f"median {what} of {model.name}, {why} at {places}")
        if there:
            # A quartile that the axis cannot show gives way to the median: no band on that side.
            low, high = (
                [end[k] if drawable(end[k]) else values[k] for k in there] for end in (lower, upper)
            )
            x, y = ([column[k] for k in there] for column in (result.radii, values))
            band = (low, high) if what == "change" else None
            lines.append(
                NoiseLine(f"{model.name}: {what}", x, y, band, network, is_bound=what == "bound")
            )
    return lines, missing


def _quantile(values: Any, level: float) -> list[float]:
    """Of each column (B, R), of what is not nan: infinite values have a rank as well."""
    ends = [
        values.double().nanquantile(level, dim=0, interpolation=way) for way in ("lower", "higher")
    ]
    middle: list[float] = (sum(ends) / 2).tolist()
    return middle


def _named(value: float) -> str:
    """What a value that cannot be drawn is."""
    return "not defined" if math.isnan(value) else "0" if value == 0 else "infinite"


def _violated(model: ModelMeasurements) -> str:
    """In how many draws the gradient changed by more than the bound, over the radii."""
    result: Any = model.summaries[NOISE].result
    told = violated(result)
    if told is None:
        return "" if result.points else f"{model.name}: no bound was asked for."
    return f"{model.name}: the change exceeds its sample's bound in {told} of draws."


def _without_rate(result: Any) -> str:
    zero = ", ".join(map(str, result.vanishing))
    if zero:
        return f"whose derivatives of order {zero} are zero at all samples"
    return "which has finite derivatives at no sample"


def _normalization(found: Measurements) -> str:
    result = next(model.rate.result for model in found.models if model.rate is not None)
    scaled = "calibrated for the dimension" if result.calibrate else "not calibrated"
    return f"{result.normalization} normalisation, {scaled}"


def _bound_section(model: ModelMeasurements) -> Section:
    bound: Any = model.bound
    rows = bound.contributions
    loose = (
        ""
        if model.looseness is None
        else f" It is {model.looseness:.3g} times the largest Hessian norm that was measured."
    )
    told = (
        f"Without data: the Hessian norm of the cross-entropy is at most "
        f"{bound.cross_entropy:.4g} nats / input unit² at any input.{loose}"
        if math.isfinite(bound.cross_entropy)
        else "The bound is infinite: a product of its factors overflowed, and it says nothing."
    )
    return Section(
        f"A bound for every input: {model.name}",
        (told,),
        _shares_picture(rows),
        table=_contribution_table(rows),
        caption="Each activation adds its largest second derivative, times how much the logits can "
        "depend on it, times the square of how much it can depend on the input. The picture has "
        f"all in network order, the table those with the largest shares, at most {_LAYERS}.",
    )


def _shares_picture(rows: Sequence[Any]) -> tuple[Picture, ...]:
    shares = [row.share for row in rows]
    if not all(math.isfinite(share) for share in shares):
        return ()
    top = max(rows, key=lambda row: row.share)
    return (contributions(shares, title="Where the bound comes from", highest=top.name),)


def _contribution_table(rows: Sequence[Any]) -> Table:
    columns = ("number", "activation", "largest curvature", "sensitivity",
               "Lipschitz constant to it", "share")  # fmt: skip
    largest = sorted(
        enumerate(rows, 1),
        key=lambda numbered: -numbered[1].share if math.isfinite(numbered[1].share) else 0.0,
    )
    return table_of(
        columns,
        [
            (k, row.name, *(f"{v:.3g}" for v in (row.curvature, row.sensitivity, row.lipschitz)),
             percent(row.share) if math.isfinite(row.share) else None)
            for k, row in largest[:_LAYERS]
        ],
        *(column for column in columns if column != "activation"),
    )  # fmt: skip


def _pictured(
    title: str, pictures: Sequence[Picture], how: str, *told: str, table: Table | None = None
) -> Section:
    """A section of pictures; what is told stays where there are none, how to read them does not."""
    kept = [text for text in told if text]
    if pictures:
        return Section(title, pictures=tuple(pictures), table=table, caption=" ".join([how, *kept]))
    return Section(title, (" ".join(["There is nothing to draw.", *kept]),), table=table)


def _values(model: ModelMeasurements, measure: str, name: str) -> list[float]:
    values: list[float] = model.summaries[measure].result.samples()[name].double().tolist()
    return values
