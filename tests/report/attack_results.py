"""Small finished results of attacks for the tests of their reports, made by the real classes."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flexure.attacks.masking_result import LossSurface, MaskingCheck, MaskingReport
from flexure.methods.attack_model_result import (
    AdversarialExamples,
    AttackedAt,
    AttackedModel,
    AttackReport,
    AttackStage,
    CertifiedShare,
)
from flexure.methods.attack_model_shares import share

LINF = {"linf": tuple(k / 255 for k in (0.5, 1, 2, 4, 8))}
BOTH = {**LINF, "l2": (0.1, 0.25, 0.5)}
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")


def hits(n: int, count: int, seed: int = 0) -> Tensor:
    """(n,) bool, so many of them true."""
    found = torch.zeros(n, dtype=torch.bool)
    found[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return found


def at_radius(
    norm: str, eps: float, left: Tensor, attacks: Sequence[str], fall: float, **words: Any
) -> AttackedAt:
    """Each attack takes a share of what withstood those before it."""
    robust, stages = left.clone(), []
    for k, name in enumerate(attacks):
        rows = robust.nonzero().flatten()
        if not len(rows):
            break
        tried, robust = robust, robust.clone()
        robust[rows[: math.ceil(fall / (k + 1) * len(rows))]] = False
        beaten = tried & ~robust
        warned = ("few gradients <0>",) if name == "apgd-t" else ()
        alone = left & ~beaten if words.get("every") else None
        seconds = 0.5 * len(rows)
        stages.append(AttackStage(name, robust, tried, beaten, seconds, alone, warned))
    protocol = words.get("protocol", "standard")
    reached = None if protocol == "standard" else (2.5, 0.61)
    return AttackedAt(norm, eps, robust, tuple(stages), 0, protocol, reached)


def attacked(
    name: str = "steered",
    *,
    n: int = 100,
    clean: int = 90,
    radii: Mapping[str, Sequence[float]] = LINF,
    attacks: Sequence[str] = ATTACKS,
    fall: float = 0.3,
    seed: int = 0,
    every: bool = False,
    published: bool = False,
) -> AttackedModel:
    """A model that loses samples with each attack and radius."""
    right = hits(n, clean, seed)
    found = []
    for norm, each in radii.items():
        left = right
        for eps in each:
            found.append(at_radius(norm, eps, left, attacks, fall, every=every))
            left = found[-1].robust
    if published:
        found.append(at_radius("linf", 8 / 255, right, ["apgd-ce"], 0.2, protocol="published"))
    return AttackedModel(name, right, tuple(found))


def examples(
    count: int = 2, shape: tuple[int, ...] = (3, 8, 8), *, norms: Sequence[str] = ("linf",),
    eps: float = 2 / 255, bounds: tuple[float, float] | None = (0.0, 1.0), classes: int = 3,
) -> AdversarialExamples:  # fmt: skip
    """Inputs away from the bounds, so that the change is eps everywhere."""
    drawn = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(count, *shape, generator=drawn)
    x_adv = x + eps * torch.randn(x.shape, generator=drawn).sign()
    y = torch.arange(count) % classes
    which = tuple(norms[k % len(norms)] for k in range(count))
    after, places = (y + 1) % classes, 7 * torch.arange(count)
    found_by = tuple(ATTACKS[k % len(ATTACKS)] for k in range(count))
    radii = (eps,) * count
    return AdversarialExamples(x, x_adv, y, y, after, places, which, radii, found_by, bounds)


def masking(verdict: str = "not masked", *, norm: str = "linf", broken: bool = False) -> Any:
    """A report with all that is drawn; broken: without gradients, with infinite losses."""
    offsets, ray = torch.linspace(-1, 1, 7), torch.linspace(0, 1, 9)
    losses = torch.stack([(k - 1) + 3 * offsets[:, None] + k * offsets[None] ** 2 for k in (0, 1)])
    along = torch.stack([(k - 1) + 3 * ray - 0.4 * ray**2 for k in (0, 1)])
    predicted = torch.stack([(k - 1) + 3 * ray for k in (0, 1)])
    sizes = {"quantiles": [0.0, 1e-3, 0.2, 0.9, 4.0], "zero": 3, "not finite": 0}
    norms: dict[str, Any] = {"cross-entropy": sizes, "margin": sizes}
    growth: dict[str, Any] = {"eps": [1 / 255, 0.05, 0.5], "accuracy": [0.5, 0.1, 0.0]}
    if broken:
        losses[0], losses[1, 2], predicted[:], norms, growth = math.nan, math.inf, math.nan, {}, {}
    checks = (
        MaskingCheck("gradient norms", norms, "at most 5 %", broken, True, "3 of 60 are zero"),
        MaskingCheck("square", {}, "at most 2 %", None, True, "skipped: <missing>"),
        MaskingCheck("growing eps", growth, "falls", False, True, "falls to 0"),
    )
    surface = LossSurface(
        offsets, losses, ray, along, predicted, -losses[:, 3, 3], torch.tensor([3, 17]),
        torch.tensor([0, 1]),
    )  # fmt: skip
    return MaskingReport(
        verdict, ("none of 3 checks found a sign",), checks, surface, norm, 1 / 255, 0,
        torch.arange(64), hits(64, 20), 0.9, None if broken else 0.4, {},
    )  # fmt: skip


def report(*models: AttackedModel, **words: Any) -> AttackReport:
    """Of these models, or of one."""
    given: dict[str, Any] = {"examples": examples(0)} | words
    return AttackReport(models or (attacked(),), **given)


def certified(n: int = 100) -> tuple[CertifiedShare, ...]:
    """Fewer samples with each radius."""
    return tuple(
        CertifiedShare(eps, share(hits(n, count)))
        for eps, count in ((0.1, 12), (0.25, 4), (0.5, 0))
    )


def images_of(svg: str) -> list[np.ndarray]:
    """The images in a picture as (H, W, 3) numbers in [0, 1]."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    opened = [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]
    return [np.asarray(one.convert("RGB"), dtype=float) / 255 for one in opened]
