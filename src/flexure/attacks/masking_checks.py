"""Checks of a network's values and gradients for masking: no attack runs here.

Randomness, vanishing gradients, the gradient's predictions, and the loss surface. Attacks are
`masking_attacks`'; thresholds are `masking_evidence`'s.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexure.attacks.draws import normal
from flexure.attacks.masking_evidence import (
    ALLOWED_VANISHED,
    ALLOWED_WRONG_SLOPES,
    FEWEST_SAMPLES,
    MOSTLY_VANISHED,
    RANDOM_SPREAD,
    ROUGH,
    SLOPE_ERROR,
    exceeds,
)
from flexure.attacks.masking_result import LossSurface, MaskingCheck
from flexure.attacks.masking_steps import (
    LAST_ROUNDING,
    centred,
    direction,
    known,
    moved,
    precision,
    rise,
    rounding,
)
from flexure.attacks.masking_subject import LOSSES, Subject
from flexure.batched import dots, norms, scaled
from flexure.calling import margin

__all__ = ["check_gradients", "check_randomness", "check_slopes", "check_surface", "reseed"]

_PASSES = 32
"""Passes that are compared, at samples and again next to them: a network that is random in one of
ten passes shows it with a probability of 0.9988."""

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

_SMALL_STEPS = (1e-3, 1e-2)
"""Of the radius: the first of them at which rounding leaves a sample's change is judged."""

_COARSE_STEP = 0.1
"""Of the radius: judged instead where rounding leaves too few samples there. What is wrong here is
evidence; what is right is none, since finer steps of a quantised input would be averaged."""

_RESOLVED = 10
"""A predicted change is judged where it is so many times the rounding of the logits."""

_RAY_POINTS = 33


