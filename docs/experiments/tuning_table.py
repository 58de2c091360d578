"""Prints the tables of `tuning.md` from the results files of `flexure tune` beside it.

    python docs/experiments/tuning_table.py docs/experiments/results/tuning/mnist-20.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = (
    "arm", "trained", "chosen", "test, %", "95 %", "against the probe, points", "95 %",
    "won / lost", "seconds", "step, MiB", "saturated, %",
)  # fmt: skip


def table(path: Path) -> None:
    """One row an arm."""
    found = json.loads(path.read_text())
    print(f"### {path.stem} ({found['config']['model']}, {found['config']['data']})\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for arm in found["numbers"]["arms"]:
        mean, gain, saturated = arm["accuracy"], arm["difference"], arm["saturated"]
        cells = [arm["name"], f"{arm['parameters']:,}", arm["setting"] or "–"]
        cells += [f"{100 * mean['mean']:.2f}", f"{100 * mean['low']:.2f} to {100 * mean['high']:.2f}"]
        cells += ["–", "–", "–"] if gain is None else [
            f"{gain['points']:+.2f}",
            f"{gain['low']:+.2f} to {gain['high']:+.2f}",
            f"{gain['wins']} / {gain['losses']}",
        ]  # fmt: skip
        cells += [f"{arm['seconds']:.1f}", f"{arm['step_bytes'] / 2**20:.1f}"]
        cells += ["–" if saturated is None else f"{100 * saturated:.1f}"]
        print("| " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        table(Path(name))
