"""Whether a network's gradients can be believed: `masking_report` and its verdict.

The checks are `masking_checks`' and `masking_attacks`'; when they are suspicious is decided by
`masking_evidence`; attacks themselves, and accuracies, are those of `robust_accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flexure.attacks.checks import check_seed
from flexure.attacks.evaluate import robust_accuracy
from flexure.attacks.masking_attacks import (
    check_back,
    check_effort,
    check_growth,
    check_square,
    check_transfer,
)
from flexure.attacks.masking_checks import (
    check_gradients,
    check_randomness,
    check_slopes,
    check_surface,
    reseed,
)
from flexure.attacks.masking_evidence import ALLOWED_BLIND, FEWEST_SAMPLES, fewest_that_exceed
from flexure.attacks.masking_result import LossSurface, MaskingCheck, MaskingReport
from flexure.attacks.masking_subject import Subject
from flexure.attacks.masking_targets import TargetedPGD
from flexure.attacks.norms import check_eps
from flexure.attacks.pgd import PGD
from flexure.contracts import FlexureError
from flexure.measuring import measuring
from flexure.processes import current_processes
from flexure.progress import Progress, ProgressReporter

__all__ = ["LossSurface", "MaskingCheck", "MaskingReport", "masking_report"]


def masking_report(
    bounded: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "linf",
    eps: float,
    seed: int,
    source: nn.Module | None = None,
    batch_size: int | None = None,
    samples: int = 64,
    steps: int = 20,
    restarts: int = 4,
    longer: int = 4,
    targets: int = 5,
    queries: int = 1000,
    pictures: int = 4,
    points: int = 21,
    progress: Progress = None,
) -> MaskingReport:
    """Looks for masked gradients: robustness that is only an attack's failure.

    The checks are those of Athalye, Carlini and Wagner 2018 ("Obfuscated gradients give a false
    sense of security"), Carlini et al. 2019 ("On evaluating adversarial robustness") and Croce and
    Hein 2020 ("Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks"); each is named where it is made. The verdict is "masked" if one that is
    decisive alone is suspicious; "undecided" if another one is, if fewer than 16 samples are right,
    if Square could not run, or if rounding hides whether gradients are true; else "not masked".
    Where a share rests on few samples, an exact binomial test decides.

    The model is left as it was, as are the global random generators.

    Args:
        bounded: gives logits; its attribute `bounds` is what inputs stay within (`Bounded`).
        x: (B, *shape), floating point, within the bounds.
        y: (B,) integer labels.
        norm: "linf" or "l2".
        eps: the radius, above 0: the one that robustness is claimed at.
        seed: decides everything random.
        source: another network of the same inputs and classes, for transfer: the unsteered one,
            say, a copy (`copy.deepcopy`) made before steering. None: no transfer.
        batch_size: samples at a time; None: all.
        samples: at most so many of the B are used, drawn at random.
        steps: of projected gradient ascent.
        restarts: further ones, of the attack with several of them.
        longer: how many times as many steps the attack with more steps has.
        targets: wrong classes that are tried one by one, the most likely ones.
        queries: of Square, a sample.
        pictures: samples whose loss surface is computed.
        points: of that surface, along each axis.
        progress: True for a bar on stderr, or a callable (stage, done, total): checks.

    Raises:
        FlexureError: what `robust_accuracy` refuses, a radius of 0, settings below 1, or a source
            that shares modules with the network.

    Example:
        >>> import torch
        >>> from flexure import Bounded, masking_report
        >>> model = Bounded(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
        >>> x = torch.rand(32, 1, 2, 2)
        >>> report = masking_report(model, x, model(x).argmax(1), eps=0.01, seed=0, queries=50)
        >>> report.verdict
        'not masked'
    """
    plan = _Plan(norm, steps, restarts, longer, targets, queries, pictures, points)
    if not check_eps(eps) or type(samples) is not int or samples < 1:
        raise FlexureError(
            f"expected eps above 0 and at least one of samples, got {eps!r} and {samples!r}; give "
            f"the radius that robustness is claimed at"
        )
    check_seed(seed)
    _check_source(bounded, source)
    with ExitStack() as stack:
        for model in (bounded, source):
            if model is not None:
                stack.enter_context(measuring(model))
        reseed(seed)
        clean = robust_accuracy(
            bounded, x, y, attack="pgd", norm=norm, eps=0, seed=seed, batch_size=batch_size
        ).clean
        chosen = _chosen(len(x), samples, seed)
        size = len(x) if batch_size is None else batch_size
        x, y = x.detach()[chosen], y.detach().to(x.device).long()[chosen]
        subject = Subject(bounded, x, y, norm, float(eps), seed, size)
        other = None if source is None else Subject(source, x, y, norm, float(eps), seed, size)
        reporter = ProgressReporter(progress if current_processes().is_first else None)
        stack.callback(reporter.close)
        told = _Told(reporter, 9 if source is None else 11)
        return _report(subject, other, plan, chosen, clean[chosen], told)


@dataclass(frozen=True)
class _Plan:
    """The settings of the checks."""

    norm: str
    steps: int
    restarts: int
    longer: int
    targets: int
    queries: int
    pictures: int
    points: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "norm" and (type(value) is not int or value < 1):
                raise FlexureError(f"expected {name} of at least 1, an integer, got {value!r}")

    def attack(self, restarts: int = 1, longer: int = 1) -> PGD:
        """Projected gradient ascent that leaves a sample as soon as it is misclassified."""
        steps = self.steps * longer
        return PGD(self.norm, steps=steps, restarts=restarts, until_misclassified=True)


class _Told(list[MaskingCheck]):
    """Checks that are made; each is told to who waits for them."""

    def __init__(self, reporter: ProgressReporter, total: int) -> None:
        super().__init__()
        self._reporter, self._total = reporter, total
        reporter("masking", 0, total)

    def append(self, check: MaskingCheck) -> None:
        """Adds one."""
        super().append(check)
        self._reporter("masking", min(len(self), self._total), self._total)


def _check_source(bounded: nn.Module, source: nn.Module | None) -> None:
    """Refuses a source that changes with the network.

    Equal parameters may be shared: a steered network has those of the unsteered one. Modules are
    not: steering a network steers whatever else holds the same module.
    """
    if source is None:
        return
    shared = {id(module) for module in bounded.modules()} & {id(m) for m in source.modules()}
    if shared:
        raise FlexureError(
            f"expected a source that is another network, got one that shares {len(shared)} modules "
            f"with it, so that it is steered, too; give copy.deepcopy of the unsteered network, "
            f"made before steering"
        )


def _chosen(count: int, samples: int, seed: int) -> Tensor:
    """At most so many places, in their order, drawn at random."""
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))
    return drawn[:samples].sort().values


def _report(
    subject: Subject,
    source: Subject | None,
    plan: _Plan,
    places: Tensor,
    clean: Tensor,
    checks: _Told,
) -> MaskingReport:
    checks.append(check_randomness(subject))
    right = clean.nonzero().flatten()
    robust, surface, accuracy = clean.clone(), None, None
    if len(right):
        least = subject.of(right)
        other = None if source is None else source.of(right)
        checks.append(check_gradients(least))
        checks.append(check_slopes(least, 2.5 / plan.steps))
        shown = slice(plan.pictures)
        check, surface = check_surface(
            subject.of(right[shown]), places[right[shown].cpu()], plan.points
        )
        checks.append(check)
        withstood, accuracy = _attacked(least, other, plan, checks)
        robust[right] = withstood
        accuracy = None if accuracy is None else accuracy * len(right) / len(clean)
    verdict, reasons = _verdict(checks, len(right))
    found = MaskingReport(
        verdict=verdict,
        reasons=reasons,
        checks=tuple(checks),
        surface=surface,
        norm=subject.norm,
        eps=subject.eps,
        seed=subject.seed,
        samples=places,
        robust=robust,
        clean_accuracy=float(clean.double().mean()),
        gradient_accuracy=accuracy,
        settings={**vars(plan), "source": source is not None},
    )
    if found.flat_entropy and accuracy is not None:
        told = f"attacks on margins, which have gradients here, leave {accuracy:.1%} of the samples"
        found = replace(found, reasons=(*reasons, told))
    return found


def _attacked(
    subject: Subject, source: Subject | None, plan: _Plan, checks: _Told
) -> tuple[Tensor, float | None]:
    """Makes the checks; which samples withstand all, and the share under gradient attacks."""
    withstood, accuracy, once = torch.ones_like(subject.y, dtype=torch.bool), None, None
    if subject.gradient("margin") is not None:
        once = withstood = subject.withstands(plan.attack(), 2)
        several = f"{plan.restarts} more restarts"
        attack = plan.attack(plan.restarts)
        check, withstood = check_effort(subject, attack, "restarts", several, withstood, 3)
        checks.append(check)
        attack, steps = plan.attack(longer=plan.longer), plan.longer * plan.steps
        check, withstood = check_effort(subject, attack, "steps", f"{steps} steps", withstood, 4)
        checks.append(check)
        targeted = TargetedPGD(plan.norm, plan.steps, plan.targets)
        other = f"ascents to each of {plan.targets} likely classes"
        check, withstood = check_effort(subject, targeted, "targets", other, withstood, 11)
        checks.append(check)
        accuracy = float(withstood.double().mean())
    after = withstood
    if source is not None:
        full = PGD(plan.norm, steps=plan.steps)
        check, after = check_transfer(subject, source, full, withstood)
        checks.append(check)
        checks.append(check_back(subject, source, full))
    check, left = check_square(subject, plan.queries, withstood)
    checks.append(check)
    if once is not None:
        checks.append(check_growth(subject, plan.attack(), once))
    return after & left, accuracy


_NEEDED = {"square", "slopes"}
"""Checks without which nothing is decided; slopes can be judged unless there is no gradient at all,
which is proof, or rounding hides them."""


def _verdict(checks: Sequence[MaskingCheck], right: int) -> tuple[str, tuple[str, ...]]:
    """The verdict and its reasons."""
    proofs = [check for check in checks if check.suspicious and check.decisive]
    signs = [check for check in checks if check.suspicious and not check.decisive]
    skipped = [check for check in checks if check.suspicious is None]
    missing = [f"{check.name} skipped: {check.sentence}" for check in skipped]
    found = [f"{c.name}: {c.sentence} (expected: {c.expected})" for c in (*proofs, *signs)]
    if proofs:
        return "masked", (*found, *missing)
    few = right < FEWEST_SAMPLES
    if few:
        missing.append(f"{right} samples are right, at least {FEWEST_SAMPLES} are needed")
    if signs or few or any(check.name in _NEEDED for check in skipped):
        return "undecided", (*found, *missing)
    made, fewest = len(checks) - len(skipped), fewest_that_exceed(right, ALLOWED_BLIND)
    return "not masked", (
        f"none of {made} checks found a sign of masked gradients",
        f"fewer than {fewest} of {right} samples found only without gradients would go unnoticed",
        *missing,
    )
