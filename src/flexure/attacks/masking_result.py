"""What `masking_report` gives: its checks, the loss surface for a picture, and the verdict.

How they are made, and when a check is suspicious, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from flexure.attacks.masking_evidence import ALLOWED_VANISHED, exceeds
from flexure.columns import aligned
from flexure.record import to_json

__all__ = ["LossSurface", "MaskingCheck", "MaskingReport"]

_WORDS = {True: "suspicious", False: "in order", None: "skipped"}


@dataclass(frozen=True)
class MaskingCheck:
    """One thing that was looked at.

    Attributes:
        name: of the check.
        numbers: what was found, by name: numbers, or lists of them.
        expected: what a network with useful gradients shows.
        suspicious: whether it speaks for masked gradients; None: it was not, or could not be made.
        decisive: whether it is enough alone for the verdict "masked" where it is suspicious.
        sentence: what was found, or why not, with its numbers.
    """

    name: str
    numbers: Mapping[str, Any]
    expected: str
    suspicious: bool | None
    decisive: bool
    sentence: str


@dataclass(frozen=True)
class LossSurface:
    """The loss around S samples, on a grid and along a ray: data for a picture.

    The loss is −m, m the margin (`calling.margin`): the log-odds of a wrong class. At zero the
    label has half of the probability: of two classes that is the decision boundary, of more the
    prediction is right below it and may be right above it, too. It does not saturate, as the
    cross-entropy does. The grid's points are x + eps (a_j u + a_k v), u the direction of steepest
    ascent in the norm (the gradient's sign in linf, the unit gradient in l2; where the gradient
    vanishes, a random one) and v a random direction orthogonal to u in l2, random signs in linf;
    clamped to the
    bounds of the inputs. Each axis ends at a distance of eps; corners are farther.

    Attributes:
        offsets: (G,) the a's, from −1 to 1, in units of eps.
        losses: (S, G, G): row j, column k is at a_j u + a_k v.
        ray: (R,) offsets along u, from 0 to 1.
        ray_losses: (S, R), the loss there.
        ray_predicted: (S, R), what the gradient at x predicts of it; nan where there is none.
        margins: (S,) m at x.
        samples: (S,) int64, places among the inputs that were given.
        labels: (S,) int64.
    """

    offsets: Tensor
    losses: Tensor
    ray: Tensor
    ray_losses: Tensor
    ray_predicted: Tensor
    margins: Tensor
    samples: Tensor
    labels: Tensor


@dataclass(frozen=True)
class MaskingReport:
    """Whether a network's gradients can be believed, and why.

    Attributes:
        verdict: "masked": robust accuracies of gradient attacks say nothing of this network; "not
            masked": no check found a sign of it; "undecided": signs that are no proof, or checks
            that could not be made.
        reasons: sentences; why the verdict is this one.
        checks: everything that was looked at, in the order of the table.
        surface: data for a picture; None where the network has no right sample.
        norm: of the radius.
        eps: the radius.
        seed: of everything random.
        samples: (N,) int64, places of the samples that were used among those given.
        robust: (N,) bool, whether a sample withstood every attack of all checks at this radius.
        clean_accuracy: share of the N samples that are right without an attack.
        gradient_accuracy: share that withstood the gradient attacks; None where there is no
            gradient.
        settings: what else decides the numbers, by name.
    """

    verdict: str
    reasons: tuple[str, ...]
    checks: tuple[MaskingCheck, ...]
    surface: LossSurface | None
    norm: str
    eps: float
    seed: int
    samples: Tensor
    robust: Tensor
    clean_accuracy: float
    gradient_accuracy: float | None
    settings: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of the samples that withstood every attack: the robust accuracy to report."""
        return float(self.robust.double().mean())

    @property
    def flat_entropy(self) -> bool:
        """Whether gradients of the cross-entropy vanish where those of the margin do not."""
        check = next((check for check in self.checks if check.name == "gradient norms"), None)
        if check is None or not check.suspicious or not check.numbers:
            return False
        broken = max(each["not finite"] for each in check.numbers.values())
        odds, right = check.numbers["margin"], round(self.clean_accuracy * len(self.samples))
        worst = max(broken, odds["zero"] + odds["not finite"])
        return not exceeds(worst, right, ALLOWED_VANISHED)

    def __getitem__(self, name: str) -> MaskingCheck:
        """The check of this name; KeyError where there is none."""
        return {check.name: check for check in self.checks}[name]

    def rows(self) -> list[dict[str, str]]:
        """The table: one row a check."""
        return [
            {"check": check.name, "": _WORDS[check.suspicious], "found": check.sentence}
            for check in self.checks
        ]

    def __str__(self) -> str:
        head = (
            f"{self.norm}, eps {self.eps:.4g}, {len(self.samples)} samples: clean accuracy "
            f"{self.clean_accuracy:.1%}, under all attacks {self.accuracy:.1%}"
        )
        verdict = f"verdict: {self.verdict}"
        return "\n".join([head, *aligned(self.rows(), ruled=True), verdict, *_listed(self.reasons)])

    def to_dict(self) -> dict[str, Any]:
        """All fields and `accuracy`, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        told = values | {"accuracy": self.accuracy}
        return {name: to_json(value) for name, value in told.items()}


def _listed(reasons: Sequence[str]) -> list[str]:
    return [f"- {reason}" for reason in reasons]
