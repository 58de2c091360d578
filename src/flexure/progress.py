"""Telling a person how far long work has come: a callback, a bar on stderr, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Progress", "ProgressReporter"]

Progress: TypeAlias = "bool | Callable[[str, int, int], None] | None"
"""True: a bar on stderr. A callable: is told (stage, done, total). Else: silence."""


class ProgressReporter:
    """Hands progress on."""

    def __init__(self, progress: Progress) -> None:
        self._callback = progress if callable(progress) else None
        self._show = progress is True
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are finished."""
        if self._callback is not None:
            self._callback(stage, done, total)
        if not self._show:
            return
        if self._bar is None or self._bar.desc != stage:
            from tqdm import tqdm

            self.close()
            self._bar = tqdm(total=total, file=sys.stderr)
            self._bar.desc = stage
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
