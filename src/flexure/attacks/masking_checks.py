"""Checks of a network's values and gradients for masking: no attack runs here.

Randomness, vanishing gradients, the gradient's predictions, and the loss surface. Attacks are
`masking_attacks`'; thresholds are `masking_evidence`'s.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from flexure.attacks.draws import normal
from flexure.attacks.masking_evidence import (
    ALLOWED_VANISHED,
    ALLOWED_WRONG_SLOPES,
    FEWEST_SAMPLES,
    RANDOM_SPREAD,
    ROUGH,
    SLOPE_ERROR,
    exceeds,
)
from flexure.attacks.masking_result import LossSurface, MaskingCheck
from flexure.attacks.masking_subject import LOSSES, Subject
from flexure.attacks.norms import norm_named, precise
from flexure.batched import dots, norms, scaled
from flexure.calling import margin

__all__ = ["check_gradients", "check_randomness", "check_slopes", "check_surface", "reseed"]

_PASSES = 4
"""Passes that are compared: a dropped unit differs in one of them with near certainty."""

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

_SMALL_STEPS = (1e-3, 1e-2)
"""Of the radius: the first of them at which float32 resolves a sample's change is judged."""

_RESOLVED = 10
"""A predicted change is judged where it is so many times the rounding of the logits."""

_ROUNDING = 32
"""Rounding of a network's logits, in units of the precision times the largest of them."""

_RAY_POINTS = 33


def reseed(seed: int) -> None:
    """Starts the global generators of torch, Python and NumPy; the caller puts them back."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def check_randomness(subject: Subject) -> MaskingCheck:
    """Whether repeated passes under other global seeds differ.

    Gradients of a random network are those of one draw; expectation over transformation is needed
    (Athalye et al. 2018, section 4.2; Carlini et al. 2019).
    """
    passes = []
    for key in range(_PASSES):
        reseed(subject.seeded(key))
        passes.append(subject.logits().double().nan_to_num())
    largest = passes[0].abs().amax(1).clamp(min=1e-300)
    gaps = torch.stack([(other - passes[0]).abs().amax(1) for other in passes[1:]])
    spread = gaps.amax(0) / largest
    differing = int((spread > RANDOM_SPREAD).sum())
    flips = int((torch.stack(passes).argmax(2) != passes[0].argmax(1)).any(0).sum())
    told = f"logits of {differing} of {len(spread)} samples differ between {_PASSES} passes"
    if differing:
        told += (
            f", by up to {float(spread.max()):.2g} of the largest logit; {flips} change their class"
        )
    return MaskingCheck(
        name="randomness",
        numbers={"differing": differing, "spread": float(spread.max()), "flips": flips},
        expected=f"passes agree to {RANDOM_SPREAD:g} of the largest logit",
        suspicious=differing > 0,
        decisive=True,
        sentence=told,
    )


def check_gradients(subject: Subject) -> MaskingCheck:
    """Norms of the input gradients, and how many of them say nothing.

    Those of the cross-entropy are computed in float32, where they underflow once logits are large
    (Carlini and Wagner 2017, of distilled networks; Athalye et al. 2018: vanishing gradients);
    those of the margin do not.
    """
    numbers: dict[str, object] = {}
    worst, told = 0, []
    for loss in LOSSES:
        gradient = subject.gradient(loss)
        if gradient is None:
            return _without_gradient()
        finite = gradient.flatten(1).isfinite().all(1)
        lengths = norms(gradient.double())
        useless = ~finite | (lengths == 0)
        known = lengths[finite] if bool(finite.any()) else lengths.new_zeros(1)
        quantiles = known.quantile(known.new_tensor(_QUANTILES))
        numbers[loss] = {
            "quantiles": quantiles.tolist(),
            "zero": int((lengths == 0).sum()),
            "not finite": int((~finite).sum()),
        }
        worst = max(worst, int(useless.sum()))
        told.append(
            f"{loss}: {int(useless.sum())} of {len(useless)} zero or not finite, median "
            f"{float(quantiles[2]):.2g}"
        )
    return MaskingCheck(
        name="gradient norms",
        numbers=numbers,
        expected=f"at most {ALLOWED_VANISHED:.0%} of the samples without a gradient",
        suspicious=exceeds(worst, len(subject.x), ALLOWED_VANISHED),
        decisive=True,
        sentence="; ".join(told),
    )


def check_slopes(subject: Subject, share: float) -> MaskingCheck:
    """Whether the loss rises along the gradient as the gradient says: a finite difference.

    Steps of a thousandth of the radius decide; that of the attack and the whole radius are told.
    A gradient made up for a network that has none, such as that of a straight-through estimator for
    a quantised input, fails here (Athalye et al. 2018, section 4.1: backward pass differentiable
    approximation).

    Args:
        subject: see there.
        share: the attack's step, as a share of the radius.
    """
    name, expected = "slopes", f"predictions within {SLOPE_ERROR:.0%} over the smallest steps"
    gradient = subject.gradient("margin")
    if gradient is None:
        return MaskingCheck(name, {}, expected, None, True, "there is no gradient")
    ratios, resolved = [], []
    steps = (*_SMALL_STEPS, share, 1.0)
    for step in steps:
        rise, predicted, rounding = _rise(subject, gradient, step)
        resolved.append(predicted > _RESOLVED * rounding)
        ratios.append(torch.where(predicted > 0, rise / predicted, torch.nan))
    first = torch.where(resolved[0], ratios[0], ratios[1])
    judged = resolved[0] | resolved[1]
    wrong = judged & ~((first - 1).abs() <= SLOPE_ERROR)
    count, bad = int(judged.sum()), int(wrong.sum())
    shares = [float(r[ok].nanmedian()) for r, ok in zip(ratios, resolved, strict=True)]
    numbers = {"steps": list(steps), "ratios": shares, "judged": count, "wrong": bad}
    if count < FEWEST_SAMPLES:
        told = f"rounding hides the changes of all but {count} samples"
        return MaskingCheck(name, numbers, expected, None, True, told)
    medians = ", ".join(f"{r:.2g} at {s:g} eps" for s, r in zip(steps, shares, strict=True))
    told = f"wrong for {bad} of {count} samples; median rise over predicted {medians}"
    suspicious = exceeds(bad, count, ALLOWED_WRONG_SLOPES)
    return MaskingCheck(name, numbers, expected, suspicious, True, told)


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
    floor = _rounding(subject.logits(), subject.x.dtype)[:, None].cpu()
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


def _rise(subject: Subject, gradient: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) of the loss −m over a step up, as found and as predicted, and the rounding of both."""
    up = norm_named(subject.norm).direction(gradient.nan_to_num(0.0, 0.0, 0.0))
    moved = _moved(subject, subject.eps * step * up)
    before, after = subject.logits(), subject.logits(moved)
    rise = margin(before, subject.y).double() - margin(after, subject.y).double()
    predicted = dots(gradient.double(), moved.double() - subject.x.double())
    return rise, predicted, _rounding(before, subject.x.dtype)


