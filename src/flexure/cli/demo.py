"""`flexure demo`: both of the first experiments, small."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flexure.cli.common import LARGEST_SEED, AsJson, print_json

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("flexure-demo"),
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            help="Of the spiral, and the first of five for the digits.",
        ),
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """Transfer a small network between digits, and bend the boundary of a spiral."""
    from flexure.recipes import demo as recipe

    tell = None if as_json or not sys.stderr.isatty() else partial(typer.echo, err=True)
    summary = recipe.run(recipe.Config.small(seed=seed), out, progress=tell)
    if as_json:
        print_json(summary.payload)
    else:
        typer.echo(str(summary))
