"""Certified radii: how far from an input no change whatever can alter a network's prediction.

They follow from the network's Lipschitz bound (`margin_bounds.py`), without an attack: what attacks
find bounds the same accuracy from the other side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import check_logits, logits_of
from flexure.contracts import FlexureError, is_number
from flexure.measure.bound_trace import bounded, nothing_drawn
from flexure.measure.fields import measuring
from flexure.measure.lipschitz import LipschitzBounding
from flexure.measure.margin_bounds import MarginBounds, margin_bounds
from flexure.measure.probability import check_positive, pieces
from flexure.measure.wide import in_float64
from flexure.per_sample import PerSample

__all__ = ["RADII", "Certificates", "certified_radius"]

RADII: Mapping[str, Callable[[int], float]] = {
    "l2": lambda size: 1.0,
    "linf": lambda size: 1.0 / math.sqrt(size),
}
"""Norm -> the radius of its largest ball, of so many dimensions, inside of the l2 ball of radius 1.
"""

TOLERANCE = 1e-4
"""The share of eps that a change may be larger by and still count as one of norm at most eps. It
is that of the attacks here: adding a change to an input rounds it to the input's dtype, and steps
back to the ball are rounded too. What is certified at eps must hold for those changes as well."""

ALONE = 3
"""Of so many samples of each batch the logits are computed alone too: networks that mix samples mix
the first ones. Each is one more pass, of one sample."""

SAME = 1e-6
"""What the order of sums may make of a logit alone and in a batch, relative to the largest one of
the sample: some 1e-15 in float64, some 1e-7 in parts that compute in float32 nevertheless."""

ROUNDING = 1e-10
"""What float64 may have done to a logit, relative to the largest one of the sample."""

SHAVED = 1.0 - 1e-12
"""What the few operations that make a radius out of a margin may take."""


@dataclass(frozen=True)
class Certificates(PerSample):
    """Of each of B samples, the radius of a ball in which the prediction is certainly right.

    Attributes:
        converged: (B,) bool, whether the logits are finite; others have radius 0.
        correct: (B,) bool, whether the prediction at x is the label.
        radius: (B,) float64, in units of x: every change δ with ‖δ‖ < radius in the norm leaves
            the prediction right; the ball is open. 0 where it is wrong, or not sure to be right;
            inf where the logits cannot change.
        margin: (B,) float64, z_y − max_{k≠y} z_k, the logits' difference, lowered by rounding.
        norm: of δ, "l2" or "linf".
        lipschitz: the bound of the Lipschitz constant of the logits in the l2 norm.
    """

    correct: Tensor
    radius: Tensor
    margin: Tensor
    norm: str
    lipschitz: float

    @property
    def clean_accuracy(self) -> float:
        """The share of samples that are right as they are."""
        return float(self.correct.double().mean())

    def certified(self, eps: float) -> Tensor:
        """(B,) bool, whether no change of norm at most eps can make the prediction wrong.

        Those with a radius above eps·(1 + 1e-4): the changes of attacks, which are rounded to the
        dtype of x, may be larger than eps by 1e-4 of it. A radius of just eps does not tell, as the
        ball is open.

        Raises:
            FlexureError: eps is no finite radius.
        """
        if not is_number(eps) or not 0 <= eps < math.inf:
            raise FlexureError(
                f"expected eps to be a finite radius of at least 0, in units of the input, got "
                f"{eps!r}; give a number such as 8 / 255"
            )
        return self.radius > eps * (1 + TOLERANCE)

    def certified_accuracy(self, eps: float) -> float:
        """The share of samples that no change of norm at most eps makes wrong.

        A lower bound of the robust accuracy at eps, as what withstands an attack is an upper one.

        Raises:
            FlexureError: eps is no finite radius.
        """
        return float(self.certified(eps).double().mean())

    def curve(self, eps: Sequence[float]) -> tuple[float, ...]:
        """The certified accuracy at each of several radii.

        Raises:
            FlexureError: one of them is no finite radius.
        """
        return tuple(self.certified_accuracy(each) for each in eps)

    def __str__(self) -> str:
        median = float(self.radius[self.correct].median()) if bool(self.correct.any()) else 0.0
        return (
            f"clean accuracy {self.clean_accuracy:.1%}, median certified {self.norm} radius of the "
            f"right ones {median:.4g} (logits' Lipschitz bound {self.lipschitz:.4g}, {len(self)} "
            f"samples)"
        )


def certified_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "l2",
    lipschitz: float | None = None,
    chunk: int | None = None,
) -> Certificates:
    """The radius around each input in which a classifier's prediction is certainly right.

    With L_yk a bound of the l2 Lipschitz constant of z_y − z_k, z the logits, that difference is
    positive wherever ‖δ‖₂ · L_yk is less than it is at x. So with

        r(x) = min_{k≠y} (z_y(x) − z_k(x)) / L_yk

    every δ with ‖δ‖₂ < r leaves y the largest logit (Tsuzuku et al. 2018, Lipschitz-margin
    training, proposition 1, where L_yk = √2·L, and proposition 2). The constants are those of
    `margin_bounds`. For l_inf the radius is r/√d, d the elements of an input: its ball lies in the
    l2 ball of radius r, as ‖δ‖₂ <= √d·‖δ‖_inf. That is valid, and weak for images.

    The constants hold for all inputs, so that a deep network that was not made to have small ones
    gets radii near 0, however robust it is: no statement about it. Those of `to_lcnn` are.

    Of a `flexure.Bounded` the radii are in pixels: its normalisation is a part of the network. That
    δ may not leave the bounds is not made use of.

    What is certified is the network of real numbers with these weights, in eval mode, one sample
    alone. So a network that draws random numbers is refused, and one whose logits differ between a
    sample alone and in a batch by more than rounding (3 of each batch are compared).

    Logits are computed in float64, by float64 copies of the weights, and the margin is lowered by
    1e-10 of the largest logit and by twice what the logits differ from those in the model's own
    precision: the same rounding may happen at x + δ. That is no proof for what is computed in
    float32 at the last digits of a radius. A sample is right if it is in both precisions. The model
    is left as it was.

    Args:
        model: gives logits (B, K), a tensor or `.logits`; made of what `lipschitz_bound` knows.
        x: (B, *shape), floating point, in the dtype of the model.
        y: (B,) integer labels.
        norm: "l2" or "linf".
        lipschitz: a bound of the l2 Lipschitz constant from x to all the logits, known otherwise;
            L_yk is then √2 times it. None: `margin_bounds`, computed in float64.
        chunk: samples at a time; None: all.

    Raises:
        FlexureError: a network without a bound, with the reason of `lipschitz_bound`; one that is
            random, keeps count of its calls, or mixes samples; or inputs, labels, outputs or
            settings that do not fit.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2, bias=False).double()
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.eye(2))
        >>> x = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
        >>> found = certified_radius(model, x, torch.tensor([0, 0]))
        >>> [round(r, 6) for r in found.radius.tolist()]  # to the line x_1 = x_2; and a wrong one
        [1.414214, 0.0]
        >>> found.certified_accuracy(1.0)
        0.5
    """
    _check(model, x, y, norm, lipschitz)
    check_positive(chunk=chunk)
    x, y = x.detach(), y.detach().to(x.device).long()
    bounds = _known(lipschitz) if lipschitz is not None else _found(model, x.shape[1:])
    factor = RADII[norm](math.prod(x.shape[1:]))
    run = partial(_certified, model, bounds, norm, factor)
    with measuring(model), torch.no_grad():
        parts = [run(x[rows], y[rows]) for rows in pieces(len(x), chunk)]
    return Certificates.joined(parts)


def _check(model: Any, x: Any, y: Any, norm: Any, lipschitz: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FlexureError(f"expected a torch.nn.Module, got {type(model).__name__}; wrap it")
    if not isinstance(norm, str) or norm not in RADII:
        raise FlexureError(f"expected norm to be one of {', '.join(RADII)}, got {norm!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FlexureError(f"expected inputs (B, *shape), a floating-point tensor, got {got}")
    whole = isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex()
    if not whole or y.shape != x.shape[:1]:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise FlexureError(f"expected {len(x)} integer labels, a tensor, got {got}; one a sample")
    if lipschitz is not None and (not is_number(lipschitz) or not 0 <= lipschitz < math.inf):
        raise FlexureError(
            f"expected lipschitz to be a finite number of at least 0, got {lipschitz!r}; None: the "
            f"bound is computed"
        )


def _known(lipschitz: float) -> MarginBounds:
    constant = torch.tensor(math.sqrt(2.0) * lipschitz, dtype=torch.float64)
    return MarginBounds(float(lipschitz), lambda label: constant)


def _found(model: nn.Module, shape: Sequence[int]) -> MarginBounds:
    """The bounds of the network with float64 copies of its weights, as its logits are computed."""
    found: list[MarginBounds] = []
    with measuring(model):
        bounded(model, shape, LipschitzBounding, lambda logits: None)  # errors by its own paths
        in_float64(model, lambda: found.append(margin_bounds(model, shape)))
    return found[0]


def _certified(
    model: nn.Module, bounds: MarginBounds, norm: str, factor: float, x: Tensor, y: Tensor
) -> Certificates:
    """The certificates of one batch; `factor` turns an l2 radius into one in the norm."""
    own, wide, alone = _logits(model, x, y)
    known = own.isfinite().all(1) & wide.isfinite().all(1)
    correct = known & (own.argmax(1) == y) & (wide.argmax(1) == y)
    doubt = 2 * (own - wide).abs().amax(1) + ROUNDING * wide.abs().amax(1)
    finite = known[: len(alone)]
    _check_alone(alone[finite], wide[: len(alone)][finite])
    gaps = wide.gather(1, y[:, None]) - wide - doubt[:, None]
    gaps = gaps.scatter(1, y[:, None], math.inf)
    constants = torch.ones_like(gaps)
    for label in set(y.tolist()):
        constants[y == label] = bounds.of_label(label).to(gaps.device)
    radii = torch.where(gaps > 0, gaps / constants, 0.0)
    return Certificates(
        converged=known,
        correct=correct,
        radius=torch.where(correct, SHAVED * factor * radii.amin(1), 0.0),
        margin=gaps.amin(1),
        norm=norm,
        lipschitz=bounds.logits,
    )


def _check_alone(alone: Tensor, batch: Tensor) -> None:
    """Refuses logits (n, K) of samples in a batch that are not those of each sample alone.

    Raises:
        FlexureError: they are not.
    """
    largest = (alone - batch).abs().amax(1)
    if not bool((largest <= SAME * batch.abs().amax(1)).all()):
        raise FlexureError(
            f"expected logits that depend on their sample alone and are the same at each call, got "
            f"ones that differ by up to {float(largest.max()):.3g} between a sample alone and in "
            f"its batch; remove what mixes samples (statistics over the batch), what is random, "
            f"and what counts calls"
        )


def _logits(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: (B, K) computed in the model's own precision, and in float64; (n, K) alone."""
    wide: list[Tensor] = []

    def run() -> None:
        given = x.double()
        rows = [given, *torch.split(given[:ALONE], 1)]
        wide.extend(check_logits(logits_of(_called(model, each.clone())), None) for each in rows)

    with nothing_drawn(model, x.device):
        own = check_logits(logits_of(_called(model, x.clone())), y)
        in_float64(model, run)
    return own.double(), wide[0], torch.cat(wide[1:])


def _called(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except FlexureError:
        raise
    except Exception as error:
        raise FlexureError(
            f"expected a model that takes inputs {tuple(x.shape)} of {x.dtype}, got an error "
            f"({error}); give inputs of the model's shape and dtype"
        ) from error
