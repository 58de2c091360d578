"""`flexure measure`: the curvature of a network, or of two side by side."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from flexure.cli.common import (
    AsJson,
    Device,
    Model,
    Resume,
    Seed,
    check_takes,
    discard,
    load,
    print_json,
    resumable,
    users_code,
    working,
)
from flexure.contracts import BudgetError, FlexureError, LabelledData, LoadedModel
from flexure.data import PreparedBatches, Subset, batches, load_data
from flexure.measure.robustness_of_gradients import RADII
from flexure.methods.load import load_adapter
from flexure.methods.measurements import NOISE_SAMPLES, RATE_SAMPLES, Measurements, measure_model
from flexure.methods.measures import BOUND, MEASURES
from flexure.methods.steer import steer as steer_model
from flexure.record import check_writable, record, write_json

__all__ = ["measure"]

_STORE = ".flexure-measure"  # in the output folder, while a measurement is unfinished
_ALL = (*MEASURES, BOUND)
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MOST = 1_000_000_000
_SPLITS = ("test", "validation", "train")  # the first that the data have


def measure(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Data address: sklearn:digits, npz:FILE, idx:DIR, folder:DIR, hf:NAME.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="Address of another model of the same inputs, measured on the same samples."
        ),
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(
            help="BETA or BETA,C: steer MODEL there first; without --against it is compared with "
            "itself unsteered."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a saved adapter to put into MODEL first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-measure"),
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Split of the data; default: the first there is of {', '.join(_SPLITS)}."
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=_MOST,
            help="How many samples to draw at random from the split, all if it has no more.",
        ),
    ] = 256,
    rate_samples: Annotated[
        int,
        typer.Option(
            min=1, max=_MOST, help="How many of the drawn samples the curvature rate takes."
        ),
    ] = RATE_SAMPLES,
    noise_samples: Annotated[
        int,
        typer.Option(
            min=1, max=_MOST, help="How many of the drawn samples the gradient under noise takes."
        ),
    ] = NOISE_SAMPLES,
    measures: Annotated[
        str,
        typer.Option(
            help=f"What to measure, with commas: {', '.join(_ALL)}.", show_default="all of them"
        ),
    ] = ",".join(_ALL),
    tol: Annotated[
        float,
        typer.Option(
            help="Relative residual at which the Hessian norm's eigenvector counts as converged; "
            "smaller is stricter."
        ),
    ] = 1e-2,
    max_products: Annotated[
        int,
        typer.Option(
            min=1,
            max=100_000,
            help="Hessian-vector products that a sample may take for its Hessian norm; raise it "
            "where samples did not converge.",
        ),
    ] = 20,
    orders: Annotated[
        str,
        typer.Option(
            help="Orders of the derivatives that the curvature rate is fitted to, with commas."
        ),
    ] = "1,2,3,4",
    directions: Annotated[
        int,
        typer.Option(min=1, max=100_000, help="Random directions of the curvature rate, a sample."),
    ] = 16,
    normalization: Annotated[
        str,
        typer.Option(help="Normalization of the curvature rate's derivatives: raw or factorial."),
    ] = "raw",
    radii: Annotated[
        str | None,
        typer.Option(
            help="Radii of the noise in input units, increasing, with commas; default: "
            f"{', '.join(f'{radius:.3g}' for radius in RADII)}.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What the Hessian norm may use at once, such as 2GiB, and what the noise aims at; "
            "default: no limit."
        ),
    ] = None,
    device: Device = "cpu",
    batch_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Samples that are measured together.")
    ] = 32,
    seed: Seed = 42,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Measure the curvature of a network, or of two; write results and report."""
    dials = None if steer is None else _dials(steer)
    settings: dict[str, Any] = {
        "measures": [part.strip() for part in measures.split(",") if part.strip()],
        "rate_samples": rate_samples,
        "noise_samples": noise_samples,
        "tol": tol,
        "max_products": max_products,
        "orders": _numbers("--orders", orders, int),
        "directions": directions,
        "normalization": normalization,
        "radii": None if radii is None else _numbers("--radii", radii, float),
        "memory": None if memory is None else _bytes(memory),
        "seed": seed,
    }
    with (
        _output(out) as store,
        working(store, "measurement", resume=resume),
        _budgeted(memory),
        users_code(),
        resumable(),
    ):
        loaded = load(model, device)
        other = None if against is None else load(against, device)
        chosen, split = _drawn(load_data(data), split, samples, seed)
        prepare = partial(batches, preprocess=loaded.preprocess, device=device, cache=True)
        given = prepare(chosen, batch_size=batch_size)
        for each in (loaded, other):
            if each is not None:
                check_takes(each, given)
        pair = _pair(loaded, other, dials, adapter, given)
        found = measure_model(
            pair.model,
            given,
            against=pair.against,
            names=pair.names,
            **settings,
            store=store,
            progress=not as_json and sys.stderr.isatty(),
        )
    config = {
        "model": model, "data": data, "against": against, "steer": steer, "adapter": adapter,
        "names": pair.names, "split": split, "samples": len(chosen), **settings,
        "preprocess": repr(loaded.preprocess), "batch_size": batch_size, "device": device,
    }  # fmt: skip
    payload = record(config=config, seed=seed, numbers=found.to_dict())
    _write(out, found, payload)
    discard(store)
    if as_json:
        print_json(payload)
    else:
        _print(found, out)


