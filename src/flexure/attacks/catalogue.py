"""The names of attacks: each with the settings of its paper, in a norm.

How inputs are attacked is the attacks' business; how attacks are scored, `evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexure.attacks.library import APGD, FAB, Square
from flexure.attacks.library_model import autoattack_library
from flexure.attacks.pgd import PGD
from flexure.contracts import Attack

__all__ = ["ATTACKS"]


def _by_library(*makes: Callable[[str], Attack]) -> Callable[[str], tuple[Attack, ...]]:
    """Attacks of the AutoAttack library, once it is there."""

    def row(norm: str) -> tuple[Attack, ...]:
        autoattack_library()
        return tuple(make(norm) for make in makes)

    return row


ATTACKS: Mapping[str, Callable[[str], tuple[Attack, ...]]] = {
    "pgd": lambda norm: (PGD(norm=norm, steps=20, until_misclassified=True),),
    "apgd-ce": _by_library(lambda norm: APGD(norm, "ce", steps=20)),
    "apgd-dlr": _by_library(lambda norm: APGD(norm, "dlr")),
    "apgd-t": _by_library(lambda norm: APGD(norm, "targeted")),
    "fab": _by_library(lambda norm: FAB(norm, targeted=False)),
    "fab-t": _by_library(lambda norm: FAB(norm, targeted=True)),
    "square": _by_library(lambda norm: Square(norm)),
    "autoattack": _by_library(
        lambda norm: APGD(norm, "ce"),
        lambda norm: APGD(norm, "targeted"),
        lambda norm: FAB(norm, targeted=True),
        lambda norm: Square(norm),
    ),
}
"""Name -> the attacks of that name in a norm, in their order.

"pgd" and "apgd-ce" have 20 steps. The others have the settings of the standard version of
AutoAttack's library, as "autoattack" has: APGD on the cross-entropy, APGD targeted and FAB targeted
(100 steps, one start, each of 9 targets), and Square (5000 queries).
"""
