"""How model and data addresses are read: `prefix:rest`, `name?option=value`, optional libraries.

Knows no prefix: the catalogues of `flexure.data` and `flexure.models` are passed in.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar
from urllib.parse import unquote

from flexure.contracts import AddressError, MissingExtraError

__all__ = ["existing_path", "first_line", "import_extra", "look_up", "split_options"]

_Loader = TypeVar("_Loader")


def look_up(address: str, catalogue: Mapping[str, _Loader], *, kind: str) -> tuple[_Loader, str]:
    """The loader behind an address's prefix, and the text after the colon.

    Args:
        address: `prefix:rest`.
        catalogue: prefix -> loader.
        kind: `"model"` or `"data"`, for the message.

    Raises:
        AddressError: the prefix is unknown, or nothing follows it.
    """
    prefix, _, rest = address.partition(":")
    if prefix not in catalogue or not rest:
        known = ", ".join(f"{name}:" for name in catalogue)
        raise AddressError(
            f"expected a {kind} address that starts with one of {known}; got {address!r}; "
            f"write it as prefix:name"
        )
    return catalogue[prefix], rest


def split_options(rest: str, *, known: Iterable[str]) -> tuple[str, dict[str, str]]:
    """`name?a=1&b=2` as its name and its options, percent-encoding undone.

    A plus sign stays a plus sign, since it is common in file names.

    Raises:
        AddressError: an option is not `key=value`, is unknown, or is given twice.
    """
    name, _, query = rest.partition("?")
    known = tuple(known)
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not value or key not in known or key in options:
            raise AddressError(
                f"expected options {', '.join(f'{k}=...' for k in known)}, each at most once, "
                f"got {part!r} in {rest!r}; mend or remove it (inside a value, & is written %26)"
            )
        options[key] = unquote(value)
    return name, options


def existing_path(text: str, *, folder: bool) -> Path:
    """The file or folder that `text` names, with `~` expanded.

    Raises:
        AddressError: nothing is there, or it is of the other kind.
    """
    path = Path(text).expanduser()
    if not (path.is_dir() if folder else path.is_file()):
        found = "nothing is there" if not path.exists() else "something else is there"
        raise AddressError(
            f"expected a {'folder' if folder else 'file'} at {path}, got: {found}; check the path"
        )
    return path


def import_extra(module: str, *, install: str) -> ModuleType:
    """Imports an optional library.

    Args:
        module: dotted name.
        install: the command that installs it, for the message.

    Raises:
        MissingExtraError: it is not installed, or does not load (a torchvision built for another
            torch raises a `RuntimeError` on import).
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingExtraError(
            f"expected the library {module!r} to be installed, got: {first_line(error)}; "
            f"run: {install}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, shortened to its first line that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
