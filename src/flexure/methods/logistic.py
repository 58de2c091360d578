"""Ridge multinomial logistic regression for a batch of problems at once, to convergence.

The solver only: what the features are, how strong the ridge is and which fit is kept is decided
in `probe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Solution", "minimise", "solve", "with_ones"]

_MAX_PRODUCTS = 200  # Hessian-vector products per Newton step; a safety net, never the usual end
_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant, Nocedal and Wright (2006), section 3.1
_HALVINGS = 30


@dataclass(frozen=True)
class Solution:
    """Where the solver stopped.

    Attributes:
        theta: (K, C, D + 1), the last column is the bias.
        gradient: (K,), largest absolute entry of the objective's gradient.
        converged: (K,) bool, `gradient` is at most the tolerance.
        iterations: Newton steps taken.
    """

    theta: Tensor
    gradient: Tensor
    converged: Tensor
    iterations: int


def minimise(
    x: Tensor,
    labels: Tensor,
    *,
    ridge: float,
    start: Tensor,
    tolerance: float,
    max_iterations: int = 100,
) -> Solution:
    """Minimises mean cross-entropy + ridge/2 · ‖W‖² for every problem in the batch.

    The objective of problem k is 1/N Σ_n [logsumexp_c z_nc − z_n,y(n)] + ridge/2 Σ_cd W_cd²,
    z = W x + b; the bias is not penalised. Newton's method, its linear system solved to a falling
    tolerance by conjugate gradients (Nocedal and Wright, 2006, algorithm 7.1) and safeguarded by
    Armijo's rule. The preconditioner takes the Hessian for block-diagonal with blocks
    mean(p_c(1−p_c)) · XᵀX/N + ridge, of which it uses the diagonal: all of it if the columns of
    `x` are uncorrelated.

    Args:
        x: (K, N, D + 1) features, the last column ones (`with_ones`). The arithmetic is done in
            its dtype; the objective's sums are float64.
        labels: (N,) int64 in range(C), shared by all problems.
        ridge: strength of the penalty, >= 0.
        start: (K, C, D + 1).
        tolerance: stop a problem when no entry of its gradient is larger.
        max_iterations: Newton steps at most.
    """
    objective = _Objective(x, labels, start.shape[1], ridge)
    theta, steps = start.clone(), 0
    while True:
        z, p, gradient = objective.at(theta)
        size = gradient.abs().amax((1, 2))
        active = size > tolerance
        if steps == max_iterations or not bool(active.any()):
            break
        step = _newton_step(objective, p, gradient, tolerance)
        length = _line_search(objective, theta, z, gradient, step, active)
        if not bool(length.any()):  # no descent left at this precision
            break
        theta += length[:, None, None] * step
        steps += 1
    return Solution(theta, size, ~active, steps)


def solve(
    x: Tensor,
    labels: Tensor,
    *,
    ridge: float,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """`minimise`, with the last steps in float64 where the rounding of `x` stands in the way.

    Returns:
        Parameters (K, C, D + 1), and which of them met the tolerance, (K,) bool.
    """
    first = minimise(
        x, labels, ridge=ridge, start=start, tolerance=tolerance, max_iterations=max_iterations
    )
    theta, converged = first.theta, first.converged
    if x.dtype == torch.float64:
        return theta, converged
    for k in (~converged).nonzero().flatten().tolist():
        one = slice(k, k + 1)
        last = minimise(
            x[one].double(),
            labels,
            ridge=ridge,
            start=theta[one].double(),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        theta[one], converged[one] = last.theta.to(theta), last.converged
    return theta, converged


def with_ones(features: Tensor) -> Tensor:
    """(..., D) -> (..., D + 1): the column that carries the bias."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)


