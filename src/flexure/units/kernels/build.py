"""Compiles `ctu.c` into the user's cache, and finds what was compiled there before.

The name of a library is `ctu-KEY-DIGEST.so`: KEY says what it was made from and for (source,
flags, processor, platform), DIGEST is that of its content, so that a damaged file is recognised
before it is loaded. Nothing here knows what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from flexure.contracts import FlexureError

__all__ = ["build", "load"]

SOURCE = Path(__file__).with_name("ctu.c")
COMPILERS = ("cc", "gcc", "clang")
# No -ffast-math: inf and nan must stay what they are. Traps and errno are nobody's concern here.
FLAGS = (
    "-std=c11",
    "-O3",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
SHARED = ("-fPIC", "-shared", "-fvisibility=hidden")
# Tried in turn: not every compiler knows the first for every processor. Without either, vectors are
# so short on x86 that the pure path is the faster.
TUNINGS = ("-march=native", "-mcpu=native")
COMPILER_SECONDS = 120
DIGITS = 16


def build() -> Path:
    """Compiles the kernels with $CC, cc, gcc or clang, unless a good build exists.

    The folder is `$XDG_CACHE_HOME/flexure` or `~/.cache/flexure`. Several processes may build at
    once. This process uses the result from the next call on.

    Returns:
        The library.

    Raises:
        FlexureError: there is no compiler, it fails, or the folder cannot be written.
    """
    found = next(filter(_is_whole, _candidates()), None)
    if found is None:
        found = _compiled(_compiler())
        for old in set(_candidates()) - {found}:
            if not _is_whole(old):
                old.unlink(missing_ok=True)
    load.cache_clear()
    return found


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library built earlier for this source and machine, or None; looks once per process.

    A damaged library is ignored with a warning. Never compiles. None where FLEXURE_KERNELS=0.
    """
    if os.environ.get("FLEXURE_KERNELS") == "0":
        return None
    for path in _candidates():
        if _is_whole(path):
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                pass
        warnings.warn(
            f"{path} is damaged and is ignored; python -m flexure.units.kernels builds it anew",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _candidates() -> list[Path]:
    """The libraries whose names fit this source and machine."""
    try:
        return sorted(_folder().glob(f"ctu-{_key()}-*.so"))
    except (OSError, RuntimeError):  # no home, or no permission to look
        return []


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "flexure"


def _key() -> str:
    made_of = (SOURCE.read_bytes(), FLAGS, SHARED, TUNINGS)
    made_for = (sys.platform, platform.machine(), sys.maxsize, _processor())
    return _digest(repr((made_of, made_for)).encode())


def _processor() -> list[str]:
    """What Linux says about the first processor: its model and its instruction sets."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except (OSError, UnicodeDecodeError):
        return []
    names = ("vendor_id", "cpu family", "model", "flags", "CPU part", "Features")
    return [line for line in first.splitlines() if line.split(":")[0].strip() in names]


def _is_whole(path: Path) -> bool:
    try:
        return path.stem.rsplit("-", 1)[-1] == _digest(path.read_bytes())
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return [path]
    raise FlexureError(
        f"expected a C compiler, got none of {', '.join(COMPILERS)} on PATH; install one or set "
        f"CC, or do without: everything works in pure Python"
    )


def _compiled(compiler: list[str]) -> Path:
    """Compiles into a folder of its own, then moves the library into place in one step."""
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "ctu.so"
            _compile(compiler, made)
            ctypes.CDLL(str(made))
            final = folder / f"ctu-{_key()}-{_digest(made.read_bytes())}.so"
            os.replace(made, final)
    except (OSError, RuntimeError) as error:
        raise FlexureError(
            f"expected to build kernels with {shlex.join(compiler)}, got {error}; set CC or "
            f"XDG_CACHE_HOME, or do without: everything works in pure Python"
        ) from error
    return final


def _compile(compiler: list[str], target: Path) -> None:
    for tuning in TUNINGS:
        command = [*compiler, *FLAGS, tuning, *SHARED, str(SOURCE), "-o", str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMPILER_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"no answer in {COMPILER_SECONDS} seconds") from error
        if done.returncode == 0:
            return
    raise OSError(f"exit status {done.returncode}: {done.stderr.strip()[-500:]}")
