"""The names of attacks: each with the settings of its paper, in a norm.

How inputs are attacked is the attacks' business; how attacks are scored, `evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexure.attacks.pgd import PGD
from flexure.contracts import Attack

__all__ = ["ATTACKS"]

ATTACKS: Mapping[str, Callable[[str], tuple[Attack, ...]]] = {
    "pgd": lambda norm: (PGD(norm=norm, until_misclassified=True),),
}
"""Name -> the attacks of that name in a norm, in their order, with the settings of their paper."""
