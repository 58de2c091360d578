"""`flexure tune`: ways to adapt a network, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flexure.cli.common import (
    AsJson,
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
from flexure.contracts import FlexureError, LoadedModel
from flexure.data import PreparedBatches, load_data
from flexure.methods.arms import ARMS, RATE_FACTORS
from flexure.methods.head import HEAD_LEARNING_RATE
from flexure.methods.tune import tune as compare
from flexure.methods.tune_result import TuneResult
from flexure.record import check_writable, record, write_json
from flexure.surgery import sites as find_sites

__all__ = ["tune"]

_FACTORS = ",".join(f"{factor:g}" for factor in RATE_FACTORS)
_STORE = ".flexure-tune"  # in the output folder, while a comparison is unfinished


def tune(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="Data address: sklearn:digits, npz:FILE, idx:DIR, folder:DIR, hf:NAME.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-tune"),
    arms: Annotated[
        str, typer.Option(help="Ways to adapt, with commas; the probe is always among them.")
    ] = ",".join(ARMS),
    epochs: Annotated[int, typer.Option(min=1, max=100_000, help="Of every training.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each arm.")] = 3,
    rate_factors: Annotated[
        str,
        typer.Option(
            help="Sweep: factors on each arm's own learning rate, with commas. Every arm with "
            "something to choose tries as many settings: steered so many betas, trainable_ct so "
            "many pairs of start and rate."
        ),
    ] = _FACTORS,
    head_rate: Annotated[
        float, typer.Option(help="Learning rate of every arm's head.")
    ] = HEAD_LEARNING_RATE,
    head: Annotated[
        str | None, typer.Option(help="Path of the head; default: the last Linear.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of activation sites to adapt; may be repeated."),
    ] = None,
    train_size: Size = None,
    val_size: Size = None,
    test_size: Size = None,
    device: Device = "cpu",
    batch_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Samples in a training step.")
    ] = 32,
    seed: Seed = 42,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Adapt a network in several ways, fairly; write results, adapters and report."""
    factors = _numbers(rate_factors)
    store = check_writable(out) / _STORE
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    with working(store, "comparison", resume=resume), users_code(), resumable():
        loaded = load(model, device)
        train, val, test = prepared(loaded, load_data(data), sizes, device, batch_size, seed)
        summary = _sites(loaded, train)
        found = compare(
            loaded.model,
            train=train,
            val=val,
            test=test,
            arms=_names(arms),
            seeds=range(seed, seed + seeds),
            epochs=epochs,
            batch_size=batch_size,
            rate_factors=factors,
            head_learning_rate=head_rate,
            head=head or loaded.head,
            where=where or None,
            store=store,
            adapters=out / "adapters",
            progress=not as_json and sys.stderr.isatty(),
        )
    config = {
        "model": model, "data": data, "arms": _names(arms), "epochs": epochs,
        "seeds": list(found.seeds), "rate_factors": factors, "head_rate": head_rate,
        "head": found.head, "where": where,
        "sizes": sizes, "split_seed": seed, "preprocess": repr(loaded.preprocess),
        "batch_size": batch_size, "device": device,
    }  # fmt: skip
    payload = record(config=config, seed=seed, numbers=found.to_dict())
    write_json(out / "results.json", payload)
    _write_page(out / "report.html", found, payload)
    discard(store)
    if as_json:
        print_json(payload)
    else:
        _print(found, summary, out)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FlexureError(f"expected --rate-factors like 1,0.3,3, got {text!r}") from None


def _sites(loaded: LoadedModel, train: PreparedBatches) -> str:
    """What the activations are; a network without any can be adapted all the same."""
    x, _ = next(iter(train))
    try:
        return find_sites(loaded.model, x[:2]).summary
    except FlexureError as error:
        return str(error)


def _write_page(path: Path, found: TuneResult, payload: dict[str, Any]) -> None:
    from flexure.report import run_table, tune_page

    title = f"{payload['config']['model']} adapted to {payload['config']['data']}"
    tune_page(path, found, title=title, run=run_table(payload))


def _print(found: TuneResult, summary: str, out: Path) -> None:
    typer.echo(summary)
    typer.echo(str(found))
    typer.echo(f"Report:   {out / 'report.html'}")
    typer.echo(f"Results:  {out / 'results.json'}")
    typer.echo(f"Adapters: {out / 'adapters'}")
