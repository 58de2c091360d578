"""Checks of a network for masking by attacks: more effort, other attacks, other radii.

Checks without attacks are `masking_checks`'; thresholds are `masking_evidence`'s.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from flexure.attacks.draws import normal
from flexure.attacks.masking_evidence import (
    ALLOWED_BLIND,
    ALLOWED_EFFORT,
    ALLOWED_STUCK,
    exceeds,
    fewest_that_exceed,
    more_often,
)
from flexure.attacks.masking_result import MaskingCheck
from flexure.attacks.masking_subject import Subject
from flexure.attacks.norms import norm_named
from flexure.attacks.pgd import PGD
from flexure.contracts import Attack, FlexureError

__all__ = ["check_back", "check_effort", "check_growth", "check_square", "check_transfer"]

_RADII = 4
"""Radii above the one asked for, in equal ratios up to the largest."""

_BACK_SHARE = 0.1
"""Examples made on the network should take at least this share from the source of what the source's
own do, beyond what noise does; judged where that is `_BACK_SAMPLES` samples or more."""

_BACK_SAMPLES = 10


def check_effort(
    subject: Subject, more: Attack, name: str, what: str, withstood: Tensor, key: int
) -> tuple[MaskingCheck, Tensor]:
    """Whether a gradient attack of more effort finds much more.

    It should not, once an attack has converged (Carlini et al. 2019).

    Args:
        subject: with the N samples that are right.
        more: the attack of more effort.
        name: of the check.
        what: the effort, in words.
        withstood: (N,) bool, what withstands less.
        key: of the draws.

    Returns:
        The check, and (N,) bool: which samples withstand both.
    """
    left = withstood.nonzero().flatten()
    after = withstood.clone()
    after[left] = subject.of(left).withstands(more, key)
    found, total = int(withstood.sum()) - int(after.sum()), len(withstood)
    check = MaskingCheck(
        name=name,
        numbers={"before": int(withstood.sum()), "after": int(after.sum()), "of": total},
        expected=f"at most {ALLOWED_EFFORT:.0%} of the samples more",
        suspicious=exceeds(found, total, ALLOWED_EFFORT),
        decisive=False,
        sentence=f"{what} leave {int(after.sum())} of {total} samples robust, before "
        f"{int(withstood.sum())}; gained so, {_from(total, ALLOWED_EFFORT)}",
    )
    return check, after


def check_square(subject: Subject, queries: int, withstood: Tensor) -> tuple[MaskingCheck, Tensor]:
    """Whether Square, which uses no gradient, finds what gradient attacks did not.

    Andriushchenko et al. 2020; part of AutoAttack for this very reason (Croce and Hein 2020); that
    gradient attacks are at least as good is a condition of Athalye et al. 2018, section 3.1.
    """
    name, left = "square", withstood.nonzero().flatten()
    after = withstood.clone()
    try:
        from flexure.attacks.library import Square

        after[left] = subject.of(left).withstands(Square(norm=subject.norm, queries=queries), 5)
    except FlexureError as error:
        told = str(error)
        return MaskingCheck(name, {}, _BLIND, None, True, told), withstood
    what = f"Square with {queries} queries misclassifies"
    return _blind(name, what, withstood, after), after


def check_transfer(
    subject: Subject, source: Subject, attack: PGD, withstood: Tensor
) -> tuple[MaskingCheck, Tensor]:
    """Whether examples made on another network succeed where gradient attacks failed.

    Attacks on the network itself know more (Athalye et al. 2018, section 3.1; Carlini et al. 2019).

    Args:
        subject: with the N samples that are right.
        source: the other network, with the same samples.
        attack: that the examples are made with.
        withstood: (N,) bool, what was right under gradient attacks.
    """
    name = "transfer"
    if source.gradient("margin") is None:
        told = "the source has no gradient"
        return MaskingCheck(name, {}, _BLIND, None, True, told), withstood
    after = withstood & subject.right(source.crafted(attack, 6))
    return _blind(name, "examples made on the source fool", withstood, after), after


def check_back(subject: Subject, source: Subject, attack: PGD) -> MaskingCheck:
    """Whether examples made on the network fool the other one more than noise does.

    Adversarial examples transfer (Szegedy et al. 2014); steps along gradients that say nothing are
    noise.
    """
    name, expected = "transfer back", f"{_BACK_SHARE:.0%} of what the source's own examples do"
    if subject.gradient("margin") is None or source.gradient("margin") is None:
        told = "one of both networks has no gradient"
        return MaskingCheck(name, {}, expected, None, False, told)
    right = source.right()
    drawn = normal(source.x.shape, source.generator(9)).to(source.x)
    noise = norm_named(source.norm).direction(drawn)
    low, high = source.limits
    tried = {
        "own": source.crafted(attack, 7),
        "back": subject.crafted(attack, 8),
        "noise": (source.x + source.eps * noise).clamp(low, high),
    }
    fooled = {key: int((right & ~source.right(x)).sum()) for key, x in tried.items()}
    gain = fooled["own"] - fooled["noise"]
    judged = gain >= _BACK_SAMPLES
    poor = fooled["back"] - fooled["noise"] <= _BACK_SHARE * gain
    told = (
        f"examples made here fool the source on {fooled['back']} of {int(right.sum())} samples, "
        f"its own on {fooled['own']}, noise on {fooled['noise']}"
    )
    numbers = {**fooled, "of": int(right.sum())}
    return MaskingCheck(name, numbers, expected, poor if judged else None, False, told)


def check_growth(subject: Subject, attack: PGD, withstood: Tensor) -> MaskingCheck:
    """Whether accuracy falls as the radius grows, and to where it must.

    At the last radius every sample's ball contains one common point: the middle of the bounds (grey
    images; the samples' mean where bounds are infinite). Whatever class the network gives that
    point, all samples of other classes have an adversarial example there. Those among them that
    the attack leaves are proven failures of the attack (Athalye et al. 2018, section 3.1:
    "unbounded attacks reach 100 % success", "increasing distortion bound increases success").

    Args:
        subject: with the N samples that are right.
        attack: of which `withstood` is the result at the first radius.
        withstood: (N,) bool.
    """
    centre, largest = _common_point(subject)
    ratio = max(largest / subject.eps, 1.0)
    powers = [] if ratio == 1.0 else [k / _RADII for k in range(1, _RADII + 1)]
    radii = [subject.eps * ratio**power for power in powers]
    results = [withstood, *(subject.withstands(attack, 10, eps) for eps in radii)]
    rising = 0
    for one, other in pairwise(results):
        rising += more_often(int((~one & other).sum()), int((one & ~other).sum()))
    elsewhere = subject.logits(centre).argmax(1) != subject.y
    stuck, total = int((results[-1] & elsewhere).sum()), int(elsewhere.sum())
    shares = [float(result.double().mean()) for result in results]
    told = f"accuracy of right samples {', '.join(f'{s:.0%}' for s in shares)} at eps " + ", ".join(
        f"{eps:.3g}" for eps in [subject.eps, *radii]
    )
    told += f"; {stuck} of {total} samples that cannot be robust at the last are left"
    return MaskingCheck(
        name="growing eps",
        numbers={
            "eps": [subject.eps, *radii],
            "accuracy": shares,
            "stuck": stuck,
            "not robust": total,
            "rises": rising,
        },
        expected=f"never more accuracy, and at most {ALLOWED_STUCK:.0%} left at the last",
        suspicious=bool(rising) or exceeds(stuck, max(total, 1), ALLOWED_STUCK),
        decisive=True,
        sentence=told,
    )


_BLIND = f"at most {ALLOWED_BLIND:.0%} of the samples beyond those that gradient attacks find"


def _blind(name: str, what: str, withstood: Tensor, after: Tensor) -> MaskingCheck:
    found, left, total = int((withstood & ~after).sum()), int(withstood.sum()), len(withstood)
    return MaskingCheck(
        name=name,
        numbers={"found": found, "left": left, "of": total},
        expected=_BLIND,
        suspicious=exceeds(found, total, ALLOWED_BLIND),
        decisive=True,
        sentence=f"{what} {found} of the {left} samples that withstood gradient attacks, of "
        f"{total}; found so, {_from(total, ALLOWED_BLIND)}",
    )


def _from(total: int, share: float) -> str:
    return f"{fewest_that_exceed(total, share)} or more of {total} are evidence"


def _common_point(subject: Subject) -> tuple[Tensor, float]:
    """(N, *shape), the same point for each sample, and the largest distance to it."""
    low, high = subject.limits
    if low > -torch.inf and high < torch.inf:
        centre = torch.full_like(subject.x, (low + high) / 2)
    else:
        centre = subject.x.mean(0, keepdim=True).clamp(low, high).expand_as(subject.x)
    distance = norm_named(subject.norm).size(subject.x.double() - centre.double())
    return centre, float(distance.max())
