"""Whether derivatives agree with difference quotients, and when a disagreement accuses.

How either is computed is the business of `measure/checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexure.contracts import FlexureError

__all__ = ["Pair"]

TOLERANCE = 0.01
"""Relative disagreement at which a derivative is wrong; that of a right one is far less."""

CONSISTENT = 0.1
"""A difference quotient accuses only where its own two versions are this much closer."""


@dataclass(frozen=True)
class Pair:
    """A derivative and the difference quotient that it is held against.

    Attributes:
        quotient: (n, d).
        derivative: (n, d).
        noise: (n, 1) how far rounding alone may move the quotient.
        bend: (n, d) half the difference of the two one-sided quotients, zero unless the point is
            on a kink.
    """

    quotient: Tensor
    derivative: Tensor
    noise: Tensor
    bend: Tensor

    @property
    def larger(self) -> Tensor:
        """(n,) the larger norm of the two."""
        return torch.maximum(self.quotient.norm(dim=1), self.derivative.norm(dim=1))

    @property
    def apart(self) -> Tensor:
        """(n,) the norm of the difference."""
        difference: Tensor = torch.linalg.vector_norm(self.quotient - self.derivative, dim=1)
        return difference

    @property
    def wrong(self) -> Tensor:
        """(n,) bool, where they disagree."""
        return self.apart.gt(TOLERANCE * self.larger + self.noise[:, 0])

    @property
    def agree(self) -> Tensor:
        """(n,) bool, where they are the same and not zero."""
        return ~self.wrong & (self.larger > self.noise[:, 0])

    def refuse_most(self, shorter: Tensor, message: str) -> None:
        """Raises if most of the samples where not both sides are zero are surely wrong.

        A sample is not sure where one-sided quotients differ, or those of a shorter step (n, d).
        """
        doubt = torch.maximum((self.quotient - shorter).norm(dim=1), self.bend.norm(dim=1))
        sure = doubt <= CONSISTENT * self.apart
        accused = self.wrong & sure
        others = ~accused & (self.larger > self.noise[:, 0])
        if accused.sum() > others.sum():
            worst = (self.apart / self.larger)[accused].max()
            raise FlexureError(
                message.format(worst=worst, count=int(accused.sum()), total=len(accused))
            )
