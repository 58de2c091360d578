"""`flexure steer`: the beta that transfers best."""

from __future__ import annotations

import math
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from flexure.cli.common import (
    AsJson,
    BatchSize,
    Device,
    Model,
    Resume,
    Seed,
    Size,
    discard,
    load,
    prepared,
    print_json,
    resumable,
    users_code,
    working,
)
from flexure.contracts import FlexureError
from flexure.data import load_data
from flexure.methods.search import BETAS, search_beta
from flexure.methods.search_result import BetaSearch
from flexure.record import check_writable, record, write_json

__all__ = ["steer"]

_STORE = ".flexure-search"  # in the output folder, while a search is unfinished
_MOST_BETAS = 10_000


class Protocol(str, Enum):
    """How probes are trained."""

    converged = "converged"
    published = "published"


class Features(str, Enum):
    """How features are computed."""

    exact = "exact"
    interpolated = "interpolated"


def steer(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Data address: sklearn:digits, npz:FILE, idx:DIR, folder:DIR, hf:NAME.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-steer"),
    betas: Annotated[
        str | None,
        typer.Option(
            help="Grid: start:stop:step, or values with commas; 1 is added. Default: "
            f"{len(BETAS)} values from {min(BETAS):g} to {max(BETAS):g}."
        ),
    ] = None,
    c: Annotated[
        str, typer.Option(help="Mixture in [0, 1], 'balanced', or several with commas.")
    ] = "0.5",
    head: Annotated[
        str | None, typer.Option(help="Path of the head; default: the last Linear.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Pattern of sites to steer; may be repeated.")
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="How the probes are trained.")
    ] = Protocol.converged,
    features: Annotated[
        Features, typer.Option(help="How the features are computed.")
    ] = Features.exact,
    train_size: Size = None,
    val_size: Size = None,
    test_size: Size = None,
    device: Device = "cpu",
    batch_size: BatchSize = 256,
    seed: Seed = 42,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Find the beta that transfers best to labelled data; write results, adapter and report."""
    grid, mixtures = BETAS if betas is None else _grid(betas), _mixtures(c)
    store = check_writable(out) / _STORE
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    with working(store, "search", resume=resume), users_code(), resumable():
        loaded = load(model, device)
        train, val, test = prepared(loaded, load_data(data), sizes, device, batch_size, seed)
        found = search_beta(
            loaded.model,
            train=train,
            val=val,
            test=test,
            head=head or loaded.head,
            betas=grid,
            c=mixtures,
            protocol=protocol.value,
            features=features.value,
            where=where or None,
            seed=seed,
            resume=store,
            progress=not as_json and sys.stderr.isatty(),
        )
        with found.install() as installed:
            installed.save(out / "adapter")
    config = {
        "model": model, "data": data, "betas": betas or list(BETAS), "c": c,
        "protocol": protocol.value, "features": features.value, "head": found.head,
        "where": where, "sizes": sizes, "seed": seed,
        "preprocess": repr(loaded.preprocess), "batch_size": batch_size, "device": device,
    }  # fmt: skip
    payload = record(config=config, seed=seed, numbers=found.to_dict())
    write_json(out / "results.json", payload)
    _write_page(out / "report.html", found, payload)
    discard(store)
    if as_json:
        print_json(payload)
    else:
        _print_search(found, out)


def _grid(text: str) -> list[float]:
    """`0.7:0.99:0.01` (both ends included) or `0.7,0.8`."""
    wrong = FlexureError(f"expected --betas like 0.7:0.99:0.01 or 0.7,0.8, got {text!r}")
    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise wrong from None
    if not all(map(math.isfinite, parts)):
        raise wrong
    if ":" not in text:
        return parts
    if len(parts) != 3 or not 0 < parts[2] <= 1 or parts[1] < parts[0]:
        raise wrong
    start, stop, step = parts
    steps = (stop - start) / step + 1e-6
    if steps >= _MOST_BETAS:
        raise FlexureError(
            f"expected at most {_MOST_BETAS:,} values in --betas, got more in {text!r}; take a "
            f"larger step"
        )
    return [round(start + i * step, 10) for i in range(int(steps) + 1)]


def _mixtures(text: str) -> Any:
    values: list[Any] = []
    for part in text.split(","):
        try:
            values.append("balanced" if part.strip() == "balanced" else float(part))
        except ValueError:
            raise FlexureError(
                f"expected --c to be numbers in [0, 1] or 'balanced', got {part!r}"
            ) from None
    return values if len(values) > 1 else values[0]


def _write_page(path: Path, found: BetaSearch, payload: dict[str, Any]) -> None:
    from flexure.report import run_table, search_page

    title = f"{payload['config']['model']} steered for {payload['config']['data']}"
    search_page(path, found, title=title, run=run_table(payload))


def _print_search(found: BetaSearch, out: Path) -> None:
    typer.echo(found.report.summary)
    typer.echo(str(found))
    typer.echo(f"Report:  {out / 'report.html'}")
    typer.echo(f"Results: {out / 'results.json'}")
    typer.echo(f"Adapter: {out / 'adapter'}")
