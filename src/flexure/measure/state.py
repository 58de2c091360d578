"""Where `flexure.measuring` was, for what still imports it from here."""

from flexure.measuring import (
    full_precision,
    one_at_a_time,
    twice_differentiable,
    unchanged_randomness,
    uncompiled,
)

__all__ = [
    "full_precision",
    "one_at_a_time",
    "twice_differentiable",
    "unchanged_randomness",
    "uncompiled",
]
