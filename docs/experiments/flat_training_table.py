"""Prints the tables of `flat-training.md` from the results files beside it.

python docs/experiments/flat_training_table.py docs/experiments/results/flat-training/cifar.json
python docs/experiments/flat_training_table.py --tables geometry,order FILE ...
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

MAIN = ("gradient_norm", "hessian_norm", "normalized", "accuracy")
PAPER = {  # Table 1: ResNet-18, CIFAR-100, 200 epochs
    "standard": (19.66, 6061.96, 270.89),
    "lcnn": (22.04, 1143.62, 69.50),
    "gradreg": (8.86, 776.56, 89.47),
    "lcnn+gradreg": (9.87, 154.36, 25.30),
    "cure": (8.86, 979.45, 116.31),
    "softplus-wd": (18.08, 1052.84, 70.39),
    "at": (7.99, 501.43, 63.79),
}
SHARES = ("accuracy", "pgd", "ece")


def main() -> None:
    """The chosen tables of each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--tables", default=",".join(TABLES), help="with commas")
    options = parser.parse_args()
    for path in options.paths:
        payload = json.loads(path.read_text())
        found, config = payload["numbers"], payload["config"]
        sizes = ", ".join(f"{name} {count:,}" for name, count in found["samples"].items())
        epochs, seeds = found["settings"]["epochs"], ", ".join(map(str, found["seeds"]))
        print(f"{config['experiment']}: {epochs} epochs, seeds {seeds}; {sizes}\n")
        for name in options.tables.split(","):
            TABLES[name](found)
        print(f"Written at commit {payload['commit'][:7]}.\n")


def geometry(found: dict[str, Any]) -> None:
    """Gradient norm, Hessian norm, curvature, accuracy."""
    table(found["rows"], MAIN, found["quantities"], median=True)


def attacks(found: dict[str, Any]) -> None:
    """Accuracy under attack."""
    table(found["rows"], [f"pgd_{radius:g}" for radius in found["radii"]], found["quantities"])


def more(found: dict[str, Any]) -> None:
    """What the probabilities are worth, and bounds."""
    table(found["rows"], ("nll", "ece", "rate", "lipschitz"), found["quantities"])


def notes(found: dict[str, Any]) -> None:
    """What a reader must know."""
    for note in found["notes"]:
        print(f"- {note}")
    print()


def table(rows: list[dict[str, Any]], names: Any, labels: Any, *, median: bool = False) -> None:
    """Estimates with their intervals."""
    names = [name for name in names if any(name in row["estimates"] for row in rows)]
    print("| method | " + " | ".join(heading(labels[name]) for name in names) + " |")
    print("|---|" + "---|" * len(names))
    for row in rows:
        cells = [cell(name, row["estimates"].get(name), median=median) for name in names]
        print(f"| {row['method']} | " + " | ".join(cells) + " |")
    print()


def difference_table(found: dict[str, Any]) -> None:
    """Paired differences to the baseline."""
    rows, labels, baseline = found["rows"], found["quantities"], found["baseline"]
    names = [n for n in (*MAIN, "rate", "nll", "ece") if any(n in r["differences"] for r in rows)]
    if not names:
        return
    print(f"Minus {baseline}, paired:\n")
    print("| method | " + " | ".join(heading(labels[name]) for name in names) + " |")
    print("|---|" + "---|" * len(names))
    for row in rows:
        if row["method"] != baseline:
            cells = [cell(name, row["differences"].get(name), sign="+") for name in names]
            print(f"| {row['method']} | " + " | ".join(cells) + " |")
    print()


def cost_table(found: dict[str, Any]) -> None:
    """Seconds of an epoch."""
    rows = found["rows"]
    print("| method | s/epoch | relative | parameters |")
    print("|---|---|---|---|")
    for row in rows:
        seconds = row["estimates"].get("seconds_per_epoch")
        told = "–" if seconds is None else f"{number(seconds['value']):.3g}"
        relative = number(row["relative_time"])
        print(f"| {row['method']} | {told} | {relative:.2f} | {row['parameters']:,} |")
    print()


def discrepancy_table(found: dict[str, Any]) -> None:
    """How much larger on test than on training samples."""
    rows = found["rows"]
    names = ("gradient_norm", "hessian_norm", "normalized")
    print("(test - train)/train:\n")
    print("| method | gradient norm | Hessian norm | normalised curvature |")
    print("|---|---|---|---|")
    for row in rows:
        cells = [cell(name, row["discrepancies"].get(name)) for name in names]
        print(f"| {row['method']} | " + " | ".join(cells) + " |")
    print()


def learned_table(found: dict[str, Any]) -> None:
    """Ranges of learned betas and gammas, over layers and seeds."""
    rows = found["rows"]
    lines = []
    for row in rows:
        cells = []
        for dial in ("betas", "gammas"):
            values = [number(v) for run in row["runs"] for v in run[dial].values()]
            cells.append(f"{min(values):.3g} to {max(values):.3g}" if values else "–")
        if cells != ["–", "–"]:
            lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    if lines:
        print("| method | beta | gamma |\n|---|---|---|")
        print("\n".join(lines) + "\n")


def order(found: dict[str, Any]) -> None:
    """How far the order of the methods is the paper's: concordant pairs."""
    rows = found["rows"]
    known = [row for row in rows if row["method"] in PAPER and "normalized" in row["estimates"]]
    if len(known) < len(PAPER):
        return
    names = ("gradient_norm", "hessian_norm", "normalized")
    for column, name in enumerate(names):
        mine = {row["method"]: number(row["estimates"][name]["value"]) for row in known}
        pairs = list(combinations(mine, 2))
        same = sum(
            (mine[a] < mine[b]) == (PAPER[a][column] < PAPER[b][column])
            for a, b in pairs
            if PAPER[a][column] != PAPER[b][column]
        )
        counted = sum(PAPER[a][column] != PAPER[b][column] for a, b in pairs)
        ours = " < ".join(sorted(mine, key=mine.__getitem__))
        theirs = " < ".join(sorted(PAPER, key=lambda m, c=column: PAPER[m][c]))
        print(f"- {name}: {same} of {counted} pairs as in the paper's Table 1;")
        print(f"  here {ours}; paper {theirs}")
    print()


def cell(name: str, found: dict[str, Any] | None, *, sign: str = "", median: bool = False) -> str:
    """An estimate with its interval."""
    if found is None or math.isnan(number(found["value"])):
        return "–"
    share = name.startswith(SHARES)
    scale, form = (100.0, f"{sign}.1f") if share else (1.0, f"{sign}.3g")
    told = f"{scale * number(found['value']):{form}}"
    low, high = number(found["low"]), number(found["high"])
    if not (math.isnan(low) or math.isnan(high)):
        told += f" [{scale * low:{form}}, {scale * high:{form}}]"
    middle = number(found["median"])
    if median and not share and not math.isnan(middle):
        told += f"; median {middle:.3g}"
    return told


def heading(label: Any) -> str:
    """Shares are shown in per cent."""
    return str(label).replace("(share)", "(%)").replace("error, 15 bins", "error, 15 bins (%)")


def number(value: Any) -> float:
    """A number of a results file, where nan and infinities are words."""
    return float(value)


TABLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "geometry": geometry,
    "attacks": attacks,
    "more": more,
    "cost": cost_table,
    "differences": difference_table,
    "discrepancy": discrepancy_table,
    "learned": learned_table,
    "order": order,
    "notes": notes,
}
"""Name -> what prints it."""

if __name__ == "__main__":
    main()
