"""Prints the tables of `curvature.md` and draws its pictures from the results files beside it.

python docs/experiments/curvature_table.py docs/experiments/results/curvature
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from flexure.report.canvas import (
    DASHES,
    MARKERS,
    REFERENCE,
    SERIES,
    WIDE,
    canvas,
    draw_legend,
    finished,
)

PICTURES = Path(__file__).parent / "results" / "curvature"
NORMS = {
    "normalized": "normalised curvature C",
    "hessian_norm": "Hessian norm",
    "gradient_norm": "gradient norm",
}
KNOWLEDGE = {
    "correct": ("accuracy, %", 100.0, 2),
    "nll": ("NLL, nats", 1.0, 4),
    "ece": ("ECE, %", 100.0, 2),
}


def main(folder: str) -> None:
    """All tables, one depth after another, and the pictures."""
    found = {}
    for path in sorted(Path(folder).glob("resnet*.json")):
        numbers = json.loads(path.read_text())["numbers"]
        found[numbers["depth"]] = numbers["networks"]
    found = dict(sorted(found.items()))
    for depth, networks in found.items():
        print(f"### ResNet-{depth}, {networks[0]['samples']} images\n")
        norm_table(networks)
        rate_table(networks)
        knowledge_table(networks)
    depths = Path(folder) / "depths.json"
    if depths.exists():
        depth_table(json.loads(depths.read_text())["numbers"]["differences"])
    for name in ("normalized", "hessian_norm", "gradient_norm"):
        ratio_picture(found, name, PICTURES / f"{name.replace('_', '-')}.svg")
    rate_picture(found, PICTURES / "rate.svg")


def norm_table(networks: list[dict[str, Any]]) -> None:
    """Medians, and the median ratio to the plain network, image by image."""
    head = ["network"]
    for label in NORMS.values():
        head += [f"{label}, median", "times plain", "mean"]
    rows = []
    for network in networks:
        cells = [network["name"]]
        for name in NORMS:
            cells.append(shown(one(network["estimates"], name, "median")))
            cells.append(shown(one(network["differences"], name, "median")))
            cells.append(shown(one(network["estimates"], name, "mean")))
        rows.append(cells)
    table(head, rows)
    least = min(network["converged"]["curvature"] for network in networks)
    print(f"Converged: at least {100 * least:.2f} % of the images of every network.\n")


def rate_table(networks: list[dict[str, Any]]) -> None:
    """λ, what it is fitted to, and the bound."""
    rows = []
    for network in networks:
        refused = network["refusals"].get("rate")
        logs = network["log_norms"]
        bound, loose = network["bound"], network["looseness"]
        rows.append(
            [
                network["name"],
                "refused" if refused else shown(one(network["estimates"], "rate", "pooled")),
                shown(one(network["differences"], "rate", "pooled"), sign="+"),
                "–" if logs is None else ", ".join(f"{value:.2f}" for value in logs),
                "–"
                if logs is None
                else ", ".join(f"{n:.1f}" for n in network["effective_samples"]),
                "–" if bound is None else f"{float(bound):.2e}",
                "–" if loose is None else f"{float(loose):.2e}",
            ]
        )
    least = next((d["against"] for n in networks for d in n["differences"]
                  if d["quantity"] == "rate"), "–")  # fmt: skip
    orders = next((n["orders"] for n in networks if n["orders"]), [])
    head = ["network", "λ", f"minus {least}", f"log vₙ, n = {', '.join(map(str, orders))}"]
    table([*head, "effective images", "bound of the Hessian norm", "over the largest"], rows)


def knowledge_table(networks: list[dict[str, Any]]) -> None:
    """Accuracy and calibration, with paired differences to the plain network."""
    head = ["network"]
    for label, _, _ in KNOWLEDGE.values():
        head += [label, "minus plain"]
    rows = []
    for network in networks:
        cells = [network["name"]]
        for name, (_, factor, digits) in KNOWLEDGE.items():
            statistic = "plug-in" if name == "ece" else "mean"
            estimate = one(network["estimates"], name, statistic)
            difference = one(network["differences"], name, statistic)
            cells.append(shown(estimate, factor=factor, digits=digits))
            cells.append(shown(difference, factor=factor, digits=digits, sign="+"))
        rows.append(cells)
    table(head, rows)


def depth_table(differences: list[dict[str, Any]]) -> None:
    """Each depth against the shallowest at the same setting."""
    print(f"### Deeper networks against {differences[0]['against']}, image by image\n")
    keys = list(dict.fromkeys((d["depth"], d["name"]) for d in differences))
    rows = []
    for depth, name in keys:
        mine = [d for d in differences if (d["depth"], d["name"]) == (depth, name)]
        ratios = [shown(one(mine, norm, "median")) for norm in NORMS]
        rows.append([f"resnet{depth} {name}", *ratios,
                     shown(one(mine, "rate", "pooled"), sign="+")])  # fmt: skip
    table(["network", *(f"{label}, times" for label in NORMS.values()), "λ, minus"], rows)


def ratio_picture(found: dict[int, list[dict[str, Any]]], name: str, path: Path) -> None:
    """The median ratio to the plain network over beta, one line a depth."""
    lines = {
        depth: [(beta(n), one(n["differences"], name, "median")) for n in networks[1:]]
        for depth, networks in found.items()
    }
    draw(lines, f"{NORMS[name]} / plain", path, level=1.0)


def rate_picture(found: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """λ over beta, one line a depth."""
    lines = {
        depth: [(beta(n), one(n["estimates"], "rate", "pooled")) for n in networks[1:]]
        for depth, networks in found.items()
    }
    draw(lines, "curvature rate λ (nats per order)", path, level=None)


def draw(
    lines: dict[int, list[tuple[float, dict[str, Any] | None]]],
    label: str,
    path: Path,
    *,
    level: float | None,
) -> None:
    """Lines over beta with 95 % intervals, in the style of the reports."""
    figure, axes = canvas(WIDE)
    told = []
    for k, (depth, points) in enumerate(lines.items()):
        there = sorted(((x, v) for x, v in points if v is not None), key=lambda point: point[0])
        if not there:
            continue
        x = [place for place, _ in there]
        y, low, high = ([value[key] for _, value in there] for key in ("value", "low", "high"))
        axes.plot(x, y, color=SERIES[k], linestyle=DASHES[k], marker=MARKERS[k], markersize=4,
                  label=f"ResNet-{depth}")  # fmt: skip
        axes.fill_between(x, low, high, color=SERIES[k], alpha=0.2, linewidth=0)
        told.append(f"ResNet-{depth} from {y[0]:.3g} at {x[0]:g} to {y[-1]:.3g} at {x[-1]:g}")
    if level is not None:
        axes.axhline(level, **REFERENCE, label="plain")
    axes.set(xlabel="beta (no unit; 1 is the plain network)", ylabel=label)
    draw_legend(figure)
    picture = finished(figure, f"{label} against beta, with 95 % intervals: {'; '.join(told)}.")
    # A page that shows the file may be dark; its ink is not.
    svg = picture.svg.replace("<svg ", '<svg style="background:white" ', 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg + "\n")


def beta(network: dict[str, Any]) -> float:
    """Of a steered network, by its name."""
    return float(network["name"].removeprefix("beta "))


def one(found: list[dict[str, Any]], quantity: str, statistic: str) -> dict[str, Any] | None:
    """An estimate or difference; None where there is none."""
    # Results of before 21 November 2026 name the plug-in ECE "pooled".
    names = {statistic, "pooled"} if statistic == "plug-in" else {statistic}
    rows = [row for row in found if row["quantity"] == quantity and row["statistic"] in names]
    return rows[0] if rows else None


def shown(
    row: dict[str, Any] | None, *, factor: float = 1.0, digits: int | None = None, sign: str = ""
) -> str:
    """A value and its interval, if it has one."""
    if row is None:
        return "–"
    form = f"{sign}.{4 if digits is None else digits}{'g' if digits is None else 'f'}"
    value, low, high = (format(factor * float(row[key]), form) for key in ("value", "low", "high"))
    # The plug-in ECE is biased upward: a bootstrap around it is no interval.
    return value if row["quantity"] == "ece" else f"{value} [{low}, {high}]"


def table(head: list[str], rows: list[list[str]]) -> None:
    """In markdown."""
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


if __name__ == "__main__":
    main(sys.argv[1])
