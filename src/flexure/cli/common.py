"""What the verbs of the command line share: options, loading, stores, printing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import IO, Annotated, Any

import torch
import typer

from flexure.calling import call_model
from flexure.contracts import FlexureError, LabelledData, LoadedModel
from flexure.data import PreparedBatches, batches, split
from flexure.models import load_model
from flexure.record import check_writable, to_json

__all__ = [
    "LARGEST_SEED",
    "AsJson",
    "BatchSize",
    "Device",
    "Model",
    "Resume",
    "Seed",
    "Size",
    "Unfinished",
    "check_takes",
    "discard",
    "load",
    "prepared",
    "print_json",
    "resumable",
    "users_code",
    "working",
]

_LOCK = "lock"

# What runs write into the store in their output folder, and into folders in there.
_FOLDERS = ("*.adapter", "*.checkpoint")
_WORK = ("**/*.safetensors", "*.checkpoint/*")
_OURS = (
    "**/*.safetensors", "**/fingerprint.json", "**/.*.safetensors.*.tmp",
    "**/.fingerprint.json.*.tmp", "*.adapter/adapter_config.json", "*.adapter/.*adapter_*",
    "*.checkpoint/.state*.tmp",
)  # fmt: skip


LARGEST_SEED = 2**63  # some more follow it, and torch takes less than 2**64

Model = Annotated[
    str,
    typer.Argument(
        help="Model address: flexure:resnet20?weights=FILE, hf:NAME, timm:NAME, "
        "torchvision:NAME, robustbench:NAME, or FILE.py:factory.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int, typer.Option(min=1, max=1_000_000, help="Items in a forward pass.")]
Seed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Decides splits, probes and intervals.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, nothing else.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Number of items; default: a share.")]


class Unfinished(Exception):
    """Interrupted, and what was finished can be continued from."""


@contextmanager
def users_code() -> Iterator[None]:
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
def resumable() -> Iterator[None]:
    """An interrupt inside says that what is finished is kept.

    Raises:
        Unfinished: instead of the interrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        told = "interrupted; what is finished is kept, --resume continues it"
        raise Unfinished(told) from None


@contextmanager
def working(store: Path, what: str, *, resume: bool) -> Iterator[None]:
    """Begins or continues a `what` in the store, alone: no other run works there meanwhile.

    After an error a store in which nothing is finished is discarded.

    Raises:
        FlexureError: another run works there; without `resume`, it holds parts of an earlier one;
            or this is one of several processes of a launch.
    """
    _check_alone()
    lock = check_writable(store) / _LOCK
    with lock.open("a") as file:
        if not _locked(file):
            raise FlexureError(
                f"another run works in {store.parent}; wait for its end, or choose another --out"
            )
        try:
            if not resume:
                begin(store, what)
            yield
        except FlexureError:
            if not _has_work(store):
                discard(store)
            raise
        finally:
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                store.rmdir()


def _check_alone() -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise FlexureError(
            f"expected a command in one process, got one of a launch of {launched}; run it without "
            f"the launcher"
        )


def _has_work(store: Path) -> bool:
    return any(path for pattern in _WORK for path in store.glob(pattern))


def _locked(file: IO[str]) -> bool:
    """Whether this process has the file now; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return True
    return True


def begin(store: Path, what: str) -> None:
    """A new `what`, such as "search", starts with an empty store, and destroys nobody's work.

    Raises:
        FlexureError: the store holds parts of an earlier one.
    """
    if _has_work(store):
        raise FlexureError(
            f"{store.parent} holds an unfinished {what}; add --resume to continue it, or choose "
            f"another --out, or delete {store} to drop it"
        )
    discard(store)


def discard(store: Path) -> None:
    """Deletes what a run wrote into its store; anything else in there stays, and it with it."""
    folders = {store, *(path for pattern in _FOLDERS for path in store.glob(pattern))}
    for path in [path for pattern in _OURS for path in store.glob(pattern)]:
        path.unlink(missing_ok=True)
        folders.update(path.parents)
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        if folder.is_relative_to(store):
            with suppress(OSError):  # missing, or not empty
                folder.rmdir()


def load(address: str, device: str) -> LoadedModel:
    """The model behind an address, on a device that works.

    Raises:
        AddressError: no such model.
        FlexureError: no such device.
    """
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


def prepared(
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
    train = prepare(parts.train)
    check_takes(loaded, train)
    return train, prepare(parts.val), prepare(parts.test)


def check_takes(loaded: LoadedModel, given: PreparedBatches) -> None:
    """Runs the model on two items, as everything will that comes after.

    Raises:
        FlexureError: it does not take them.
    """
    shape = ""
    try:
        x, _ = next(iter(given))
        shape = f" {tuple(x.shape[1:])}"
        with torch.no_grad():
            call_model(loaded.model, x[:2].clone())  # models may overwrite their input
    except FlexureError:
        raise
    except Exception as error:
        told = shorten(" ".join(str(error).split()), 160, placeholder=" ...")
        raise FlexureError(
            f"expected a model that takes the data, got {type(error).__name__} from "
            f"{loaded.address} for inputs{shape} ({told}); choose data of its inputs, or a "
            f"FILE.py:factory that returns a model and its preprocessing"
        ) from error


def print_json(payload: Any) -> None:
    """Prints what a result file would hold."""
    typer.echo(json.dumps(to_json(payload), indent=2))
