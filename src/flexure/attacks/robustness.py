"""What an evaluation under attack found: for every sample, and for every attack.

How it is found is `evaluate`'s and `harness`'s business; means over other data are the caller's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from flexure.columns import aligned
from flexure.per_sample import PerSample

__all__ = ["AttackResult", "Robustness", "distinct"]


@dataclass(frozen=True)
class AttackResult:
    """What one of several attacks found on B samples.

    Attributes:
        name: of the attack, as in `attacks.catalogue.ATTACKS` where it comes from there.
        norm: of the ball.
        tried: (B,) bool, the samples that it was run on.
        beaten: (B,) bool, those of them that it found a misclassified version of.
        robust: (B,) bool, the samples that are right without an attack and under this one and all
            before it.
        accuracy_alone: the share of samples that are right under this attack alone; None where it
            was not run on all that are right without an attack.
        seconds: of wall-clock time, summed over processes.
        warnings: what the attack's library warned of, batch by batch: each once, of those that
            differ in their numbers alone the one of the largest.
    """

    name: str
    norm: str
    tried: Tensor
    beaten: Tensor
    robust: Tensor
    accuracy_alone: float | None
    seconds: float
    warnings: tuple[str, ...]

    @property
    def attacked(self) -> int:
        """The number of samples that it was run on."""
        return int(self.tried.sum())

    @property
    def found(self) -> int:
        """The number of samples that it found a misclassified version of."""
        return int(self.beaten.sum())

    @property
    def accuracy(self) -> float:
        """The share of samples that are right under this attack and all before it."""
        return float(self.robust.double().mean())

    @property
    def seconds_per_sample(self) -> float:
        """Seconds for each attacked sample; nan where there was none."""
        return self.seconds / self.attacked if self.attacked else math.nan

    @property
    def seconds_per_survivor(self) -> float:
        """Seconds for each sample that withstood the attack: nan where none was attacked or did."""
        left = self.attacked - self.found
        return self.seconds / left if left else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Its numbers, without those of single samples; JSON values but for nan."""
        return {
            "name": self.name,
            "norm": self.norm,
            "tried": self.attacked,
            "beaten": self.found,
            "accuracy": self.accuracy,
            "accuracy_alone": self.accuracy_alone,
            "seconds": self.seconds,
            "seconds_per_sample": self.seconds_per_sample,
            "seconds_per_survivor": self.seconds_per_survivor,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Robustness(PerSample):
    """Which of B samples a model gets right, and still gets right under A attacks.

    Attributes:
        clean: (B,) bool, whether the prediction at x is the label.
        robust: (B,) bool, whether it also is at every adversarial version that was found: the
            worst case over all attacks.
        x_adv: (B, *shape), the misclassified version that was found first, or without one the last
            that was tried; x itself of samples that are not attacked: those misclassified without.
        distance: (B,) float64, ‖x_adv − x‖ in the norm, at most eps (1 + 1e-4).
        tried_by: (B, A) bool, which attacks were run on a sample.
        beaten_by: (B, A) bool, which of them found a misclassified version.
        seconds_by: (B, A) float64, a sample's share of the seconds of its batch.
        norm: of the attacks.
        eps: the radius.
        names: (A,) of the attacks, in their order.
        warnings: (A,) what each attack's library warned of.
    """

    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    distance: Tensor
    tried_by: Tensor
    beaten_by: Tensor
    seconds_by: Tensor
    norm: str
    eps: float
    names: tuple[str, ...]
    warnings: tuple[tuple[str, ...], ...]

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The result over the samples of all parts, in their order, with all their warnings.

        Raises:
            FlexureError: there are no parts, or their settings differ.
        """
        told = [each.warnings for each in parts]
        warnings = tuple(distinct(chain(*each)) for each in zip(*told, strict=False))
        return super().joined([replace(part, warnings=warnings) for part in parts])

    @property
    def clean_accuracy(self) -> float:
        """The share of samples that are right without an attack."""
        return float(self.clean.double().mean())

    @property
    def accuracy(self) -> float:
        """The share of samples that are right under attack: the robust accuracy."""
        return float(self.robust.double().mean())

    @property
    def robust_by(self) -> Tensor:
        """(B, A) bool, whether a sample is right without an attack and under all up to this one."""
        return self.clean[:, None] & (self.beaten_by.cumsum(1) == 0)

    @property
    def attacks(self) -> tuple[AttackResult, ...]:
        """What each attack found, in their order."""
        columns = zip(self.names, self.warnings, strict=True)
        return tuple(self._of(place, *column) for place, column in enumerate(columns))

    def _of(self, place: int, name: str, warnings: tuple[str, ...]) -> AttackResult:
        tried, beaten = self.tried_by[:, place], self.beaten_by[:, place]
        alone = float((self.clean & ~beaten).double().mean())
        return AttackResult(
            name=name,
            norm=self.norm,
            tried=tried,
            beaten=beaten,
            robust=self.robust_by[:, place],
            accuracy_alone=alone if torch.equal(tried, self.clean) else None,
            seconds=float(self.seconds_by[:, place].sum()),
            warnings=warnings,
        )

    def to_dict(self) -> dict[str, Any]:
        """The accuracies and each attack's numbers, without those of single samples."""
        return {
            "norm": self.norm,
            "eps": self.eps,
            "samples": len(self),
            "clean_accuracy": self.clean_accuracy,
            "accuracy": self.accuracy,
            "attacks": [attack.to_dict() for attack in self.attacks],
        }

    def __str__(self) -> str:
        """The accuracies, a table with a row for each attack, and what they warned of."""
        head = (
            f"clean accuracy {self.clean_accuracy:.1%}, robust accuracy {self.accuracy:.1%} "
            f"({self.norm}, eps {self.eps:.4g}, {len(self)} samples)"
        )
        told = [f"warning of {one.name}: {text}" for one in self.attacks for text in one.warnings]
        return "\n".join([head, *aligned([_row(attack) for attack in self.attacks]), *told])


def distinct(warnings: Iterable[str]) -> tuple[str, ...]:
    """Each warning once; of those that differ in numbers alone, the one of the largest numbers."""
    found: dict[str, str] = {}
    for text in warnings:
        kind = re.sub(r"\d+", "#", text)
        found[kind] = max(found.get(kind, text), text, key=_numbers)
    return tuple(found.values())


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _row(attack: AttackResult) -> dict[str, str]:
    alone = attack.accuracy_alone
    return {
        "attack": attack.name,
        "tried": str(attack.attacked),
        "beaten": str(attack.found),
        "accuracy after": f"{attack.accuracy:.1%}",
        "alone": "" if alone is None else f"{alone:.1%}",
        "s per attacked sample": _seconds(attack.seconds_per_sample),
        "s per surviving sample": _seconds(attack.seconds_per_survivor),
    }


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
