"""What attacks of other libraries warn of, as text: Python's warnings, and records of logs.

What is made of it is the results' business.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["warned"]

_OF_CODE = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""What warns programmers of their code, and says nothing of results."""


@contextmanager
def warned(into: list[str]) -> Iterator[None]:
    """Appends what is warned of inside, rather than printing it.

    Log records of level WARNING and above are appended where they reach the root logger, whose
    other handlers see them as well.

    Args:
        into: is appended to, also where an error ends what is inside.
    """
    handler, root = _Appending(into), logging.getLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for category in _OF_CODE:
            warnings.simplefilter("ignore", category)
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            into.extend(" ".join(str(warning.message).split()) for warning in caught)


class _Appending(logging.Handler):
    """Appends what records say to a list."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._into = into

    def emit(self, record: logging.LogRecord) -> None:
        """Appends one."""
        self._into.append(" ".join(record.getMessage().split()))
