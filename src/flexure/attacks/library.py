"""The attacks of AutoAttack, by its maintained library: APGD, FAB and Square.

Here are their settings, and what they need to run on any classifier. What is made of their results
is `evaluate`'s business; which names they have, `catalogue`'s.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from flexure.attacks.library_model import (
    LibraryModel,
    autoattack_library,
    default_dtype,
    seed_for,
)
from flexure.attacks.norms import check_eps
from flexure.contracts import FlexureError
from flexure.measuring import constant_parameters, unchanged_randomness

__all__ = ["APGD", "FAB", "Square"]

_NORMS: Mapping[str, str] = {"linf": "Linf", "l2": "L2"}
"""Norm -> what the library calls it."""

_LOGITS: Mapping[str, int] = {"ce": 2, "dlr": 3, "targeted": 4}
"""Loss of APGD -> how many logits it is defined for, at least."""

_LOSSES: Mapping[str, str] = {"ce": "apgd-ce", "dlr": "apgd-dlr", "targeted": "apgd-t"}
"""Loss of APGD -> the name of the attack."""


@dataclass(frozen=True)
class APGD:
    """Auto-PGD (Croce and Hein 2020): projected gradient ascent that halves its own step size.

    Run by the AutoAttack library, with which it shares every draw: for the same seed and batch it
    returns what that library returns. A sample that is not beaten comes back as it was.

    The difference-of-logits-ratio losses need three logits ("dlr") or four ("targeted"). Of fewer
    classes the difference of logits itself is maximised: the largest other one, or the target's,
    minus the label's. APGD uses no more of a gradient than its direction, so the lack of a
    denominator is no change of scale. It warns of that.

    Attributes:
        norm: "linf" or "l2".
        loss: "ce" (cross-entropy), "dlr" (untargeted), or "targeted" (DLR of one wrong class after
            the other, those of the largest logits first).
        steps: gradients of a start. 100 is that of standard AutoAttack.
        restarts: random starts (of each target), at least 1.
        targets: classes that "targeted" tries, at most; 9 is that of standard AutoAttack.

    Raises:
        FlexureError: a setting that does not fit.
    """

    norm: str = "linf"
    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        _check_norm(self.norm)
        if self.loss not in _LOGITS:
            raise FlexureError(
                f"expected loss to be one of {', '.join(_LOGITS)}, got {self.loss!r}"
            )
        _check_counts(self, "steps", "restarts", "targets")

    @property
    def name(self) -> str:
        """Its name in `catalogue.ATTACKS`."""
        return _LOSSES[self.loss]

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator: Generator
    ) -> Tensor:
        """Inputs near x that the model gets wrong, where they are found; x elsewhere.

        The search is in float32; a result within rounding of the ball and the bounds comes back in
        the dtype of x.

        Args:
            model: gives logits (B, K); inputs are within its attribute `bounds`, which is finite.
            x: (B, *shape).
            y: (B,) int64 labels.
            eps: the radius, in units of x.
            generator: of the CPU; see `library_model.seed_for`.

        Returns:
            (B, *shape).

        Raises:
            FlexureError: outputs that are no logits, a model without finite bounds or that cannot
                be differentiated in its input.
            MissingExtraError: the library is not installed.
        """
        return _run(self, LibraryModel(model, x), x, y, eps, generator)

    def search(
        self, model: LibraryModel, x: Tensor, y: Tensor, settings: Mapping[str, Any]
    ) -> Tensor:
        """What the library finds for scaled inputs."""
        library = autoattack_library("autopgd_base")
        model.judge_gradients(x, y, self.loss)
        common = {**settings, "n_iter": self.steps, "n_restarts": self.restarts, "logger": _QUIET}
        if self.loss == "targeted":
            targets = min(self.targets, model.classes - 1)
            attack = library.APGDAttack_targeted(model, n_target_classes=targets, **common)
        else:
            attack = library.APGDAttack(model, loss=self.loss, **common)
        if model.classes < _LOGITS[self.loss]:
            model.warn(
                f"the loss {self.loss!r} needs {_LOGITS[self.loss]} classes, the model has "
                f"{model.classes}: the difference of logits was maximised in its place"
            )
            attack.dlr_loss = attack.dlr_loss_targeted = _difference(attack)
        found: Tensor = attack.perturb(x, y)
        return found


@dataclass(frozen=True)
class FAB:
    """The Fast Adaptive Boundary attack (Croce and Hein 2020): the nearest point of another class.

    Run by the AutoAttack library, as `APGD`. It searches for a small change rather than within a
    radius; a change larger than the radius is no result.

    Attributes:
        norm: "linf" or "l2".
        targeted: whether it goes for one wrong class after the other, those of the largest logits
            first, which costs one gradient a step; else for the nearest of all, which costs one for
            each class.
        steps: of a start; 100 is that of standard AutoAttack.
        restarts: starts (of each target), at least 1; the first is at x, the others random within
            half the radius. Standard AutoAttack has 1; its version "plus" 5 where not targeted.
        targets: classes that are tried where targeted, at most; 9 is that of standard AutoAttack.

    Raises:
        FlexureError: a setting that does not fit.
    """

    norm: str = "linf"
    targeted: bool = True
    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        _check_norm(self.norm)
        if type(self.targeted) is not bool:
            raise FlexureError(f"expected targeted to be True or False, got {self.targeted!r}")
        _check_counts(self, "steps", "restarts", "targets")

    @property
    def name(self) -> str:
        """Its name in `catalogue.ATTACKS`."""
        return "fab-t" if self.targeted else "fab"

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator: Generator
    ) -> Tensor:
        """As `APGD.run`, which see."""
        return _run(self, LibraryModel(model, x), x, y, eps, generator)

    def search(
        self, model: LibraryModel, x: Tensor, y: Tensor, settings: Mapping[str, Any]
    ) -> Tensor:
        """What the library finds for scaled inputs."""
        library = autoattack_library("fab_pt")
        model.judge_gradients(x, y, "margin")
        attack = library.FABAttack_PT(
            model, n_iter=self.steps, n_restarts=self.restarts, targeted=self.targeted,
            n_target_classes=min(self.targets, model.classes - 1), **settings,
        )  # fmt: skip
        found: Tensor = attack.perturb(x, y)
        return found


@dataclass(frozen=True)
class Square:
    """The Square attack (Andriushchenko et al. 2020): random windows of an image, no gradients.

    Run by the AutoAttack library, as `APGD`. What is no image, and in l2 an image that the library
    cannot divide into tiles (sides below 5, and a few others, such as 12 and 24), is laid out as a
    square one, feature after feature; a last row and column, and what the features do not fill,
    stay unused (the library's windows do not reach the last row and column).

    Attributes:
        norm: "linf" or "l2".
        queries: calls of the model for each sample and restart; 5000 is that of standard
            AutoAttack.
        restarts: at least 1.
        share: of the pixels that the first windows cover, in (0, 1]; 0.8 is that of standard
            AutoAttack.

    Raises:
        FlexureError: a setting that does not fit.
    """

    norm: str = "linf"
    queries: int = 5000
    restarts: int = 1
    share: float = 0.8

    name: ClassVar[str] = "square"

    def __post_init__(self) -> None:
        _check_norm(self.norm)
        _check_counts(self, "queries", "restarts")
        if type(self.share) not in (int, float) or not 0 < self.share <= 1:
            raise FlexureError(f"expected share above 0 and at most 1, got {self.share!r}")

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator: Generator
    ) -> Tensor:
        """As `APGD.run`, which see; the model need not be differentiable."""
        return _run(self, LibraryModel(model, x, self._layout(x)), x, y, eps, generator)

    def search(
        self, model: LibraryModel, x: Tensor, y: Tensor, settings: Mapping[str, Any]
    ) -> Tensor:
        """What the library finds for scaled inputs."""
        attack = autoattack_library("square").SquareAttack(
            model, p_init=self.share, n_queries=self.queries, n_restarts=self.restarts,
            resc_schedule=False, **settings,
        )  # fmt: skip
        attack.margin_and_loss = _without_ties(attack.margin_and_loss)
        with torch.no_grad():
            found: Tensor = attack.perturb(x, y)
        return found

    def _layout(self, x: Tensor) -> tuple[int, int] | None:
        if x.dim() == 4 and (self.norm == "linf" or _tiled(*x.shape[2:])):
            return None
        filled = math.isqrt(x[0].numel() - 1) + 1
        return filled, next(side for side in count(filled + 1) if _tiled(side, side))


def _tiled(height: int, width: int) -> bool:
    """Whether the tiles that the library's l2 Square starts from lie within an image.

    Their side is a fifth of the height; they begin where five of them are in the middle, and there
    are as many as fit an image from its edge. Those of one pixel may lie outside.
    """
    tile = height // 5
    if min(height, width) < 5:
        return False
    start = (height - 5 * tile) // 2
    return tile == 1 or all(start + side // tile * tile <= side for side in (height, width))


def _run(
    attack: APGD | FAB | Square,
    model: LibraryModel,
    x: Tensor,
    y: Tensor,
    eps: float,
    generator: Generator,
) -> Tensor:
    """Any of them: the library's result, in the model's units; x where it is not finite."""
    settings = {
        "norm": _NORMS[attack.norm],
        "eps": check_eps(eps) / model.scale,
        "seed": seed_for(generator),
        "device": x.device,
        "verbose": False,
    }
    y = y.detach().to(x.device).long()
    with (
        unchanged_randomness(x.device),
        constant_parameters(model.model),
        default_dtype(torch.float32),
    ):
        at = model.scaled(x)
        model.judge(at, y)
        found = attack.search(model, at.clone(), y, settings).detach()
    # Gradients of zero make FAB divide by zero, and attacks may end where the model overflows.
    finite = found.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        model.warn(
            f"{int((~finite).sum())} of {len(x)} results of the attack on a batch were not finite "
            f"and were dropped, so that it says nothing of these samples; see flexure's "
            f"masking_report, and try Square"
        )
    changed = finite & (found != at).flatten(1).any(1)
    shape = (-1, *[1] * (x.dim() - 1))
    return torch.where(changed.view(shape), model.restored(found), x.detach())


def _difference(attack: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The logit of the target, or the largest but the label's, minus the label's: (B,)."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        own, target = y[:, None], attack.y_target
        others = logits.scatter(1, own, -torch.inf).amax(1)
        other = others if target is None else logits.gather(1, target[:, None])[:, 0]
        return other - logits.gather(1, own)[:, 0]

    return loss


def _without_ties(
    measured: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The library's margins, with ties just below 0: its l2 Square fails where only ties are left.

    It takes them for misclassified elsewhere, so that nothing else changes.
    """

    def margins(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found, loss = measured(x, y)
        return torch.where(found == 0, -torch.finfo(found.dtype).tiny, found), loss

    return margins


def _check_norm(norm: Any) -> None:
    if not isinstance(norm, str) or norm not in _NORMS:
        raise FlexureError(f"expected norm to be one of {', '.join(_NORMS)}, got {norm!r}")


def _check_counts(attack: Any, *names: str) -> None:
    for name in names:
        value = getattr(attack, name)
        if type(value) is not int or value < 1:
            raise FlexureError(f"expected {name} of at least 1, an integer, got {value!r}")


_QUIET = logging.Logger("flexure.attacks.library", level=logging.CRITICAL)
"""For the library's own warning of zero gradients, in place of which stands `judge_gradients`'s."""