def reseed(seed: int) -> None:
    """Starts the global generators of torch, Python and NumPy; the caller puts them back."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def check_randomness(subject: Subject) -> MaskingCheck:
    """Whether repeated passes under other global seeds differ, at samples or next to them.

    Gradients of a random network are those of one draw; expectation over transformation is needed
    (Athalye et al. 2018, section 4.2; Carlini et al. 2019). What is the same for all classes says
    nothing of the network's decision: logits are centred. Next to samples: where one step of the
    fast gradient sign method leads.
    """
    gradient = subject.gradient("margin")
    up, _ = _directions(subject, known(torch.zeros_like(subject.x) if gradient is None
                                        else gradient))  # fmt: skip
    differing = torch.zeros_like(subject.y, dtype=torch.bool)
    spread, flipped = differing.double(), differing.clone()
    for inputs in (subject.x, moved(subject, subject.eps * up)):
        gaps, allowed, flips = _repeated(subject, inputs)
        differing |= flips | (gaps > allowed)
        spread, flipped = spread.maximum(gaps), flipped | flips
    count, flips_ = int(differing.sum()), int(flipped.sum())
    told = f"logits of {count} of {len(spread)} samples differ between {_PASSES} passes"
    if count:
        told += (
            f", by up to {float(spread.max()):.2g} of the largest logit; {flips_} change their "
            f"class"
        )
    return MaskingCheck(
        name="randomness",
        numbers={"differing": count, "spread": float(spread.max()), "flips": flips_},
        expected=f"passes agree to {RANDOM_SPREAD:g} of the largest logit (all centred), and on "
        f"classes",
        suspicious=count > 0,
        decisive=True,
        sentence=told,
    )


def check_gradients(subject: Subject) -> MaskingCheck:
    """Norms of the input gradients, and how many of them say nothing.

    Those of the cross-entropy are computed in float32, where they underflow once logits are large
    (Carlini and Wagner 2017, of distilled networks; Athalye et al. 2018: vanishing gradients);
    those of the margin do not.
    """
    numbers: dict[str, dict[str, Any]] = {}
    told = []
    total = len(subject.x)
    for loss in LOSSES:
        gradient = subject.gradient(loss)
        if gradient is None:
            return _without_gradient()
        numbers[loss] = _lengths(gradient)
        told.append(
            f"{loss}: {numbers[loss]['zero'] + numbers[loss]['not finite']} of {total} zero or not "
            f"finite, median {numbers[loss]['quantiles'][2]:.2g}"
        )
    entropy, odds = numbers["cross-entropy"], numbers["margin"]
    broken = max(each["not finite"] for each in numbers.values())
    useless = exceeds(max(broken, odds["zero"] + odds["not finite"]), total, ALLOWED_VANISHED)
    vanished = entropy["zero"]
    suspicious = useless or exceeds(vanished, total, ALLOWED_VANISHED)
    if suspicious and not useless:
        told.append(
            f"gradients of the float32 cross-entropy vanish at {vanished} of {total} samples: "
            f"attacks on it fail there, whatever the robustness, and attacks on margins do not"
        )
    return MaskingCheck(
        name="gradient norms",
        numbers=numbers,
        expected=f"at most {ALLOWED_VANISHED:.0%} of the samples without a gradient; a "
        f"cross-entropy that is flat at more than {MOSTLY_VANISHED:.0%} is proof",
        suspicious=suspicious,
        decisive=useless or not suspicious or exceeds(vanished, total, MOSTLY_VANISHED),
        sentence="; ".join(told),
    )


def check_slopes(subject: Subject, share: float) -> MaskingCheck:
    """Whether the loss changes as the gradient says: finite differences along it and across.

    Of the steps up, a thousandth of the radius decides, or the next one that rounding leaves; that
    of the attack and the whole radius are told. A gradient made up for a network that has none,
    such as that of a straight-through estimator for a quantised input, fails here (Athalye et al.
    2018, section 4.1: backward pass differentiable approximation). A gradient with a part cut off
    still says what happens along itself, so that random signs (in l2 a random direction) decide,
    too: there the error is judged against the size that the gradient's prediction has on average
    over signs.

    Args:
        subject: see there.
        share: the attack's step, as a share of the radius.
    """
    name, expected = "slopes", f"predictions within {SLOPE_ERROR:.0%} over the smallest steps"
    gradient = subject.gradient("margin")
    if gradient is None:
        return MaskingCheck(name, {}, expected, None, True, "there is no gradient")
    steps = (*_SMALL_STEPS, _COARSE_STEP, share, 1.0)
    up = direction(subject, known(gradient))
    rises = [rise(subject, gradient, step * up) for step in steps]
    resolved = [r.predicted > _RESOLVED * r.rounding for r in rises]
    ratios = [torch.where(r.predicted > 0, r.found / r.predicted, torch.nan) for r in rises]
    shares = [float(r[ok].nanmedian()) for r, ok in zip(ratios, resolved, strict=True)]
    along = [(ok, (ratio - 1).abs()) for ok, ratio in zip(resolved, ratios, strict=True)]
    count, bad, fine = _wrong(along[:3])
    drawn = normal(subject.x.shape, subject.generator(12)).to(gradient)
    aside = [rise(subject, gradient, step * direction(subject, drawn)) for step in steps[:3]]
    across = [(r.size > _RESOLVED * r.rounding, (r.found - r.predicted).abs() / r.size)
              for r in aside]  # fmt: skip
    others, missed, _ = _wrong(across)
    numbers = {"steps": list(steps), "ratios": shares, "judged": count, "wrong": bad,
               "judged across": others, "wrong across": missed}  # fmt: skip
    suspicious = any(
        total >= FEWEST_SAMPLES and exceeds(found, total, ALLOWED_WRONG_SLOPES)
        for found, total in ((bad, count), (missed, others))
    )
    medians = ", ".join(f"{r:.2g} at {s:g} eps" for s, r in zip(steps, shares, strict=True))
    told = (
        f"wrong for {bad} of {count} samples along the gradient, for {missed} of {others} across; "
        f"median rise over predicted {medians}"
    )
    if not fine and not suspicious:
        told = (
            f"rounding, or a gradient of zero, hides the changes over steps of "
            f"{_SMALL_STEPS[-1]:g} eps; {told}"
        )
    judged = suspicious if fine or suspicious else None
    return MaskingCheck(name, numbers, expected, judged, True, told)


def check_surface(
    subject: Subject, places: Tensor, points: int
) -> tuple[MaskingCheck, LossSurface]:
    """The loss around samples, and how often it turns along the gradient.

    Args:
        subject: with the S samples to look at.
        places: (S,) their places among the inputs that were given.
        points: of the grid, along each axis.
    """
    surface = _surface(subject, places, points)
    rises = surface.ray_losses.diff(dim=1)
    floor = rounding(subject, subject.logits())[:, None].cpu()
    turns = [_turns(row[row.abs() > f]) for row, f in zip(rises, floor, strict=True)]
    total = surface.ray_losses - surface.ray_losses[:, :1]
    missed = surface.ray_losses - surface.ray_predicted
    explained = 1 - missed.square().sum(1) / total.square().sum(1)
    roughness = sum(turns) / len(turns)
    check = MaskingCheck(
        name="loss surface",
        numbers={"turns": turns, "explained": explained.tolist()},
        expected=f"turns at less than {ROUGH:.0%} of the points along the gradient",
        suspicious=roughness > ROUGH,
        decisive=False,
        sentence=(
            f"along the gradient of {len(turns)} samples the loss turns at {roughness:.0%} of the "
            f"points; the gradient explains {float(explained.nanmedian()):.0%} of its change"
        ),
    )
    return check, surface


def _without_gradient() -> MaskingCheck:
    return MaskingCheck(
        name="gradient norms",
        numbers={},
        expected="a gradient in the input",
        suspicious=True,
        decisive=True,
        sentence="no gradient reaches the input: an operator on the way lets none through",
    )


def _repeated(subject: Subject, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of passes at inputs, (N,) each: largest gap to the first, what is allowed, class changes.

    Gaps are shares of the largest centred logit.
    """
    found = []
    for key in range(_PASSES):
        reseed(subject.seeded(key))
        logits = subject.logits(inputs)
        found.append(logits.double().nan_to_num())
    first = centred(found[0])
    largest = first.abs().amax(1).clamp(min=1e-300)
    gaps = torch.stack([(centred(other) - first).abs().amax(1) for other in found[1:]]).amax(0)
    flips = (torch.stack(found).argmax(2) != found[0].argmax(1)).any(0)
    unit = precision(subject, logits) * found[0].abs().amax(1)
    return gaps / largest, RANDOM_SPREAD + 2 * LAST_ROUNDING * unit / largest, flips


