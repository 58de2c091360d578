"""Attacks in rounds: each gets the samples that are left, in full batches, over all processes.

What happens to one batch is `harness`'s business; what is made of the result, its reader's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from flexure.attacks.harness import Found, Harness
from flexure.attacks.kept import KeptBatches, histories, key_of
from flexure.attacks.norms import norm_named
from flexure.attacks.robustness import Robustness, distinct
from flexure.contracts import Attack, DataError, FlexureError
from flexure.processes import Processes

__all__ = ["Rounds"]

_Value = TypeVar("_Value")

_ANY = 1 / 2
"""Rounding changes a sample's logits by less than this power of the precision, relatively."""

_MEAN = 2 / 3
"""The same, for the mean over samples."""


@dataclass(frozen=True)
class Rounds:
    """An evaluation on given data.

    Attributes:
        harness: a model and a ball.
        x: (B, *shape).
        y: (B,) int64 labels, where x is.
        size: samples at a time.
        processes: each takes whole batches, in turn.
        report: is told (stage, done, total).
        kept: finished batches on disk, or None.
    """

    harness: Harness
    x: Tensor
    y: Tensor
    size: int
    processes: Processes
    report: Callable[[str, int, int], None]
    kept: KeptBatches | None

    def run(self, names: Sequence[str], attacks: Sequence[Attack], *, every: bool) -> Robustness:
        """The worst case over the attacks, one after the other.

        Args:
            names: of the attacks.
            attacks: in their order.
            every: whether each is run on all samples that are right without an attack; otherwise
                on those that withstood all attacks before it.
        """
        clean = self._clean()
        robust, x_adv = clean.clone(), self.x.clone()
        tried = torch.zeros(len(clean), len(attacks), dtype=torch.bool, device=clean.device)
        beaten, seconds = tried.clone(), torch.zeros_like(tried, dtype=torch.float64)
        told: list[tuple[str, ...]] = [()] * len(attacks)
        past = list(histories(attacks, every=every))
        for place, attack in enumerate(attacks if self.harness.searches else ()):
            rows = (clean if every else robust).nonzero().flatten()
            found = self._round(place, names[place], attack, past[place], rows)
            tried[rows, place] = True
            told[place] = distinct(text for part in found for text in part.warnings)
            for part, at in zip(found, self._split(rows), strict=True):
                seconds[at, place] = part.seconds / len(at)
                left = robust[at]
                x_adv[at[left]] = part.x_adv.to(x_adv.device)[left]
                beaten[at, place] = ~part.right.to(beaten.device)
            robust &= ~beaten[:, place]
        size = norm_named(self.harness.norm).size(x_adv.double() - self.x.double())
        return Robustness(
            converged=torch.ones_like(clean), clean=clean, robust=robust, x_adv=x_adv,
            distance=size, tried_by=tried, beaten_by=beaten, seconds_by=seconds,
            norm=self.harness.norm, eps=self.harness.eps, names=tuple(names), warnings=tuple(told),
        )  # fmt: skip

    def check_same(self, parts: object) -> None:
        """Refuses other data or settings on other processes.

        Raises:
            DataError: there are some.
        """
        if len({repr(told) for told in self.processes.gathered(parts, "settings")}) > 1:
            raise DataError(
                f"expected the same model, data and settings on all {self.processes.count} "
                f"processes, got others; give the whole data to each process, unsharded and in "
                f"the same order"
            )

    def _clean(self) -> Tensor:
        """(B,) bool, whether predictions at the inputs themselves are right."""

        def scored(index: int, at: Tensor) -> Tensor:
            x, y = self.x[at], self.y[at]
            own = self.harness.scored(x, y, index=index, numbers=at)
            if self.kept is None:
                return own
            near = self.harness.scored_near(x, y, index=index, numbers=at)
            return torch.cat([own, near], 1)

        before = None if self.kept is None else self.kept.scores()
        rows = torch.arange(len(self.x), device=self.x.device)
        scores = torch.cat(self._shared(rows, "clean", scored))
        if self.kept is not None:
            if before is None:
                self.kept.put_scores(scores)
            elif not _alike(before, scores, self.x.dtype):
                raise FlexureError(
                    "expected the model that the stored batches belong to, got one of the same "
                    "weights with other logits, at the inputs or near them; give another folder to "
                    "resume from, or delete this one"
                )
            # Rounding may differ from run to run, and must not decide which samples are attacked.
            scores = scores if before is None else before
        return (scores[:, 0] > 0).to(self.x.device)

    def _round(
        self, place: int, name: str, attack: Attack, history: str, rows: Tensor
    ) -> list[Found]:
        """What one attack finds for the samples of these rows, batch by batch."""

        def attacked(index: int, at: Tensor) -> Found:
            x, y, key = self.x[at], self.y[at], key_of(name, history, index)
            found = None if self.kept is None else self.kept.get(key, x, at)
            if found is None:
                found = self.harness.attacked(attack, x, y, place=place, index=index, numbers=at)
                if self.kept is not None:
                    self.kept.put(key, found, at)
            return found

        return self._shared(rows, name, attacked)

    def _shared(
        self, rows: Tensor, stage: str, work: Callable[[int, Tensor], _Value]
    ) -> list[_Value]:
        """What is made of each batch of these rows, in their order, whichever process makes it."""
        count, own = self.processes.count, dict[int, _Value]()
        batches = self._split(rows)
        for index, at in enumerate(batches):
            if index % count == self.processes.index:
                own[index] = work(index, at)
            if index % count == count - 1:
                self.processes.wait()  # so that an error ends all soon
            self.report(stage, index + 1, len(batches))
        found: dict[int, _Value] = {}
        for each in self.processes.gathered(own, f"results of {stage}"):
            found |= each
        return [found[index] for index in sorted(found)]

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, self.size) if len(rows) else ()


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether scores (B, 3 k) are the same up to the rounding of a network in this precision.

    Differences are relative to each sample's own largest logit, so that one large sample does not
    cover the others. No sample may differ by more than a root of the precision, and their mean by
    less: rounding is rarely so large, another function is at most samples. Predictions may then
    differ only where the two largest logits are as near to each other.
    """
    if a.shape != b.shape:
        return False
    eps = torch.finfo(dtype).eps
    _, lead, size = torch.stack([a, b]).view(2, len(a), -1, 3).unbind(3)
    finite = lead.isfinite() & size.isfinite()
    change = torch.maximum((lead[0] - lead[1]).abs(), (size[0] - size[1]).abs())
    change = change / size.amax(0).clamp(min=torch.finfo(size.dtype).tiny)
    change = torch.where(finite.all(0), change, torch.where(finite.any(0), torch.inf, 0.0))
    return bool((change <= eps**_ANY).all() and (change.mean(0) <= eps**_MEAN).all())
