"""Prints the tables of `tuning.md` from the results files of `flexure tune`.

    python docs/experiments/tuning_table.py docs/experiments/results/tuning/*.json
    python docs/experiments/tuning_table.py --keep FOLDER mnist-20/results.json

With `--keep FOLDER` it copies each file there, named like its folder, without the learned values of
the single runs, which are most of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "arm", "trained", "chosen", "test, %", "95 %", "minus the probe, points", "95 %",
    "won / lost", "seconds", "step, MiB", "saturated, %",
)  # fmt: skip


def table(name: str, found: dict[str, Any]) -> None:
    """One row an arm."""
    print(f"### {name}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for arm in found["numbers"]["arms"]:
        mean, gain, saturated = arm["accuracy"], arm["difference"], arm["saturated"]
        cells = [arm["name"], f"{arm['parameters']:,}", arm["setting"] or "–"]
        cells.append(f"{100 * mean['mean']:.2f}")
        cells.append(f"{100 * mean['low']:.2f} to {100 * mean['high']:.2f}")
        if gain is None:
            cells += ["–", "–", "–"]
        else:
            cells.append(f"{gain['points']:+.2f}")
            cells.append(f"{gain['low']:+.2f} to {gain['high']:+.2f}")
            cells.append(f"{gain['wins']} / {gain['losses']}")
        cells += [f"{arm['seconds']:.1f}", f"{arm['step_bytes'] / 2**20:.1f}"]
        cells.append("–" if saturated is None else f"{100 * saturated:.1f}")
        print("| " + " | ".join(cells) + " |")
    print("\nEach seed, %: " + "; ".join(
        f"{arm['name']} " + ", ".join(f"{100 * a:.1f}" for a in arm["accuracies"])
        for arm in found["numbers"]["arms"]
    ) + ".\n")  # fmt: skip


def keep(path: Path, folder: Path) -> Path:
    """Copies a results file without the learned values."""
    found = json.loads(path.read_text())
    for arm in found["numbers"]["arms"]:
        for run in arm["runs"]:
            run.pop("betas"), run.pop("cs")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{path.parent.name}.json"
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    for path in options.files:
        path = keep(path, options.keep) if options.keep else path
        table(path.stem, json.loads(path.read_text()))
