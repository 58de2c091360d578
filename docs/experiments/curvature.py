"""Curvature of pretrained CIFAR-10 ResNets, plain and steered, on lossless test images.

    FLEXURE_DATA=FOLDER python docs/experiments/curvature.py --depths 20 32 44
    FLEXURE_DATA=FOLDER python docs/experiments/curvature.py --depths 56

Every network is measured on the same images with the same random draws. One results file a depth,
written anew after each network, in `docs/experiments/results/curvature/`. What is finished is kept
in `--work`: a run that was interrupted goes on where it stopped, and one with all depths, after
those above, only adds `depths.json`, in which the depths are compared. `curvature_table.py` prints
the tables.
"""

from __future__ import annotations

import argparse
import os
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import flexure
from flexure.data import PreparedBatches, Subset, batches, load_data
from flexure.methods.measurements import ModelMeasurements, compared, measure_model
from flexure.record import record, write_json

BETAS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
DEPTHS = (20, 32, 44, 56)
MEASURES = ("curvature", "rate", "calibration", "bound")
RESULTS = Path(__file__).parent / "results" / "curvature"
PLAIN = "plain"


def main() -> None:
    """Measures network after network."""
    options = parsed()
    data = Path(os.environ["FLEXURE_DATA"])
    everything: dict[int, dict[str, ModelMeasurements]] = {}
    for depth in options.depths:
        weights = data / "resnet-cifar10" / f"resnet{depth}.safetensors"
        loaded = flexure.load_model(f"flexure:resnet{depth}?weights={weights}")
        images = drawn(loaded, data / "cifar10-lossless" / "test846.npz", options)
        found: dict[str, ModelMeasurements] = {}
        for name, model in models(loaded.model, images, options).items():
            store = options.work / f"resnet{depth}" / name.replace(" ", "-")
            found[name] = measured(name, model, images, store, options)
            write(options.out / f"resnet{depth}.json", depth, found, options)
            told = ", ".join(f"{key} {value:.1f}" for key, value in found[name].seconds.items())
            print(f"resnet{depth} {name}: seconds: {told}", flush=True)
        everything[depth] = found
    if len(everything) > 1:
        write_depths(options.out / "depths.json", everything, options)


def drawn(loaded: flexure.LoadedModel, path: Path, options: argparse.Namespace) -> PreparedBatches:
    """The same images for every depth, without regard to their class."""
    whole = load_data(f"npz:{path}")["train"]  # the only split of the file: test images
    generator = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(whole), generator=generator)[: options.samples]
    return batches(
        Subset(whole, rows),
        preprocess=loaded.preprocess,
        batch_size=options.batch_size,
        cache=True,
    )


def models(
    plain: torch.nn.Module, images: PreparedBatches, options: argparse.Namespace
) -> dict[str, torch.nn.Module]:
    """The network, and copies of it that are steered."""
    x, _ = next(iter(images))
    found = {PLAIN: plain}
    for beta in options.betas:
        found[f"beta {beta:g}"] = deepcopy(plain)
        flexure.steer(found[f"beta {beta:g}"], beta=beta, c=options.c, example=x[:2])
    return found


def measured(
    name: str,
    model: torch.nn.Module,
    images: PreparedBatches,
    store: Path,
    options: argparse.Namespace,
) -> ModelMeasurements:
    """One network; finished batches are kept in the store."""
    found = measure_model(
        model,
        images,
        names=(name, "none"),
        measures=options.measures,
        rate_samples=options.rate_samples,
        directions=options.directions,
        seed=options.seed,
        store=store,
    )
    return found.models[0]


def write(
    path: Path, depth: int, found: dict[str, ModelMeasurements], options: argparse.Namespace
) -> None:
    """What was found so far, with paired differences to the plain network.

    It has no curvature rate: rates are compared with that of the network that is steered least.
    """
    first = next((model for model in found.values() if model.rate is not None), None)
    numbers = []
    for model in found.values():
        differences = [*differences_of(model, found[PLAIN], options)]
        if first is not None:
            differences += differences_of(model, first, options, measure="rate")
        numbers.append(network(model) | {"differences": differences})
    write_json(path, recorded(options, {"depth": depth, "networks": numbers}))


def write_depths(
    path: Path, found: dict[int, dict[str, ModelMeasurements]], options: argparse.Namespace
) -> None:
    """Paired differences of deeper networks to the shallowest one at the same setting."""
    shallow, *deeper = sorted(found)
    numbers = [
        {"depth": depth, "name": name, **difference}
        for depth in deeper
        for name, model in found[depth].items()
        for difference in differences_of(model, found[shallow][name], options)
    ]
    for one in numbers:
        one["against"] = f"resnet{shallow}"
    write_json(path, recorded(options, {"differences": numbers}))


def differences_of(
    model: ModelMeasurements,
    other: ModelMeasurements,
    options: argparse.Namespace,
    measure: str | None = None,
) -> list[dict[str, Any]]:
    """How a network compares with another one, not with itself."""
    if model is other:
        return []
    return [
        {"against": other.name, **asdict(one)}
        for one in compared(model, other, seed=options.seed)
        if measure in (None, one.measure)
    ]


def recorded(options: argparse.Namespace, numbers: dict[str, Any]) -> dict[str, Any]:
    """A results file; no path of this machine is in it."""
    config = {key: value for key, value in vars(options).items() if key not in ("out", "work")}
    return record(config=config, seed=options.seed, numbers=numbers)


def network(found: ModelMeasurements) -> dict[str, Any]:
    """A network's numbers without the single samples."""
    curvature, rate = found.curvature, found.rate
    return {
        "name": found.name,
        "samples": found.samples,
        "estimates": found.estimates,
        "quantiles": None if curvature is None else curvature.quantiles,
        "converged": {name: summary.converged for name, summary in found.summaries.items()},
        "orders": None if rate is None else rate.result.orders,
        "log_norms": None if rate is None else rate.result.log_norms,
        "effective_samples": None if rate is None else rate.result.effective_samples,
        "bound": None if found.bound is None else found.bound.cross_entropy,
        "looseness": found.looseness,
        "refusals": found.refusals,
        "seconds": found.seconds,
    }


def parsed() -> argparse.Namespace:
    """The options, with the settings of the document as defaults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", choices=DEPTHS, default=DEPTHS)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--c", type=float, default=0.5)
    parser.add_argument("--measures", nargs="+", default=MEASURES)
    parser.add_argument("--samples", type=int, default=846)
    parser.add_argument("--rate-samples", type=int, default=256)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("build") / "curvature")
    return parser.parse_args()


if __name__ == "__main__":
    main()
