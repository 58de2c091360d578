"""Prints the tables of `robustness.md` from the results files that `robustness.py` keeps.

python docs/experiments/robustness_table.py docs/experiments/results/robustness/sweep20.json ...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexure.methods.attack_model_result import radius_text


def main() -> None:
    """The tables of each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    for path in parser.parse_args().paths:
        payload = json.loads(path.read_text())
        print(f"{path.stem}, written at commit {payload['commit'][:7]}\n")
        found = payload["numbers"]
        kind = "candidates" if "candidates" in found else "models" if "models" in found else "cells"
        {"candidates": swept, "models": attacked, "cells": corrupted}[kind](found)


def swept(found: Mapping[str, Any]) -> None:
    """Rows on test data, the curve over beta, the chosen dial, the search."""
    norm = found["norm"]
    rows = [*found["rows"], *([found["oracle"]] if found["oracle"] else [])]
    radii = list(rows[0]["robust"])
    heads = [radius_text(float(eps), norm) for eps in radii]
    print(f"Test: {found['samples']['test']} images, {found['report_attack']}, {norm}.\n")
    table(
        ["dial", "clean", "difference", *(f"{head}" for head in heads)],
        [
            [row["name"], share(row["clean"])]
            + [points(row["clean_difference"]) if row["dial"] else ""]
            + [share(row["robust"][eps]) for eps in radii]
            for row in rows
        ],
    )
    print("Differences to the plain network under attack, in points:\n")
    table(
        ["dial", *heads],
        [[r["name"], *(points(r["robust_difference"][eps]) for eps in radii)] for r in rows[1:]],
    )
    curve(found, radii, heads)
    best(found)


def curve(found: Mapping[str, Any], radii: Sequence[str], heads: Sequence[str]) -> None:
    """Accuracy against beta on test data."""
    if not found["curve"]:
        return
    first = found["curve"][0]
    print(f"By beta, c = {first['c']:g}, calibration {first['match']}, {found['attack']}:\n")
    table(
        ["beta", "clean", *heads],
        [
            [f"{p['beta']:g}", percent(p["clean"]), *(percent(p["robust"][eps]) for eps in radii)]
            for p in found["curve"]
        ],
    )


def best(found: Mapping[str, Any]) -> None:
    """The dial that was chosen, and the best ones of the grid on validation data."""
    eps = str(found["eps"])
    print(f"Validation: {found['samples']['val']} images, {found['attack']}; best shared dials:\n")
    shared = [one for one in found["candidates"] if one["stage"] == "shared" and one["allowed"]]
    shared = sorted(shared, key=lambda one: -one["objective"])[:6]
    named = [("plain", found["candidates"][0]), ("chosen", found["chosen"])]
    named += [("shared", one) for one in shared]
    table(
        ["", "dial", "clean", radius_text(float(eps), found["norm"]), "objective"],
        [
            [
                name,
                dial(one["dial"]),
                f"{100 * one['clean']:.1f}",
                f"{100 * one['robust'][eps]:.1f}",
                f"{one['objective']:.4f}",
            ]
            for name, one in named
        ],
    )
    count = len(found["candidates"])
    minutes = {stage: round(seconds / 60, 1) for stage, seconds in found["seconds"].items()}
    print(f"{count} candidates; minutes, of a resumed run those of its last part: {minutes}.\n")


def attacked(found: Mapping[str, Any]) -> None:
    """Accuracy of each model, differences, costs, certificates, masking."""
    models, told = found["models"], found["differences"]
    samples = len(models[0]["clean"])
    lines = {(c["model"], c["norm"], c["protocol"], c["attack"]): c for c in found["curves"]}
    rows = []
    for (name, norm, protocol, attack), line in lines.items():
        values = list(zip(line["eps"], line["accuracy"], strict=True))
        clean = [name, "", "0", "", "", share(values[0][1])]
        rows += [] if clean in rows else [clean]
        rows += [
            [name, norm, radius_text(eps, norm), protocol, attack, share(accuracy)]
            for eps, accuracy in values[1:]
        ]
    print(f"{samples} images.\n")
    table(["network", "norm", "eps", "protocol", "after", "right, %"], rows)
    if told is not None:
        print("Differences of the worst case, in points:\n")
        table(
            ["norm", "eps", "protocol", "difference"],
            [["", "0", "", points(told["clean"])]]
            + [
                [
                    one["norm"],
                    radius_text(one["eps"], one["norm"]),
                    one["protocol"],
                    points(one["difference"]),
                ]
                for one in told["attacked"]
            ],
        )
    for note in found["notes"]:
        print(f"Note: {note}.")
    for one in found["certified"] or ():
        print(f"Certified at l2 {one['eps']:g}: {share(one['accuracy'])}")
    for name, report in masks(found["masking"]):
        print(f"Masking, {name}: {report['verdict']}; {'; '.join(report['reasons'])}")
        for check in report["checks"]:
            print(f"  {check['name']}: {check['sentence']}")
    print()


def masks(found: Any) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The masking report, and of which network it is."""
    if found is None:
        return []
    return [(found.get("model", ""), found)]


def corrupted(found: Mapping[str, Any]) -> None:
    """Means over images, the model's and the reference's."""
    rows = [(one["name"], one) for one in (found["clean"], *found["shifts"], *found["means"])]
    table(
        ["images", *found["names"], "difference"],
        [[n, *(mean(one[k]) for k in ("accuracy", "reference_accuracy")), points(one["difference"])]
         for n, one in rows],
    )  # fmt: skip
    for note in found["notes"]:
        print(f"Note: {note}")
    print()


def dial(value: Any) -> str:
    """A dial in a cell of a table."""
    if value is None:
        return "none"
    beta, c = (", ".join(f"{v:.2g}" for v in value[key].values()) for key in ("betas", "cs"))
    return f"beta {beta}; c {c}; {value['match'] or 'not calibrated'}"


def share(value: Mapping[str, float]) -> str:
    """A share with its interval."""
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def percent(value: Mapping[str, float]) -> str:
    """A share without one."""
    return f"{100 * value['value']:.1f}"


def mean(value: Mapping[str, float] | None) -> str:
    """A mean over images, or a share."""
    return "" if value is None else f"{100 * value.get('mean', value.get('value', 0)):.1f}"


def points(value: Mapping[str, float] | None) -> str:
    """A difference with its interval."""
    if value is None:
        return ""
    middle = value.get("value", value.get("mean"))
    return f"{100 * middle:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in Markdown."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


if __name__ == "__main__":
    main()
