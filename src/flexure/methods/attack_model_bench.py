"""Running attacks radius after radius: survivors are handed on, adversarial examples kept.

How inputs are attacked and scored is `attacks`' business; what is asked for, `attack_model.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexure.attacks.bounded import Bounded
from flexure.attacks.evaluate import Robustness, robust_accuracy
from flexure.attacks.published import PublishedRobustness
from flexure.calling import evaluating, logits_of
from flexure.contracts import Attack, FlexureError
from flexure.methods.attack_model_result import (
    AdversarialExamples,
    AttackedAt,
    AttackedModel,
    AttackStage,
    radius_text,
)
from flexure.progress import ProgressReporter

__all__ = ["Bench", "Task", "check_unused"]


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


@dataclass(frozen=True)
class _Run:
    """One model under one task.

    Attributes:
        folder: how its folders of finished batches begin.
        name: of the model.
        model: with its bounds.
        task: what it is attacked with.
        clean: (N,) bool, right without an attack.
    """

    folder: str
    name: str
    model: Bounded
    task: Task
    clean: Tensor


class Bench:
    """Attacks one model after another on the same samples.

    Args:
        tasks: what to attack with.
        x: (N, *shape), within the bounds.
        y: (N,) labels.
        seed: of everything random.
        batch_size: samples at a time; None: all.
        every: whether each attack is run on all samples that are right, survivors or not.
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
        every: bool,
        keep: int,
        store: Path | None,
        reporter: ProgressReporter,
    ) -> None:
        self._tasks, self._x, self._y = tasks, x, y
        self._seed, self._batch_size, self._every, self._keep = seed, batch_size, every, keep
        self._store, self._reporter = store, reporter

    def attacked(
        self, place: int, name: str, model: Bounded
    ) -> tuple[AttackedModel, AdversarialExamples]:
        """All radii of all norms, and the first adversarial examples.

        Args:
            place: of the model among all.
            name: of it.
            model: with its bounds.
        """
        clean = self._clean(model)
        at: list[AttackedAt] = []
        kept: list[_Kept] = []
        for task in self._tasks:
            run = _Run(f"{place}-{task.protocol}-{task.norm}", name, model, task, clean)
            left, beaten = clean, dict[str, Tensor]()
            for eps in task.radii:
                found, adversarial = self._radius(run, eps, left, beaten)
                left = found.robust if task.carries else clean
                at.append(found)
                kept += adversarial
        return AttackedModel(name, clean, tuple(at)), self._examples(model, kept)

    def _clean(self, model: Bounded) -> Tensor:
        """(N,) bool, right without an attack; checks model and data on the way."""
        found = robust_accuracy(
            model, self._x, self._y, attack="pgd", norm="linf", eps=0.0, seed=self._seed,
            batch_size=self._batch_size,
        )  # fmt: skip
        return found.clean.cpu()

    def _radius(
        self, run: _Run, eps: float, left: Tensor, beaten: dict[str, Tensor]
    ) -> tuple[AttackedAt, list[_Kept]]:
        """All attacks at one radius, on those that are left.

        What each attack alone has `beaten` is brought up to date.
        """
        task, clean = run.task, run.clean
        rows = (clean if self._every else left).nonzero().flatten()
        carried = int((clean & ~left).sum())
        if not len(rows):
            return AttackedAt(task.norm, eps, left, (), carried, task.protocol), []
        found = self._evaluated(run, eps, rows)
        stages = self._stages(run, found, rows, left, beaten)
        robust = stages[-1].robust
        kept = self._kept(found, rows, stages, left, task, eps)
        reached = None
        if isinstance(found, PublishedRobustness):
            reached = (found.largest, found.largest_in_pixels)
        at = AttackedAt(task.norm, eps, robust, stages, carried, task.protocol, reached)
        return at, kept

    def _evaluated(self, run: _Run, eps: float, rows: Tensor) -> Robustness:
        task, told = run.task, f"{run.name}: {run.task.norm} {radius_text(eps, run.task.norm)}"
        here = rows.to(self._x.device)
        return robust_accuracy(
            run.model,
            self._x[here],
            self._y[here],
            attack=list(task.attacks),
            norm=task.norm,
            eps=eps,
            seed=self._seed,
            batch_size=self._batch_size,
            every=self._every,
            resume=None if self._store is None else self._store / f"{run.folder}-{eps:.8g}.attack",
            progress=lambda stage, done, total: self._reporter(f"{told}, {stage}", done, total),
            **({} if task.carries else {"protocol": task.protocol}),
        )

    def _stages(
        self,
        run: _Run,
        found: Robustness,
        rows: Tensor,
        left: Tensor,
        beaten: dict[str, Tensor],
    ) -> tuple[AttackStage, ...]:
        """What each attack did, on the places of all samples."""
        stages = []
        nobody = torch.zeros_like(left)
        robust = left.clone()
        robust[rows] &= found.clean.cpu()  # of a random network: right before, wrong now
        for one in found.attacks:
            tried, here = nobody.clone(), nobody.clone()
            tried[rows], here[rows] = one.tried.cpu(), one.beaten.cpu()
            robust = robust & ~here
            before = beaten.get(one.name, nobody) if run.task.carries else nobody
            beaten[one.name] = here | before
            alone = run.clean & ~beaten[one.name] if self._every else None
            told = (one.seconds, alone, one.warnings)
            stages.append(AttackStage(one.name, robust, tried, here, *told))
        return tuple(stages)

    def _kept(
        self,
        found: Robustness,
        rows: Tensor,
        stages: Sequence[AttackStage],
        left: Tensor,
        task: Task,
        eps: float,
    ) -> list[_Kept]:
        """The first adversarial versions that are new at this radius."""
        if not task.carries:
            return []
        beaten = torch.stack([stage.beaten for stage in stages]).any(0) & left
        chosen = beaten[rows].nonzero().flatten()[: self._keep]
        by = tuple(
            next(stage.name for stage in stages if bool(stage.beaten[row]))
            for row in rows[chosen].tolist()
        )
        return [_Kept(rows[chosen], found.x_adv.cpu()[chosen], task.norm, eps, by)]

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


def check_unused(mean: Any, std: Any) -> None:
    """Refuses a normalisation besides that of a `Bounded`.

    Raises:
        FlexureError: there is one.
    """
    if mean is not None or std is not None:
        raise FlexureError(
            "expected no mean and std with a Bounded, which has its own, got some; leave them out, "
            "or give the model inside"
        )
