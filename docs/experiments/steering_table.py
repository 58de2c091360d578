"""Prints the tables of `steering.md` from the results files beside it.

    python docs/experiments/steering_table.py docs/experiments/results/steering/digits-*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats


def main(paths: list[str]) -> None:
    found = [json.loads(Path(path).read_text()) for path in paths]
    found.sort(key=lambda result: result["seed"])
    print("| seed | n | beta | c | within one s.e. | beta = 1, % | chosen, % | gain, points | 95 % |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    gains, wins, losses = [], 0, 0
    for result in found:
        n = result["numbers"]
        gain, test, best = n["gain"], n["test"], n["best"]
        gains.append(gain["points"])
        wins, losses = wins + gain["wins"], losses + gain["losses"]
        print(
            f"| {result['seed']} | {gain['n']} | {best['beta']:g} | {best['c']:.3g} "
            f"| {len(n['within_one_se'])} of {len(n['settings'])} "
            f"| {100 * test['baseline']:.2f} | {100 * test['best']:.2f} "
            f"| {gain['points']:+.2f} | {gain['low']:+.2f} to {gain['high']:+.2f} |"
        )
    mean, error = float(np.mean(gains)), stats.sem(gains)
    half = error * stats.t.ppf(0.975, len(gains) - 1)
    print(
        f"\nMean gain over {len(gains)} seeds: {mean:+.2f} points, 95 % t-interval "
        f"{mean - half:+.2f} to {mean + half:+.2f}; {wins} test images won, {losses} lost."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
