"""The command line: one verb a job, the library's words. Nothing is computed here."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from flexure import __version__
from flexure.contracts import FlexureError, LabelledData, LoadedModel, SiteError
from flexure.data import PreparedBatches, batches, load_data, split
from flexure.methods.search import BETAS, search_beta
from flexure.methods.search_result import BetaSearch
from flexure.models import load_model
from flexure.record import check_writable, record, to_json, write_json
from flexure.surgery import sites as find_sites

__all__ = ["app", "main"]

_INTERRUPTED = 130
_STORE = ".flexure-search"  # in the output folder, while a search is unfinished
_MOST_BETAS = 10_000
_ANOTHER_EXAMPLE = "the example was a random image: give --data or --input-shape"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure, steer and train the curvature of neural networks in input space.",
)


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done, 2 the user's mistake (one line on stderr), 130 interrupted.
    """
    warnings.showwarning = _show_warning
    try:
        # typer turns an interrupt into a returned exit code.
        if (code := app(standalone_mode=False)) == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except FlexureError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        _stop("; ".join(line for line in lines if line), 2)
    except (_Unfinished, KeyboardInterrupt, typer.Abort) as stop:
        _stop(str(stop) or "interrupted", _INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # what the parser of the command line raises
            _stop(error.format_message(), 2)
        raise


class _Unfinished(Exception):
    """Interrupted, and what was finished can be continued from."""


class Protocol(str, Enum):
    """How probes are trained."""

    converged = "converged"
    published = "published"


class Features(str, Enum):
    """How features are computed."""

    exact = "exact"
    interpolated = "interpolated"


Model = Annotated[
    str,
    typer.Argument(
        help="Model address: flexure:resnet20?weights=FILE, hf:NAME, timm:NAME, "
        "torchvision:NAME, or FILE.py:factory.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Items in a forward pass.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides splits, probes and intervals.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, nothing else.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Number of items; default: a share.")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit(2)


@app.command()
def sites(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Data address to take the example from.")] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one model input, such as 3,224,224.")
    ] = None,
    device: Device = "cpu",
    batch_size: BatchSize = 1,
    seed: Seed = 42,
    as_json: AsJson = False,
) -> None:
    """List every activation: what steering would change, what it cannot, on which axis."""
    with _users_code():
        loaded = _load(model, device)
        example = _example(loaded, data, input_shape, batch_size, seed).to(device)
        try:
            report = find_sites(loaded.model, example)
        except SiteError as error:
            remedy = "" if data or input_shape else "; " + _ANOTHER_EXAMPLE
            raise FlexureError(f"{error}{remedy}") from error
    if as_json:
        _print_json({"sites": report.rows(), "summary": report.summary})
    else:
        typer.echo(str(report))


@app.command()
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
    if not resume:
        _begin(store)
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    with _users_code(), _resumable():
        loaded = _load(model, device)
        train, val, test = _parts(loaded, load_data(data), sizes, device, batch_size, seed)
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
    _discard(store)
    if as_json:
        _print_json(payload)
    else:
        _print_search(found, out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-demo"),
    seed: Annotated[
        int, typer.Option(min=0, help="Of the spiral, and the first of five for the digits.")
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """Transfer a small network between digits, and bend the boundary of a spiral."""
    from flexure.recipes import demo as recipe

    tell = None if as_json or not sys.stderr.isatty() else partial(typer.echo, err=True)
    summary = recipe.run(recipe.Config.small(seed=seed), out, progress=tell)
    if as_json:
        _print_json(summary.payload)
    else:
        typer.echo(str(summary))


@contextmanager
def _users_code() -> Iterator[None]:
    """What a model prints goes to stderr, and it cannot end the program."""
    with redirect_stdout(sys.stderr):
        try:
            yield
        except SystemExit as error:
            raise FlexureError(
                f"expected the model and the data to run, got SystemExit({error.code!r}) from "
                f"their code; remove it"
            ) from error


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        told = "interrupted; what is finished is kept, --resume continues it"
        raise _Unfinished(told) from None


def _begin(store: Path) -> None:
    """A new search starts with an empty store, and destroys nobody's work."""
    if any(store.glob("*.safetensors")):
        what = f"{store.parent} holds an unfinished search"
        raise FlexureError(f"{what}; add --resume to continue it, or choose another --out")
    _discard(store)


def _discard(store: Path) -> None:
    """Deletes what a search wrote into its store; anything else in there stays, and it with it."""
    ours = ("*.safetensors", "fingerprint.json", ".*.safetensors.*.tmp", ".fingerprint.json.*.tmp")
    for path in (path for pattern in ours for path in store.glob(pattern)):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # missing, or not empty
        store.rmdir()


def _load(address: str, device: str) -> LoadedModel:
    loaded = load_model(address)
    try:
        torch.ones(1).to(device).cpu()  # some devices take data and never give it back
        loaded.model.to(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise FlexureError(
            f"expected a device that works here, got {device!r} ({shorten(str(error), 120)}); "
            f"choose another --device"
        ) from error
    return loaded


def _example(
    loaded: LoadedModel, data: str | None, shape: str | None, size: int, seed: int
) -> Tensor:
    """A batch to find the sites with: given data, a given shape, or a random image."""
    generator = torch.Generator().manual_seed(seed)
    if data is not None:
        items = load_data(data)["train"]
        return torch.stack([loaded.preprocess(items[i]) for i in range(min(size, len(items)))])
    if shape is not None:
        try:
            sizes = [int(part) for part in shape.split(",")]
            if min(sizes) < 1:
                raise ValueError
            return torch.randn(size, *sizes, generator=generator)
        except (ValueError, TypeError, OverflowError, RuntimeError):  # the latter: out of memory
            raise FlexureError(
                f"expected --input-shape like 3,224,224 that fits in memory, got {shape!r}"
            ) from None
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    try:
        return torch.stack([loaded.preprocess(image)] * size)
    except Exception as error:  # whatever the user's own preprocessing raises
        raise FlexureError(f"preprocessing failed: {error}; {_ANOTHER_EXAMPLE}") from error


def _parts(
    loaded: LoadedModel,
    data: dict[str, LabelledData],
    sizes: dict[str, int | None],
    device: str,
    batch_size: int,
    seed: int,
) -> tuple[PreparedBatches, PreparedBatches, PreparedBatches]:
    """Train, validation and test batches, seeded and stratified, in the model's own terms."""
    given = {name: size for name, size in sizes.items() if size is not None}
    parts = split(data, seed=seed, sizes=given or None)
    prepare: Callable[[LabelledData], PreparedBatches] = partial(
        batches, preprocess=loaded.preprocess, batch_size=batch_size, device=device, cache=True
    )
    return prepare(parts.train), prepare(parts.val), prepare(parts.test)


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


def _print_json(payload: Any) -> None:
    typer.echo(json.dumps(to_json(payload), indent=2))


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    typer.echo(f"flexure: warning: {message}", err=True)


def _stop(message: str, code: int) -> None:
    typer.echo(f"flexure: {message}", err=True)
    sys.exit(code)
