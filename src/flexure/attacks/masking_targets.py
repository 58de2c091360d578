"""Gradient ascent towards one wrong class after another, for `masking_report`.

The ascent itself is `pgd`'s; what is concluded from its results is the checks' business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from flexure.attacks.pgd import PGD
from flexure.calling import logits_of

__all__ = ["TargetedPGD"]


@dataclass(frozen=True)
class TargetedPGD:
    """`PGD` on z_y − z_t for each of the most likely wrong classes t at the given inputs.

    Ascent of the cross-entropy may end at one wrong class where another one could be reached, even
    of an affine network (Gowal et al. 2019; the targeted attacks of Croce and Hein 2020).

    Attributes:
        norm: "l2" or "linf".
        steps: gradients a class.
        targets: how many classes are tried, at most all.
    """

    norm: str
    steps: int
    targets: int

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator: Generator
    ) -> Tensor:
        """(B, *shape), misclassified where that was found; see `contracts.Attack`."""
        with torch.no_grad():
            logits = logits_of(model(x.clone())).scatter(1, y[:, None], -torch.inf)
        order = logits.argsort(dim=1, descending=True)
        best, fooled = x.clone(), torch.zeros_like(y, dtype=torch.bool)
        attack = PGD(self.norm, steps=self.steps)
        for place in range(min(self.targets, logits.shape[1] - 1)):
            pair = _Pair(model, torch.stack([y, order[:, place]], 1))
            found = attack.run(pair, x, torch.zeros_like(y), eps=eps, generator=generator)
            with torch.no_grad():
                wrong = logits_of(model(found.clone())).argmax(1) != y
            new = (wrong & ~fooled).view(-1, *[1] * (x.dim() - 1))
            best, fooled = torch.where(new, found, best), fooled | wrong
            if bool(fooled.all()):
                break
        return best


class _Pair(nn.Module):
    """A network's logits of two classes a sample; takes all B samples at a time."""

    def __init__(self, model: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        self.bounds = getattr(model, "bounds", None)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x)).gather(1, self.classes)
