"""`flexure train`: one network, trained by several methods of low curvature and their rivals."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from flexure.calling import seeded
from flexure.cli.chosen import Space, described, space
from flexure.cli.common import (
    AsJson,
    Device,
    Model,
    Resume,
    Seed,
    Size,
    check_takes,
    discard,
    load,
    print_json,
    resumable,
    users_code,
    working,
)
from flexure.contracts import FlexureError, LabelledData, LoadedModel
from flexure.data import Augmentation, PreparedBatches, Subset, batches, load_data, split
from flexure.methods.flat import DEFAULTS, RADII, train_flat
from flexure.methods.flat_methods import METHODS, flat_methods
from flexure.methods.flat_result import FlatTraining
from flexure.methods.flat_task import OPTIMIZERS, Network
from flexure.models import load_model
from flexure.record import check_writable, record, write_json

__all__ = ["train"]

_STORE = ".flexure-train"  # in the output folder, while a comparison is unfinished
_RATES = ", ".join(f"{rate:g} for {name}" for name, rate in OPTIMIZERS.items())
_RADII = ",".join(f"{radius:g}" for radius in RADII)
_READ_BATCH = 256  # samples that are prepared, validated and measured together


def train(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Data address: sklearn:moons, sklearn:digits, npz:FILE, idx:DIR, folder:DIR, "
            "hf:NAME.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-train"),
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated. One of {', '.join(METHODS)}, or several with + between.",
            show_default=", ".join(DEFAULTS),
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: the number of a method (weight of its penalty, radius of its "
            "attack), where not the published one; may be repeated."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, max=100_000, help="Of every training.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings by each method.")] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Samples in a training step.")
    ] = 128,
    optimizer: Annotated[str, typer.Option(help=f"{' or '.join(OPTIMIZERS)}.")] = "sgd",
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default=_RATES)] = None,
    weight_decay: Annotated[
        float, typer.Option(help="On all parameters but learned betas and gammas.")
    ] = 5e-4,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient.", show_default="any")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="last or best: the weights after which epoch count.")
    ] = "last",
    augment: Annotated[
        str | None,
        typer.Option(help="Changes of training images, with commas: flip, crop."),
    ] = None,
    residual: Annotated[
        str, typer.Option(help="Residual sums of LCNNs: sum, mean or sqrt2.")
    ] = "sum",
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=1_000_000_000,
            help="Test and training samples each that geometry and attacks are measured on; "
            "accuracy and calibration take all test data.",
        ),
    ] = 1000,
    radii: Annotated[str, typer.Option(help="l2 radii of the attacks, with commas.")] = _RADII,
    train_size: Size = None,
    val_size: Size = None,
    test_size: Size = None,
    device: Device = "cpu",
    seed: Seed = 42,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the final weights of every run.")
    ] = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a network by several methods, fairly; measure curvature and robustness; report."""
    methods = method or list(DEFAULTS)
    strengths = _strengths(weight or [])
    flat_methods(methods, strengths)  # a mistake is told before anything is read
    settings: dict[str, Any] = {
        "methods": methods,
        "strengths": strengths,
        "seeds": range(seed, seed + seeds),
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "clip": clip,
        "keep": keep,
        "augment": None if augment is None else _augmentation(augment),
        "residual": residual,
        "samples": samples,
        "radii": _numbers(radii),
    }
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    store = check_writable(out) / _STORE
    with working(store, "comparison", resume=resume), users_code(), resumable():
        start = _start(model, device, seed)
        parts = _parts(start.loaded, load_data(data), sizes, device, seed)
        found = train_flat(
            start.network,
            train=parts.train,
            val=parts.val,
            test=parts.test,
            mean=parts.space.mean,
            std=parts.space.std,
            bounds=parts.space.bounds,
            **settings,
            device=device,
            store=store,
            weights=out / "weights" if save else None,
            progress=not as_json and sys.stderr.isatty(),
        )
    config = {
        "model": model, "start": start.says, "data": data, **settings, "seeds": list(found.seeds),
        "sizes": sizes, "split_seed": seed, "preprocess": described(start.loaded),
        "device": device,
    }  # fmt: skip
    payload = record(config=config, seed=seed, numbers=found.to_dict())
    write_json(out / "results.json", payload)
    _write_page(out / "report.html", found, payload)
    discard(store)
    if as_json:
        print_json(payload)
    else:
        _print(found, start.says, out)
    _check_finished(found)


