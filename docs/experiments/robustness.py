"""The experiments of `robustness.md`: each is one `flexure attack`, and keeps what it found.

FLEXURE_DATA=FOLDER OMP_NUM_THREADS=1 python docs/experiments/robustness.py sweep20
python docs/experiments/robustness.py --list

A run that was interrupted goes on; one that is finished is only collected: its `results.json`
without pictures' data and without local paths. Those with `--after` need the sweep that they name.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "robustness"
RESNET20 = "flexure:resnet20?weights=$FLEXURE_DATA/resnet-cifar10/resnet20.safetensors"
RESNET56 = "flexure:resnet56?weights=$FLEXURE_DATA/resnet-cifar10/resnet56.safetensors"
IMAGES = "npz:$FLEXURE_DATA/cifar10-lossless/test846.npz"
TWINS = (
    "jpeg=npz:$FLEXURE_DATA/cifar10-jpeg/test.npz"
    "?rows=$FLEXURE_DATA/cifar10-lossless/test846.npz:index_in_jpeg_test"
)
HALVES = "--val-size 446 --test-size 400 --seed 0"
LINF = "--eps linf:0.5/255,1/255,2/255,4/255,8/255"
L2 = "--eps l2:0.1,0.25,0.5"

RUNS = {
    "sweep20": f"{RESNET20} --sweep {HALVES} --groups sites --budget 130 "
    f"--betas 0.6,0.7,0.75,0.8,0.9,1 --cs 0,0.15,0.25,0.5 {LINF} --attack apgd-ce",
    "sweep56": f"{RESNET56} --sweep {HALVES} --groups layers --budget 20 "
    f"--betas 0.6,0.7,0.8,0.9,1 --cs 0,0.15,0.5 --match none,mean+std {LINF} --attack apgd-ce",
    "sweep20-l2": f"{RESNET20} --sweep {HALVES} --groups none --search none --match none "
    f"--betas 0.6,0.65,0.7,0.75,0.8,0.85,0.9,0.95,1 --cs 0.25,0.5 {L2} --attack apgd-ce",
    "autoattack20": f"{RESNET20} --after {{sweep20}} --samples 300 --attack autoattack "
    "--eps linf:1/255 --seed 0",
    "radii20": f"{RESNET20} --after {{sweep20}} --attack apgd-ce --attack apgd-dlr {LINF} {L2} "
    "--certify --seed 0",
    "masking20": f"{RESNET20} --after {{sweep20}} --samples 100 --attack apgd-ce --eps linf:1/255 "
    "--masking --seed 0",
    "published20": f"{RESNET20} --after {{sweep20}} --samples 100 --attack apgd-ce --attack apgd-t "
    "--eps linf:8/255 --eps l2:0.5 --protocol published --seed 0",
    "corruptions20": f"{RESNET20} --after {{sweep20}} --corruptions --shift {TWINS} --seed 0",
}
DROPPED = ("examples", "surface", "surfaces")
"""Of the results: what only pictures need."""


def main() -> None:
    """Runs and collects the named experiments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *RUNS])
    parser.add_argument("--work", type=Path, default=Path("robustness"), help="folder of the runs")
    parser.add_argument("--list", action="store_true", help="print the commands")
    options = parser.parse_args()
    for name in options.names or (RUNS if options.list else ()):
        command = f"flexure attack {RUNS[name]} --data {IMAGES} --out {options.work / name}"
        command = command.format(**{one: options.work / one for one in RUNS})
        print(f"{name}: {command}")
        if not options.list:
            run(name, command, options.work / name)


def run(name: str, command: str, out: Path) -> None:
    """Runs one experiment to its end, or continues it, and collects it."""
    if not (out / "results.json").exists():
        words = [os.path.expandvars(word) for word in shlex.split(command)]
        resumed = ["--resume"] if (out / ".flexure-attack").exists() else []
        subprocess.run([sys.executable, "-m", *words, *resumed], check=True)
    payload = shown(json.loads((out / "results.json").read_text()), out.parent)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n")


def shown(value: Any, work: Path) -> Any:
    """Without what only pictures need, without local folders, and with lists of truths as text."""
    if isinstance(value, dict):
        return {key: shown(item, work) for key, item in value.items() if key not in DROPPED}
    if isinstance(value, list) and value and all(isinstance(item, bool) for item in value):
        return "".join(str(int(item)) for item in value)
    if isinstance(value, list):
        return [shown(item, work) for item in value]
    if not isinstance(value, str):
        return value
    for folder, name in ((os.environ.get("FLEXURE_DATA"), "$FLEXURE_DATA"), (str(work), "WORK")):
        value = value.replace(folder.rstrip("/"), name) if folder else value
    return value


if __name__ == "__main__":
    main()