def _moved(subject: Subject, change: Tensor) -> Tensor:
    """The samples, changed and within the bounds."""
    low, high = subject.limits
    return (precise(subject.x) + change).clamp(low, high).to(subject.x.dtype)


def _rounding(logits: Tensor, dtype: torch.dtype) -> Tensor:
    precision = torch.finfo(torch.promote_types(logits.dtype, dtype)).eps
    return _ROUNDING * precision * logits.double().abs().amax(1)


def _turns(rises: Tensor) -> float:
    """Share of a row's neighbours with opposite signs."""
    if len(rises) < 2:
        return 0.0
    return float((rises[1:].sign() != rises[:-1].sign()).double().mean())


def _surface(subject: Subject, places: Tensor, points: int) -> LossSurface:
    found = subject.gradient("margin")
    gradient = torch.zeros_like(subject.x) if found is None else found.nan_to_num(0.0, 0.0, 0.0)
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
    direction = norm_named(subject.norm).direction
    drawn = [normal(subject.x.shape, subject.generator(key)).to(gradient) for key in (0, 1)]
    up = direction(gradient)
    flat = (up == 0).flatten(1).all(1)
    up = torch.where(flat.view(-1, *[1] * (up.dim() - 1)), direction(drawn[0]), up)
    across = drawn[1]
    if subject.norm == "l2":
        across = across - scaled(dots(across, up), up)
    return up, direction(across)


def _loss(
    subject: Subject, change: Tensor, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(S,) −m at a change in units of the radius; with a gradient also what it predicts."""
    moved = _moved(subject, subject.eps * change)
    loss = -margin(subject.logits(moved), subject.y).double()
    if gradient is None:
        return loss.cpu(), loss.cpu()
    before = -margin(subject.logits(), subject.y).double()
    return loss.cpu(), (before + dots(gradient.double(), moved.double() - subject.x.double())).cpu()
