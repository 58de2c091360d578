"""Running the command line in tests: in this process, or in one that is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexure.cli import main


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flexure ARGS`, in this process."""
    before, code = sys.argv, 0
    sys.argv = ["flexure", *args]
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, err


def interrupted(*args: str, store: Path, parts: int) -> tuple[str, dict[Path, int]]:
    """`flexure ARGS` until `parts` parts are in its store, then Ctrl-C.

    Returns:
        What it wrote to stderr, and the parts with the times at which they were written.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "flexure", *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Where tests run in the background, SIGINT may be ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and len(list(store.glob("*.safetensors"))) < parts:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    kept = written(store)
    assert len(kept) >= parts
    return err, kept


def written(store: Path) -> dict[Path, int]:
    """The parts in a store, with the times at which they were written."""
    return {path: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}
