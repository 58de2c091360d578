"""Projected gradient ascent on the cross-entropy (Madry et al. 2018), l2 and l_inf.

What is made of its results, and whether they are right, is `evaluate`'s business.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Generator, Tensor, nn

from flexure.attacks.bounded import limits_of
from flexure.attacks.draws import normal, uniform
from flexure.attacks.norms import check_eps, norm_named, precise, project, unusable
from flexure.calling import check_logits, logits_of, margin
from flexure.contracts import FlexureError

__all__ = ["PGD"]


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent: x ← P(x + s · direction(∇ cross-entropy)), `steps` times.

    P projects exactly on the ball of radius eps and the bounds together; the direction is that of
    steepest ascent in the norm: the normalised gradient (l2) or its sign (linf). The gradient is
    taken of −m, m the margin (`calling.margin`): the cross-entropy is softplus(−m), so that both
    have the same direction, but that of −m does not vanish where a network is sure. Where it is
    zero or not finite all the same, the step goes along a random direction, the same one throughout
    a restart. PGD warns of samples where it was so at every step: nothing was followed there.

    A sample's result is, of all points visited, a misclassified one of largest cross-entropy, or
    without such one the one of largest cross-entropy. Samples that are misclassified take part in
    no further restart.

    In l2 the path of constant steps ends a little below the best point, even of a linear model, and
    more so where bounds are met: a smaller step, or restarts, come closer.

    Attributes:
        norm: "l2" or "linf".
        steps: gradients a restart. 40 is what `flexure` uses for the tables of Srinivas et al.
            2022, who do not state theirs.
        step_size: as a share of eps; None: 2.5 / steps, so that any point of the ball can be
            reached from any other (Madry et al. 2018, appendix).
        random_start: uniformly in the ball; False: the first of the restarts starts at x.
        restarts: how often to start, at least 1.
        until_misclassified: leave a sample at the first misclassified point: cheaper, and equal for
            an accuracy of a model that treats samples alone.
        keep: "best" as said; "last": where the only restart ends, which saves one call of the
            model: what adversarial training does.

    Raises:
        FlexureError: a setting that does not fit.
    """

    norm: str = "l2"
    steps: int = 40
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    until_misclassified: bool = False
    keep: str = "best"

    def __post_init__(self) -> None:
        norm_named(self.norm)
        for name, value in (("steps", self.steps), ("restarts", self.restarts)):
            if type(value) is not int or value < 1:
                raise FlexureError(f"expected {name} of at least 1, an integer, got {value!r}")
        if type(self.random_start) is not bool or type(self.until_misclassified) is not bool:
            raise FlexureError(
                f"expected random_start and until_misclassified to be True or False, got "
                f"{self.random_start!r} and {self.until_misclassified!r}"
            )
        if self.step_size is not None and not _above_zero(self.step_size):
            raise FlexureError(
                f"expected step_size above 0, as a share of eps, got {self.step_size!r}; None: "
                f"2.5 / steps"
            )
        if self.keep not in ("best", "last"):
            raise FlexureError(f"expected keep to be 'best' or 'last', got {self.keep!r}")
        if self.keep == "last" and (self.restarts > 1 or self.until_misclassified):
            raise FlexureError(
                "expected one restart until its end where the last point is kept, got restarts or "
                "until_misclassified; choose keep='best'"
            )

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator: Generator
    ) -> Tensor:
        """Inputs near x that the model gets wrong, where they are found.

        The model is called as it is: in its mode, with whatever it writes (see `robust_accuracy`
        and `Adversarial`, which put that back).

        Args:
            model: gives logits (B, K); inputs stay within its attribute `bounds`, if it has one.
            x: (B, *shape) within these bounds.
            y: (B,) int64 labels.
            eps: the radius, in units of x.
            generator: of the CPU. It is drawn from in the order of the batch, twice a restart; of
                `draws.SampleGenerators` each sample has its own draws.

        Returns:
            (B, *shape) within eps of x and within the bounds.

        Raises:
            FlexureError: outputs that are no logits of at least 2 classes, labels out of range, or
                a model that cannot be differentiated in its input.
        """
        norm, radius = norm_named(self.norm), check_eps(eps)
        search = _Search(model, x.detach(), y, self.norm, radius, limits_of(model, x.dtype))
        for number in range(self.restarts):
            point = norm.point(normal(x.shape, generator), uniform(x.shape[:1], generator))
            point = point.to(search.origin)
            start = point if self.random_start or number else torch.zeros_like(point)
            self._restart(search, radius * start, norm.direction(point))
        search.tell_blind()
        return search.best

    def _restart(self, search: _Search, start: Tensor, fallback: Tensor) -> None:
        """Goes up from x + start, for the samples that are not misclassified yet."""
        step = search.eps * (2.5 / self.steps if self.step_size is None else self.step_size)
        rows = (~search.wrong).nonzero().flatten()
        at = search.projected(search.origin[rows] + start[rows], rows)
        for _ in range(self.steps):
            if not len(rows):
                return
            gradient = search.look(at, rows, keep=self.keep == "best")
            if self.until_misclassified:
                left = ~search.wrong[rows]
                rows, at, gradient = rows[left], at[left], gradient[left]
            direction = norm_named(self.norm).direction(gradient)
            stuck = (direction == 0).flatten(1).all(1)
            direction[stuck] = fallback[rows[stuck]]
            at = search.projected(at + step * direction, rows)
        if self.keep == "last":
            search.best[rows] = search.held(at, rows)
        elif len(rows):
            search.look(at, rows, keep=True, last=True)