class _Objective:
    """Value, gradient and Hessian products. Classes come before samples in every array.

    A softmax over the last, short dimension is some 20 times slower on CPUs than over a middle one.
    """

    def __init__(self, x: Tensor, labels: Tensor, classes: int, ridge: float) -> None:
        self.x, self.xt, self.n, self.ridge = x, x.transpose(1, 2), x.shape[1], ridge
        self.index = labels.expand(x.shape[0], 1, -1)
        self.onehot = torch.nn.functional.one_hot(labels, classes).T.to(x)
        self.penalty = torch.full_like(x[0, 0], ridge)
        self.penalty[-1] = 0.0
        self.second_moment = (x * x).mean(1)[:, None]  # (K, 1, D + 1)

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (K, C, N), probabilities (K, C, N), gradient (K, C, D + 1)."""
        z = theta @ self.xt
        p = z.softmax(1)
        return z, p, (p - self.onehot) @ self.x / self.n + self.penalty * theta

    def value(self, z: Tensor, theta: Tensor) -> Tensor:
        """(K,) float64."""
        loss = z.logsumexp(1) - z.gather(1, self.index)[:, 0]
        square = theta[..., :-1].double().square().sum((1, 2))
        return loss.mean(1, dtype=torch.float64) + 0.5 * self.ridge * square

    def product(self, p: Tensor, v: Tensor) -> Tensor:
        """Hessian times v: (K, C, D + 1)."""
        weighted = p * (v @ self.xt)
        weighted -= p * weighted.sum(1, keepdim=True)
        return weighted @ self.x / self.n + self.penalty * v

    def preconditioner(self, p: Tensor) -> Tensor:
        """Approximate diagonal of the Hessian, (K, C, D + 1), positive."""
        spread = (p - p * p).mean(2)[..., None]
        diagonal = spread * self.second_moment + self.penalty
        return diagonal.clamp_min(torch.finfo(p.dtype).tiny ** 0.5)


def _newton_step(objective: _Objective, p: Tensor, gradient: Tensor, tolerance: float) -> Tensor:
    """Solves H step = −gradient roughly; problems that are done stand still meanwhile."""
    inverse = objective.preconditioner(p).reciprocal()
    size = gradient.abs().amax((1, 2))
    # Superlinear convergence, but nothing below what ends the whole iteration.
    goal = torch.maximum(size * size.sqrt().clamp_max(0.3), torch.full_like(size, 0.3 * tolerance))
    step, residual = torch.zeros_like(gradient), -gradient
    preconditioned = inverse * residual
    direction, rho = preconditioned, _dot(residual, preconditioned)
    for _ in range(_MAX_PRODUCTS):
        active = (residual.abs().amax((1, 2)) > goal)[:, None, None]
        if not bool(active.any()):
            break
        product = objective.product(p, direction)
        curvature = _dot(direction, product)
        usable = active & (curvature > 0)
        if not bool(usable.any()):
            break
        alpha = torch.where(usable, rho / curvature, 0.0)
        step = step + alpha * direction
        residual = residual - alpha * product
        preconditioned = inverse * residual
        previous, rho = rho, _dot(residual, preconditioned)
        direction = preconditioned + torch.where(usable, rho / previous, 0.0) * direction
    return step


def _line_search(
    objective: _Objective, theta: Tensor, z: Tensor, gradient: Tensor, step: Tensor, active: Tensor
) -> Tensor:
    """(K,) step lengths 1, 1/2, 1/4, ... that decrease the objective enough; 0 where none does."""
    dz = step @ objective.xt
    before = objective.value(z, theta)
    slope = _dot(gradient, step)[:, 0, 0].double()
    # Below the rounding of the logits a decrease cannot be seen.
    rounding = torch.finfo(z.dtype).eps * (1.0 + before.abs())
    length = torch.where(active, 1.0, 0.0).to(z.dtype)
    for _ in range(_HALVINGS):
        t = length[:, None, None]
        after = objective.value(z + t * dz, theta + t * step)
        allowed = before + _SUFFICIENT_DECREASE * length * slope + rounding
        refused = (length > 0) & ~(after <= allowed)
        if not bool(refused.any()):
            return length
        length = torch.where(refused, 0.5 * length, length)
    return torch.where(refused, 0.0, length)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(K, 1, 1) inner products."""
    return (a * b).sum((1, 2), keepdim=True)
