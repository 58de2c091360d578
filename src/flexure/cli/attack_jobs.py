"""What the jobs of `flexure attack` share: whom they are about, how they are run and written.

The jobs are in `attack_plain.py`, `attack_sweep.py` and `attack_corruptions.py`; the options are in
`attack.py`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import typer

from flexure.cli.chosen import Space, described, output
from flexure.cli.common import discard, print_json, resumable, users_code, working
from flexure.contracts import FlexureError, LoadedModel
from flexure.record import record, write_json

__all__ = ["Done", "Job", "Subject", "fraction", "perform", "warn_of"]

_STORE = ".flexure-attack"  # in the output folder, while an attack is unfinished


@dataclass(frozen=True)
class Subject:
    """Whom an attack is about, and where it goes: the options that all jobs share, as typed."""

    model: str
    data: str
    out: Path
    against: str | None
    steer: str | None
    adapter: Path | None
    after: Path | None
    split: str | None
    samples: int | None
    device: str
    batch_size: int
    seed: int
    resume: bool
    as_json: bool

    @property
    def progress(self) -> bool:
        """Whether to show a bar."""
        return not self.as_json and sys.stderr.isatty()


@dataclass(frozen=True)
class Done:
    """A finished job.

    Attributes:
        found: the result: printable, with `to_dict`.
        loaded: the model.
        config: what was chosen for the job, beyond the options.
        page: further arguments of the job's page.
        lines: what to tell besides the result.
    """

    found: Any
    loaded: LoadedModel
    config: Mapping[str, Any]
    page: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


class Job(Protocol):
    """Something that `flexure attack` does."""

    @property
    def verb(self) -> str:
        """What is done to the model, for the title of the page."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the library is told, for the record."""
        ...

    def run(self, subject: Subject, store: Path) -> Done:
        """Does it, continuing from what is in the store."""
        ...

    def page(self, path: Path, found: Any, **more: Any) -> Any:
        """Writes the page of the result."""
        ...


def perform(job: Job, subject: Subject) -> None:
    """Runs a job; writes its results and its page; tells them."""
    out = subject.out
    with (
        output(out, _STORE) as store,
        working(store, "attack", resume=subject.resume),
        users_code(),
        resumable(),
    ):
        done = job.run(subject, store)
    config = {
        "model": subject.model, "data": subject.data, **done.config, **job.settings,
        "preprocess": described(done.loaded), "batch_size": subject.batch_size,
        "device": subject.device,
    }  # fmt: skip
    payload = record(config=config, seed=subject.seed, numbers=done.found.to_dict())
    write_json(out / "results.json", payload)
    _write_page(job, done, out / "report.html", payload)
    discard(store)
    if subject.as_json:
        print_json(payload)
        return
    for line in (str(done.found), *done.lines):
        typer.echo(line)
    typer.echo(f"Report:  {out / 'report.html'}")
    typer.echo(f"Results: {out / 'results.json'}")


def warn_of(own: Space, loaded: LoadedModel) -> None:
    """Says so where radii are no differences of pixels."""
    if own.bounds is None:
        warnings.warn(
            f"{loaded.address}: no bounds of its inputs are known; radii are in units of these "
            f"inputs, {described(loaded)}",
            stacklevel=2,
        )


def fraction(option: str, text: str) -> float:
    """A number, or a quotient of two such as 1/255.

    Raises:
        FlexureError: something else.
    """
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise FlexureError(
            f"expected {option} like 1/255 or 0.25, got {text!r}; give a number"
        ) from None


def _write_page(job: Job, done: Done, path: Path, payload: dict[str, Any]) -> None:
    from flexure.report import run_table

    title = f"{payload['config']['model']} {job.verb} on {payload['config']['data']}"
    job.page(path, done.found, title=title, run=run_table(payload), **done.page)
