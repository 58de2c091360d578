"""Running attacks radius after radius: survivors are handed on, adversarial examples kept.

How inputs are attacked and scored is `attacks`' business; what is asked for, `attack_model.py`'s.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexure.attacks.bounded import Bounded
from flexure.attacks.evaluate import Robustness, robust_accuracy
from flexure.calling import evaluating, logits_of
from flexure.contracts import Attack
from flexure.methods.attack_model_result import (
    AdversarialExamples,
    AttackedAt,
    AttackedModel,
    AttackStage,
    radius_text,
)
from flexure.progress import ProgressReporter

__all__ = ["Bench", "Task"]


@dataclass(frozen=True)
class Task:
    """One norm with its radii, increasing, and the attacks, by one protocol."""

    norm: str
    radii: tuple[float, ...]
    attacks: tuple[str | Attack, ...]
    protocol: str = "standard"

    @property
    def carries(self) -> bool:
        """Whether what beats a model within a radius does so within every larger one."""
        return self.protocol == "standard"


@dataclass(frozen=True)
class _Kept:
    """Adversarial versions that one attack run found."""

    rows: Tensor
    x_adv: Tensor
    norm: str
    eps: float
    attacks: tuple[str, ...]


class Bench:
    """Attacks one model after another on the same samples.

    Args:
        tasks: what to attack with.
        x: (N, *shape), within the bounds.
        y: (N,) labels.
        seed: of everything random.
        batch_size: samples at a time; None: all.
        keep: adversarial examples of each model and norm.
        store: folder of finished parts; None: none are kept.
        reporter: is told how far it is.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        x: Tensor,
        y: Tensor,
        *,
        seed: int,
        batch_size: int | None,
        keep: int,
        store: Path | None,
        reporter: ProgressReporter,
    ) -> None:
        self._tasks, self._x, self._y = tasks, x, y
        self._seed, self._batch_size, self._keep = seed, batch_size, keep
        self._store, self._reporter = store, reporter

    def attacked(self, name: str, model: Bounded) -> tuple[AttackedModel, AdversarialExamples]:
        """All radii of all norms, and the first adversarial examples."""
        clean = self._clean(model)
        at: list[AttackedAt] = []
        kept: list[_Kept] = []
        total = sum(len(task.radii) for task in self._tasks)
        for task in self._tasks:
            left = clean
            for eps in task.radii:
                stage = f"{name}: {task.norm} {radius_text(eps, task.norm)}"
                self._reporter(stage, len(at), total)
                robust, stages, found = self._radius(name, model, task, eps, left)
                carried = int((clean & ~left).sum())
                at.append(AttackedAt(task.norm, eps, robust, stages, carried, task.protocol))
                self._reporter(stage, len(at), total)
                if task.carries:
                    left, kept = robust, [*kept, *found]
        return AttackedModel(name, clean, tuple(at)), self._examples(model, kept)

    def _clean(self, model: Bounded) -> Tensor:
        """(N,) bool, right without an attack; checks model and data on the way."""
        found = robust_accuracy(
            model, self._x, self._y, attack="pgd", norm="linf", eps=0.0, seed=self._seed,
            batch_size=self._batch_size,
        )  # fmt: skip
        return found.clean.cpu()

    def _radius(
        self, name: str, model: Bounded, task: Task, eps: float, left: Tensor
    ) -> tuple[Tensor, tuple[AttackStage, ...], list[_Kept]]:
        """(N,) bool, right at this radius too; what each attack did; what beats the model."""
        rows = left.nonzero().flatten()
        if not len(rows):
            return left, (), []
        here = rows.to(self._x.device)
        start = time.perf_counter()
        found = robust_accuracy(
            model,
            self._x[here],
            self._y[here],
            attack=list(task.attacks),
            norm=task.norm,
            eps=eps,
            seed=self._seed,
            batch_size=self._batch_size,
        )
        stages = self._stages(found, task, rows, time.perf_counter() - start)
        robust = torch.zeros_like(left)
        robust[rows] = found.robust.cpu()
        beaten = (~found.robust.cpu()).nonzero().flatten()[: self._keep]
        by = tuple(
            next(s.name for s in stages if bool(s.tried[row]) and not bool(s.robust[row]))
            for row in rows[beaten].tolist()
        )
        kept = _Kept(rows[beaten], found.x_adv.cpu()[beaten], task.norm, eps, by)
        return robust, stages, [kept] if len(beaten) else []

    def _stages(
        self, found: Robustness, task: Task, rows: Tensor, seconds: float
    ) -> tuple[AttackStage, ...]:
        """What each attack did, on the places of all samples."""
        nobody = torch.zeros(len(self._y), dtype=torch.bool)
        robust, tried = nobody.clone(), nobody.clone()
        robust[rows], tried[rows] = found.robust.cpu(), True
        told = " + ".join(
            each if isinstance(each, str) else type(each).__name__ for each in task.attacks
        )
        return (AttackStage(told, robust, tried, seconds),)

    def _examples(self, model: Bounded, kept: Sequence[_Kept]) -> AdversarialExamples:
        """The first ones of each norm."""
        flat = [
            (int(row), x_adv, part.norm, part.eps, by)
            for part in kept
            for row, x_adv, by in zip(part.rows, part.x_adv, part.attacks, strict=True)
        ]
        places: Counter[str] = Counter()
        chosen = []
        for one in flat:
            places[one[2]] += 1
            chosen += [one] if places[one[2]] <= self._keep else []
        rows = torch.tensor([one[0] for one in chosen], dtype=torch.int64)
        x, labels = self._x.cpu()[rows], self._y.cpu()[rows]
        x_adv = torch.stack([one[1] for one in chosen]) if chosen else x.clone()
        return AdversarialExamples(
            x,
            x_adv,
            labels,
            self._predictions(model, x),
            self._predictions(model, x_adv),
            rows,
            tuple(one[2] for one in chosen),
            tuple(one[3] for one in chosen),
            tuple(one[4] for one in chosen),
            model.bounds,
        )

    def _predictions(self, model: Bounded, x: Tensor) -> Tensor:
        """(K,) classes; -1 where the logits are not finite."""
        if not len(x):
            return torch.zeros(0, dtype=torch.int64)
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(x.to(self._x.device)))
        return torch.where(logits.isfinite().all(1), logits.argmax(1), -1).cpu()
