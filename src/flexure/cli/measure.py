"""`flexure measure`: the curvature of a network, or of two side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flexure.cli.chosen import SPLITS, dials_of, drawn, numbers, output, side_by_side
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
from flexure.contracts import BudgetError, FlexureError
from flexure.data import batches, load_data
from flexure.measure.robustness_of_gradients import RADII
from flexure.methods.measurements import NOISE_SAMPLES, RATE_SAMPLES, Measurements, measure_model
from flexure.methods.measures import BOUND, MEASURES
from flexure.record import record, write_json

__all__ = ["measure"]

_STORE = ".flexure-measure"  # in the output folder, while a measurement is unfinished
_ALL = (*MEASURES, BOUND)
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_MOST = 1_000_000_000


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
            help=f"Split of the data; default: the first there is of {', '.join(SPLITS)}."
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
    dials = None if steer is None else dials_of(steer)
    settings: dict[str, Any] = {
        "measures": [part.strip() for part in measures.split(",") if part.strip()],
        "rate_samples": rate_samples,
        "noise_samples": noise_samples,
        "tol": tol,
        "max_products": max_products,
        "orders": numbers("--orders", orders, int),
        "directions": directions,
        "normalization": normalization,
        "radii": None if radii is None else numbers("--radii", radii, float),
        "memory": None if memory is None else _bytes(memory),
        "seed": seed,
    }
    with (
        output(out, _STORE) as store,
        working(store, "measurement", resume=resume),
        _budgeted(memory),
        users_code(),
        resumable(),
    ):
        loaded = load(model, device)
        other = None if against is None else load(against, device)
        chosen, split = drawn(load_data(data), split, samples, seed)
        prepare = partial(batches, preprocess=loaded.preprocess, device=device, cache=True)
        given = prepare(chosen, batch_size=batch_size)
        for each in (loaded, other):
            if each is not None:
                check_takes(each, given)
        pair = side_by_side(loaded, other, dials, adapter, given)
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
