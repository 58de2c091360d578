"""Flat training on real input: two moons, digits, and a 20-layer ResNet on CIFAR-10 images.

    python docs/experiments/flat_training.py moons
    python docs/experiments/flat_training.py rate
    python docs/experiments/flat_training.py digits
    FLEXURE_DATA=FOLDER python docs/experiments/flat_training.py cifar
    FLEXURE_DATA=FOLDER python docs/experiments/flat_training.py ablations

One results file each, with its pictures, in `docs/experiments/results/flat-training/` (or `--out`).
What is finished is kept in `--work`, with the report's page, so that an interrupted run goes on
where it stopped. `flat_training_table.py` prints the tables.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flexure
from flexure.data import Augmentation, Subset, batches, load_data, stratified_split
from flexure.models import CIFAR, MLP, AsFloat, CifarResNet
from flexure.record import record, write_json
from flexure.report import run_table
from flexure.report.train import flat_page
from flexure.report.train_sections import boundary_figure, noise_figure

RESULTS = Path(__file__).parent / "results" / "flat-training"
TABLE_1 = ("standard", "lcnn", "gradreg", "lcnn+gradreg", "cure", "softplus-wd", "at")
ALONE = ("csoftplus", "specnorm", "gammabn")
REMOVED = ("specnorm+gammabn", "csoftplus+gammabn", "csoftplus+specnorm")
PIXELS = {"mean": CIFAR.mean, "std": CIFAR.std, "bounds": (0.0, 1.0)}


@dataclass(frozen=True)
class Experiment:
    """What is trained on what.

    Attributes:
        network: seed -> the network.
        data: -> training, validation and test data.
        methods: names.
        settings: of `flexure.train_flat`.
    """

    network: Callable[[int], nn.Module]
    data: Callable[[], tuple[Any, Any, Any]]
    methods: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Runs one experiment."""
    options = parsed()
    torch.set_num_threads(options.threads)
    chosen = EXPERIMENTS[options.experiment]
    methods = options.methods.split(",") if options.methods else list(chosen.methods)
    settings = {**chosen.settings, **({"epochs": options.epochs} if options.epochs else {})}
    train, val, test = (
        batches(part, preprocess=AsFloat(), batch_size=250, cache=True) for part in chosen.data()
    )
    work = options.work / options.experiment
    found = flexure.train_flat(
        chosen.network,
        train=train,
        val=val,
        test=test,
        methods=methods,
        store=work,
        progress=options.progress,
        **settings,
    )
    config = {"experiment": options.experiment, "methods": methods, **shown(settings)}
    payload = record(config=config, seed=found.seeds[0], numbers=found.to_dict())
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{options.experiment}.json", payload)
    title = f"Flat training: {options.experiment}"
    flat_page(work / "report.html", found, title=title, run=run_table(payload))
    draw(found, options.out, options.experiment)
    print(found)


def draw(found: flexure.FlatTraining, folder: Path, name: str) -> None:
    """The noise curve, and the map of two-dimensional data."""
    pictures = {"noise": noise_figure(found)}
    shown = [name for name in ("standard", "lcnn") if name in found.methods]
    if found.plane is not None and shown:
        pictures["boundaries"] = boundary_figure(found, methods=shown)
    for what, picture in pictures.items():
        svg = picture.svg.replace("<svg ", '<svg style="background:white" ', 1)
        (folder / f"{name}-{what}.svg").write_text(svg + "\n")


def moons() -> tuple[Any, Any, Any]:
    """500 training, 500 validation, 1,000 test points."""
    return parts(load_data("sklearn:moons?n=2000&noise=0.2")["train"], (500, 500, 1000))


def digits() -> tuple[Any, Any, Any]:
    """1,000 training, 297 validation, 500 test images."""
    return parts(load_data("sklearn:digits")["train"], (1000, 297, 500))


def cifar() -> tuple[Any, Any, Any]:
    """10,000 training images; of the test images 500 to watch and 2,000 to report."""
    folder = Path(os.environ["FLEXURE_DATA"]) / "cifar10-jpeg"
    train = load_data(f"npz:{folder / 'train-10k.npz'}")["train"]
    held = load_data(f"npz:{folder / 'test.npz'}")["train"]  # the only split of the file
    val, test = parts(held, (500, 2000))
    return train, val, test


def parts(data: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Disjoint stratified parts, each in a random order."""
    rows = stratified_split(data.labels, sizes, seed=0)
    generator = torch.Generator().manual_seed(0)
    return tuple(
        Subset(data, part[torch.randperm(len(part), generator=generator)]) for part in rows
    )


def moons_network(seed: int) -> nn.Module:
    """Two hidden layers of 64 with BatchNorm.

    Without BatchNorm, which may stretch by gamma, an LCNN of such layers has Lipschitz constant 1.
    """
    hidden = [
        layer
        for inside in (2, 64)
        for layer in (nn.Linear(inside, 64), nn.BatchNorm1d(64), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(64, 2))


def digits_network(seed: int) -> nn.Module:
    """Three convolutions with BatchNorm, 16, 32 and 32 channels, for 8 x 8 images."""
    widths = ((1, 16, 1), (16, 32, 2), (32, 32, 1))
    layers: list[nn.Module] = []
    for inside, outside, stride in widths:
        conv = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a results file holds them."""
    plain = (int, float, str, list, tuple, dict, type(None))
    return {k: list(v) if isinstance(v, range) else v if isinstance(v, plain) else repr(v)
            for k, v in settings.items()}  # fmt: skip


def resnet20(seed: int) -> nn.Module:
    """The CIFAR ResNet of 20 layers."""
    return CifarResNet(20)


_CIFAR: dict[str, Any] = {
    **PIXELS, "epochs": 4, "samples": 250, "augment": Augmentation(), "residual": "mean",
    "clip": 1.0,
}  # fmt: skip

EXPERIMENTS = {
    "moons": Experiment(
        moons_network,
        moons,
        ("standard", "relu", *TABLE_1[1:], "sam"),
        {"clip": 1.0, "epochs": 100, "seeds": range(42, 45), "samples": 250},
    ),
    "rate": Experiment(
        lambda seed: MLP((2, 64, 64, 2), partial(nn.Tanh)),
        moons,
        ("standard", "gradreg", "sam", "crr"),
        {
            "epochs": 100, "seeds": range(42, 50), "samples": 250,
            "optimizer": "adam", "lr": 1e-2, "weight_decay": 0.0,
        },
    ),
    "digits": Experiment(
        digits_network,
        digits,
        ("standard", "relu", *TABLE_1[1:], "crr", "sam"),
        {"epochs": 20, "seeds": range(42, 45), "samples": 128, "bounds": (0.0, 1.0), "clip": 1.0},
    ),
    "cifar": Experiment(resnet20, cifar, TABLE_1, _CIFAR),
    "ablations": Experiment(
        resnet20, cifar, ("standard", "lcnn", *ALONE, *REMOVED), {**_CIFAR, "samples": 64}
    ),
}  # fmt: skip


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("flat-training-work"))
    parser.add_argument("--epochs", type=int, help="of every training")
    parser.add_argument("--methods", help="with commas, in place of the experiment's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