@dataclass(frozen=True)
class _Pair:
    """What is measured, and what it is compared with if anything."""

    model: nn.Module
    against: nn.Module | None
    names: tuple[str, str]


def _pair(
    loaded: LoadedModel,
    other: LoadedModel | None,
    dials: tuple[float, float] | None,
    adapter: Path | None,
    given: PreparedBatches,
) -> _Pair:
    """The model as it was asked for, and the other one.

    Raises:
        FlexureError: no such dial, adapter, or sites; or both a dial and an adapter.
    """
    if dials is not None and adapter is not None:
        raise FlexureError("expected --steer or --adapter, got both; choose one")
    if other is not None and _described(loaded) != _described(other):
        warnings.warn(
            f"{other.address} has another preprocessing than {loaded.address}; both are given what "
            f"{loaded.address} takes",
            stacklevel=2,
        )
    model, name = loaded.model, "model"
    second = None if other is None else other.model
    second_name = "against"
    if dials is not None:
        beta, c = dials
        if second is None:
            second, second_name = deepcopy(model), "unsteered"
        x, _ = next(iter(given))
        steer_model(model, beta=beta, c=c, example=x[:2])
        name = f"beta {beta:g}"
    if adapter is not None:
        load_adapter(model, adapter)
        name = "adapted"
    return _Pair(model, second, (name, second_name))


def _described(loaded: LoadedModel) -> str:
    """The preprocessing in words, without addresses in memory."""
    return re.sub(r"0x[0-9a-f]+", "", repr(loaded.preprocess))


def _drawn(
    data: dict[str, LabelledData], wanted: str | None, samples: int, seed: int
) -> tuple[LabelledData, str]:
    """So many samples of a split, drawn without regard to their class, in a random order.

    So that the first of them, which costly measures take, are such a draw too.
    """
    there = [name for name in _SPLITS if name in data]
    name = there[0] if wanted is None else wanted
    if name not in data:
        raise FlexureError(f"expected --split among {', '.join(there)}, got {wanted!r}")
    whole = data[name]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(whole), generator=generator)[:samples]
    return Subset(whole, rows), name


def _dials(text: str) -> tuple[float, float]:
    values = _numbers("--steer", text, float)
    if len(values) > 2:
        raise FlexureError(f"expected --steer like 0.8 or 0.8,0.5, got {text!r}")
    return values[0], values[1] if len(values) > 1 else 0.5


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise FlexureError(f"expected {option} to be numbers with commas, got {text!r}") from None


def _bytes(text: str) -> int:
    """`2GiB`, `500MiB`, or a number of bytes."""
    number = text.strip()
    factor = 1
    for unit, size in _UNITS.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), size
    try:
        found = float(number) * factor
        if 1 <= found < 2**63:
            return int(found)
    except ValueError:
        pass
    raise FlexureError(f"expected --memory like 2GiB or 500MiB, got {text!r}")


@contextmanager
def _output(out: Path) -> Iterator[Path]:
    """The store in the output folder; after an error, no empty folder that was not there before.

    Raises:
        FlexureError: it is not a folder, or files cannot be written in it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield check_writable(out) / _STORE
    except BaseException:
        with suppress(OSError):  # not empty, and then its parents are not either
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def _budgeted(memory: str | None) -> Iterator[None]:
    """A budget that nothing fits is told as an option of this command."""
    try:
        yield
    except BudgetError as error:
        unit, size = next(
            (unit, size)
            for unit, size in reversed(_UNITS.items())
            if error.needed >= size or unit == "KiB"
        )
        raise FlexureError(
            f"expected --memory of at least {math.ceil(error.needed / size)}{unit}, got {memory}; "
            f"raise it, or leave it out"
        ) from error


def _write(out: Path, found: Measurements, payload: dict[str, Any]) -> None:
    from flexure.report import run_table
    from flexure.report.measure import measure_page

    write_json(out / "results.json", payload)
    title = f"{payload['config']['model']} measured on {payload['config']['data']}"
    measure_page(out / "report.html", found, title=title, run=run_table(payload))


def _print(found: Measurements, out: Path) -> None:
    typer.echo(str(found))
    typer.echo(f"Report:  {out / 'report.html'}")
    typer.echo(f"Results: {out / 'results.json'}")
