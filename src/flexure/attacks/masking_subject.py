"""The network that `masking_report` looks at, with its samples: values, gradients and attacks.

What is concluded from them is the checks' business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from flexure.attacks.bounded import limits_of
from flexure.attacks.checks import checked
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.evaluate import robust_accuracy
from flexure.calling import check_logits, logits_of, margin
from flexure.contracts import Attack

__all__ = ["LOSSES", "Subject"]

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": lambda z, y: F.cross_entropy(z.float(), y, reduction="none"),
    "margin": lambda z, y: -margin(z, y),
}
"""Name -> (logits (B, K), labels) -> (B,), what attacks ascend: the cross-entropy in float32, as
attackers see it, and the log-odds −m of a wrong class, of which it is the softplus."""


@dataclass(frozen=True)
class Subject:
    """A network and the samples at which it is looked at; used inside `measuring`.

    Attributes:
        model: the network.
        x: (B, *shape) inputs.
        y: (B,) int64 labels.
        norm: of the radius.
        eps: the radius.
        seed: of everything random.
        batch_size: samples at a time.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: float
    seed: int
    batch_size: int

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value of inputs."""
        return limits_of(self.model, self.x.dtype)

    def of(self, rows: Tensor) -> Self:
        """The same with some of the samples."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def seeded(self, key: int) -> int:
        """A seed of its own for each use."""
        words = [self.seed % 2**64, key]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def generator(self, key: int) -> SampleGenerators:
        """Generators of its own for each use, one a sample."""
        return SampleGenerators((self.seed, key), torch.arange(len(self.x)))

    def logits(self, x: Tensor | None = None) -> Tensor:
        """(N, K) at the samples, or at other inputs (N, *shape)."""
        at = self.x if x is None else x
        with torch.no_grad():
            parts = [
                check_logits(logits_of(self.model(part.clone())), None).detach()
                for part in torch.split(at, self.batch_size)
            ]
        return torch.cat(parts)

    def right(self, x: Tensor | None = None) -> Tensor:
        """(B,) whether predictions are labels, at the samples or at versions of them."""
        logits = self.logits(x)
        return logits.isfinite().all(1) & (logits.argmax(1) == self.y)

    def gradient(self, loss: str) -> Tensor | None:
        """(B, *shape), of one of `LOSSES` in the input; None: the network lets none through."""
        parts = []
        with torch.enable_grad():
            for x, y in zip(
                torch.split(self.x, self.batch_size),
                torch.split(self.y, self.batch_size),
                strict=True,
            ):
                part = _gradient(self.model, x, y, LOSSES[loss])
                if part is None:
                    return None
                parts.append(part)
        return torch.cat(parts)

    def withstands(self, attack: Attack, key: int, eps: float | None = None) -> Tensor:
        """(B,) whether samples are right at what an attack finds, scored by the harness."""
        if not len(self.x):
            return torch.zeros(0, dtype=torch.bool, device=self.x.device)
        radius = self.eps if eps is None else eps
        size, seed = self.batch_size, self.seeded(key)
        return robust_accuracy(
            self.model, self.x, self.y, attack=attack, eps=radius, seed=seed, batch_size=size
        ).robust

    def crafted(self, attack: Attack, key: int) -> Tensor:
        """(B, *shape) what an attack on this network makes of each sample, right or not."""
        parts = []
        for rows in torch.split(torch.arange(len(self.x)), self.batch_size):
            x, y = self.x[rows], self.y[rows]
            own = SampleGenerators((self.seed, key), rows)
            made = attack.run(self.model, x.clone(), y, eps=self.eps, generator=own)
            name = type(attack).__name__
            found = checked(made, name, x, norm=self.norm, eps=self.eps, limits=self.limits)
            parts.append(found)
        return torch.cat(parts)


def _gradient(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | None:
    at = x.detach().clone().requires_grad_(True)
    try:
        value = loss(check_logits(logits_of(model(at.clone())), y), y).sum()
        if not value.requires_grad:
            return None
        (found,) = torch.autograd.grad(value, at, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operator without derivative, or NumPy on a tensor with a graph
        return None
    return None if found is None else found.detach()
