"""Curvature of pretrained CIFAR-10 ResNets, plain and steered, on lossless test images.

    FLEXURE_DATA=FOLDER python docs/experiments/curvature.py --depths 20 56
    FLEXURE_DATA=FOLDER python docs/experiments/curvature.py --depths 32 44
    FLEXURE_DATA=FOLDER python docs/experiments/curvature.py --across

Every network is measured on the same images with the same random draws. One results file a depth,
written anew after each network, in `docs/experiments/results/curvature/`. What is finished is kept
in `--work`, so that a run that was interrupted goes on where it stopped. The last command comes
after the others and measures little anew: it compares the depths, in `depths.json`.
`curvature_table.py` prints the tables.
"""

from __future__ import annotations

import argparse
import os
from copy import deepcopy
from dataclasses import asdict, replace
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
        found = everything[depth] = {}
        numbers = []
        for name, model in models(loaded.model, images, options).items():
            store = options.work / f"resnet{depth}" / name.replace(" ", "-")
            found[name] = measured(name, model, images, store, options)
            if options.across:
                continue
            numbers.append(
                network(found[name]) | {"differences": differences(found, name, options)}
            )
            write(options, f"resnet{depth}.json", {"depth": depth, "networks": numbers})
            told = ", ".join(f"{key} {value:.1f}" for key, value in found[name].seconds.items())
            print(f"resnet{depth} {name}: seconds: {told}", flush=True)
    if options.across:
        write(options, "depths.json", {"differences": across(everything, options)})


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


def differences(
    found: dict[str, ModelMeasurements], name: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """How a network compares, image by image, with the plain one.

    That has no curvature rate: rates are compared with that of the network that is steered least.
    """
    model = found[name]
    told = [] if name == PLAIN else pairs(model, found[PLAIN], options)
    first = next((each for each in found.values() if each.rate is not None), model)
    if first is not model and model.rate is not None:
        told += pairs(only_rate(model), only_rate(first), options)
    return told


def across(
    found: dict[int, dict[str, ModelMeasurements]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """How deeper networks compare with the shallowest one at the same setting."""
    shallow, *deeper = sorted(found)
    return [
        {"depth": depth, "name": name, **difference, "against": f"resnet{shallow}"}
        for depth in deeper
        for name, model in found[depth].items()
        for difference in pairs(model, found[shallow][name], options)
    ]


def pairs(
    model: ModelMeasurements, other: ModelMeasurements, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Paired differences of a network to another one."""
    return [
        {"against": other.name, **asdict(one)} for one in compared(model, other, seed=options.seed)
    ]


def only_rate(model: ModelMeasurements) -> ModelMeasurements:
    """Without its other measures."""
    return replace(model, summaries={"rate": model.summaries["rate"]})


def write(options: argparse.Namespace, name: str, numbers: dict[str, Any]) -> None:
    """Writes a results file; no path of this machine is in it."""
    config = {
        key: value for key, value in vars(options).items() if key not in ("out", "work", "across")
    }
    payload = record(config=config, seed=options.seed, numbers=numbers)
    write_json(options.out / name, payload)


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
    parser.add_argument("--rate-samples", type=int, default=846)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--across", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("build") / "curvature")
    return parser.parse_args()


if __name__ == "__main__":
    main()