def _lengths(gradient: Tensor) -> dict[str, Any]:
    """Quantiles of the norms of (N, *shape) gradients, and how many of them say nothing."""
    finite = gradient.flatten(1).isfinite().all(1)
    lengths = norms(gradient.double())
    some = lengths[finite] if bool(finite.any()) else lengths.new_zeros(1)
    return {
        "quantiles": some.quantile(some.new_tensor(_QUANTILES)).tolist(),
        "zero": int((lengths == 0).sum()),
        "not finite": int((~finite).sum()),
    }


def _wrong(steps: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int, bool]:
    """How many samples are judged, how many of them are wrong, and whether at a small step.

    Args:
        steps: (N,) bool, whether rounding leaves a sample's change, and (N,) its relative error, at
            the two small steps and the coarse one.
    """
    (first, error), (second, other), (coarse, last) = steps
    judged, errors = first | second, torch.where(first, error, other)
    fine = int(judged.sum()) >= FEWEST_SAMPLES
    if not fine:
        judged, errors = coarse, last
    return int(judged.sum()), int((judged & ~(errors <= SLOPE_ERROR)).sum()), fine


def _turns(rises: Tensor) -> float:
    """Share of a row's neighbours with opposite signs."""
    if len(rises) < 2:
        return 0.0
    return float((rises[1:].sign() != rises[:-1].sign()).double().mean())


def _surface(subject: Subject, places: Tensor, points: int) -> LossSurface:
    found = subject.gradient("margin")
    gradient = torch.zeros_like(subject.x) if found is None else known(found)
    up, across = _directions(subject, gradient)
    offsets, ray = torch.linspace(-1, 1, points), torch.linspace(0, 1, _RAY_POINTS)
    losses = [
        torch.stack([_loss(subject, a * up + b * across)[0] for b in offsets.tolist()], 1)
        for a in offsets.tolist()
    ]
    along = [_loss(subject, a * up, gradient) for a in ray.tolist()]
    predicted = torch.stack([p for _, p in along], 1)
    flat = (gradient == 0).flatten(1).all(1)
    predicted[flat.cpu()] = torch.nan
    margins = margin(subject.logits(), subject.y)
    return LossSurface(
        offsets=offsets,
        losses=torch.stack(losses, 1),
        ray=ray,
        ray_losses=torch.stack([loss for loss, _ in along], 1),
        ray_predicted=predicted,
        margins=margins.double().cpu(),
        samples=places.cpu(),
        labels=subject.y.cpu(),
    )


def _directions(subject: Subject, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The way up and one across, (S, *shape) each, of length 1 in the norm."""
    drawn = [normal(subject.x.shape, subject.generator(key)).to(gradient) for key in (0, 1)]
    up = direction(subject, gradient)
    flat = (up == 0).flatten(1).all(1)
    up = torch.where(flat.view(-1, *[1] * (up.dim() - 1)), direction(subject, drawn[0]), up)
    across = drawn[1]
    if subject.norm == "l2":
        across = across - scaled(dots(across, up), up)
    return up, direction(subject, across)


def _loss(
    subject: Subject, change: Tensor, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(S,) −m at a change in units of the radius; with a gradient also what it predicts."""
    at = moved(subject, subject.eps * change)
    loss = -margin(subject.logits(at), subject.y).double()
    if gradient is None:
        return loss.cpu(), loss.cpu()
    before = -margin(subject.logits(), subject.y).double()
    return loss.cpu(), (before + dots(gradient.double(), at.double() - subject.x.double())).cpu()