def _above_zero(share: Any) -> bool:
    number = isinstance(share, Real) and not isinstance(share, bool)
    return number and 0 < share < torch.inf


@dataclass
class _Search:
    """Where the search for adversarial inputs of B samples stands.

    Attributes:
        origin: the inputs, in float32 at least, as is where the search stands.
        best: (B, *shape), the result.
        lowest: (B,) the margin there.
        wrong: (B,) bool, whether it is misclassified.
        followed: (B,) bool, whether a gradient gave a direction there, at any step.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: float
    limits: tuple[float, float]

    def __post_init__(self) -> None:
        self.origin = precise(self.x)
        self.best = self.x.clone()
        self.lowest = self.x.new_full((len(self.x),), torch.inf)
        self.wrong = torch.zeros_like(self.lowest, dtype=torch.bool)
        self.followed = self.wrong.clone()

    def projected(self, at: Tensor, rows: Tensor) -> Tensor:
        """The nearest points that are allowed."""
        return project(at, self.origin[rows], norm=self.norm, eps=self.eps, limits=self.limits)

    def held(self, at: Tensor, rows: Tensor) -> Tensor:
        """These points in the precision of the inputs, still allowed."""
        if at.dtype == self.x.dtype:
            return at
        return project(at, self.x[rows], norm=self.norm, eps=self.eps, limits=self.limits)

    def look(self, at: Tensor, rows: Tensor, *, keep: bool, last: bool = False) -> Tensor:
        """Keeps what is better than before; the gradient of −m, zero where it is not finite."""
        with torch.set_grad_enabled(not last):
            at = self.held(at.detach(), rows).requires_grad_(not last)
            logits = check_logits(logits_of(self.model(at.clone())), self.y[rows])
            margins = margin(logits, self.y[rows])
        if keep:
            self._take(at.detach(), logits.detach(), margins.detach(), rows)
        if last:
            return torch.zeros_like(at)
        gradient = _gradient(-margins.sum(), at).to(self.origin)
        useful = ~unusable(gradient)
        self.followed[rows] |= useful
        return torch.where(useful.view(-1, *[1] * (at.dim() - 1)), gradient, 0.0)

    def tell_blind(self) -> None:
        """Warns of samples at which no step had a gradient to follow."""
        blind = int((~self.followed).sum())
        if blind:
            warnings.warn(
                f"the gradient of the margin was zero or not finite at every step at {blind} of "
                f"{len(self.x)} samples of a batch, where PGD went along random directions; see "
                f"flexure's masking_report, and try Square",
                UserWarning,
                stacklevel=3,
            )

    def _take(self, at: Tensor, logits: Tensor, margins: Tensor, rows: Tensor) -> None:
        known = logits.isfinite().all(1)
        wrong = ~known | (logits.argmax(1) != self.y[rows])
        margins = torch.where(known, margins, -torch.inf).to(self.lowest)
        same = (wrong == self.wrong[rows]) & (margins < self.lowest[rows])
        better = same | (wrong & ~self.wrong[rows])
        self.best[rows[better]] = at[better]
        self.lowest[rows[better]] = margins[better]
        self.wrong[rows[better]] = wrong[better]


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, at, allow_unused=True) if value.requires_grad else (None,)
    if found is None:
        raise FlexureError(
            "expected a model that can be differentiated in its input, got logits without a graph "
            "to it (detach(), no_grad() or NumPy inside); its gradients say nothing of its "
            "robustness: attack without gradients, or a model that lets them through"
        )
    return found
