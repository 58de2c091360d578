"""The command line: one verb a job, the library's words. Nothing is computed here."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from flexure import __version__
from flexure.cli import attack, demo, measure, sites, steer, train, tune
from flexure.cli.common import Unfinished
from flexure.contracts import FlexureError

__all__ = ["app", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure, steer and train the curvature of neural networks in input space.",
)
app.command()(sites.sites)
app.command()(steer.steer)
app.command()(tune.tune)
app.command()(train.train)
app.command()(measure.measure)
app.command()(attack.attack)
app.command()(demo.demo)


def main() -> None:
    """Runs the command line.

    Exit codes: 0 done, 1 nothing could be finished (one line on stderr), 2 the user's mistake
    (likewise), 130 interrupted.
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
    except (Unfinished, KeyboardInterrupt, typer.Abort) as stop:
        _stop(str(stop) or "interrupted", _INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # what the parser of the command line raises
            _stop(error.format_message(), 2)
        raise


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


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    typer.echo(f"flexure: warning: {message}", err=True)


def _stop(message: str, code: int) -> None:
    typer.echo(f"flexure: {message}", err=True)
    sys.exit(code)