@dataclass(frozen=True)
class _Start:
    """Where every training starts.

    Attributes:
        network: for `train_flat`.
        loaded: the model of the first seed, with its preprocessing.
        says: where the initial weights come from.
    """

    network: Network
    loaded: LoadedModel
    says: str


def _start(address: str, device: str, seed: int) -> _Start:
    """A network anew from each seed, or the pretrained one.

    Our own networks without weights are made from the seed, and the factory of a file is called
    with torch's generator there.

    Raises:
        AddressError: no such model.
        FlexureError: no such device.
    """
    own = address.startswith("flexure:") and not re.search(r"[?&]weights=", address)
    if own and re.search(r"[?&]seed=", address):
        raise FlexureError(
            f"expected a model without a seed of its own, got {address!r}: each run makes it from "
            f"its own; leave seed= out, and give --seed"
        )
    if not own and not re.search(r"\.py:[^:]*$", address):
        loaded = load(address, device)
        return _Start(loaded.model, loaded, f"the weights of {address}, for all seeds")

    def factory(number: int) -> nn.Module:
        with seeded(number), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of random weights, which are wanted
            return load_model(_seeded(address, number) if own else address).model

    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loaded = load(_seeded(address, seed) if own else address, device)
    return _Start(factory, replace(loaded, address=address), "new weights from each seed")


def _seeded(address: str, seed: int) -> str:
    return f"{address}{'&' if '?' in address else '?'}seed={seed}"


@dataclass(frozen=True)
class _Parts:
    """The data in the space where networks are trained and measured."""

    train: PreparedBatches
    val: PreparedBatches
    test: PreparedBatches
    space: Space


def _parts(
    loaded: LoadedModel,
    data: dict[str, LabelledData],
    sizes: dict[str, int | None],
    device: str,
    seed: int,
) -> _Parts:
    """Images as pixels in [0, 1] where the model's normalisation is known; test data at random.

    Raises:
        DataError: sizes that do not fit.
        FlexureError: a model that does not take the data.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    parts = split(data, seed=seed, sizes=given or None)
    own = space(loaded, parts.train)
    ready = partial(batches, preprocess=own.prepare, batch_size=_READ_BATCH, device=device)
    check_takes(loaded, ready(parts.train))
    order = torch.randperm(len(parts.test), generator=torch.Generator().manual_seed(seed))
    test = ready(Subset(parts.test, order))
    return _Parts(ready(parts.train), ready(parts.val), test, own)


def _strengths(texts: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if name in found:
            raise FlexureError(f"expected one --weight of {name}, got several; drop all but one")
        try:
            found[name] = float(value)
        except ValueError:
            raise FlexureError(
                f"expected --weight like gradreg=1e-2, got {text!r}; give a name and a number"
            ) from None
    return found


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FlexureError(
            f"expected --radii like 0.05,0.1, got {text!r}; give numbers with commas between"
        ) from None


def _augmentation(text: str) -> Augmentation:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or not set(names) <= {"flip", "crop"}:
        raise FlexureError(
            f"expected --augment flip, crop or flip,crop, got {text!r}; give one of them, or leave "
            f"it out"
        )
    return Augmentation(flip="flip" in names, crop=Augmentation.crop if "crop" in names else 0)


def _write_page(path: Path, found: FlatTraining, payload: dict[str, Any]) -> None:
    from flexure.report import run_table
    from flexure.report.train import flat_page

    title = f"{payload['config']['model']} trained on {payload['config']['data']}"
    flat_page(path, found, title=title, run=run_table(payload))


def _check_finished(found: FlatTraining) -> None:
    """Ends the program with 1 where no training was finished: there is no number then."""
    failures = [run.failure for run in found.runs if run.failure is not None]
    if len(failures) == len(found.runs):
        typer.echo(f"flexure: no training was finished; the first failed: {failures[0]}", err=True)
        raise typer.Exit(1)


def _print(found: FlatTraining, start: str, out: Path) -> None:
    typer.echo(f"Initial weights: {start}")
    typer.echo(str(found))
    typer.echo(f"Report:  {out / 'report.html'}")
    typer.echo(f"Results: {out / 'results.json'}")
