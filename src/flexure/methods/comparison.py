"""Scores the settings of a grid: their features, computed or interpolated, and their probes.

The choice among the settings is made elsewhere, and so is everything that touches test data,
but for its labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from flexure.methods.backbone import Backbone, Clock, Dial, Pair
from flexure.methods.interpolation import held_out, interpolate, nodes
from flexure.methods.probe import Probe, fit_probes, fit_published_probes
from flexure.methods.samples import Samples
from flexure.methods.search_result import FeatureInfo, InterpolationCheck, Setting, standard_error
from flexure.progress import ProgressReporter

__all__ = ["Row", "Trainer", "compare"]

Row: TypeAlias = "tuple[tuple[float, float], ...]"
"""Settings (beta, c) of one choice of c, by ascending beta; the last is beta = 1."""

_NODES, _HELD_OUT = 5, 2
_MAX_FEATURE_ERROR = 0.1
_MAX_SCORE_ERROR = 0.5  # in standard errors: together they are 1.12 of one


class Trainer:
    """Trains the probes of many settings together, and scores them."""

    def __init__(
        self,
        splits: Mapping[str, Samples],
        protocol: str,
        seed: int,
        device: torch.device,
        clock: Clock,
        reporter: ProgressReporter,
    ) -> None:
        self._labels = {name: split.labels for name, split in splits.items()}
        self._protocol, self._seed, self._device = protocol, seed, device
        self._clock, self._reporter = clock, reporter

    def fit(self, pairs: Sequence[Pair]) -> list[Probe]:
        """One probe for each pair of train and validation features."""
        train, val = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        y, y_val, device = self._labels["train"], self._labels["val"], self._device
        self._reporter("probes", 0, len(pairs))
        with self._clock("probes"):
            if self._protocol == "published":
                probes = fit_published_probes(
                    train, y, val_features=val, val_labels=y_val, seed=self._seed, device=device
                )
            else:
                probes = fit_probes(train, y, val_features=val, val_labels=y_val, device=device)
        self._reporter("probes", len(pairs), len(pairs))
        return probes

    def settings(self, pairs: Mapping[Dial, Pair], exact: set[Dial]) -> tuple[Setting, ...]:
        """One scored setting for each pair; `exact` are those whose features were computed."""
        probes = self.fit(list(pairs.values()))
        return tuple(
            Setting(
                beta=None if dial is None else dial[0],
                c=None if dial is None else dial[1],
                score=probe.accuracy,
                error=standard_error(probe.accuracy, len(probe.correct)),
                exact=dial in exact,
                probe=probe,
            )
            for dial, probe in zip(pairs, probes, strict=True)
        )

    def hits(self, setting: Setting, features: Tensor) -> Tensor:
        """(N,) bool: which test samples the setting's probe gets right."""
        return setting.probe.logits(features).argmax(1) == self._labels["test"]


def compare(
    backbone: Backbone, trainer: Trainer, rows: Sequence[Row], features: str
) -> tuple[tuple[Setting, ...], FeatureInfo]:
    """Scores every setting of the grid.

    Returns:
        The settings by row, beta = 1 once and last; and how their features came about.
    """
    dials: list[Dial] = [dial for row in rows for dial in row[:-1]]
    dials.append(rows[0][-1])
    pairs: dict[Dial, Pair] = {}
    exact: set[Dial] = set(dials)
    checks: list[InterpolationCheck] = []
    refused: list[str] = []
    if features == "exact":
        backbone.expected = len(dials)
        pairs = {dial: backbone.pair(dial) for dial in dials}
    else:
        backbone.expected = len(rows) * (_NODES - 1 + _HELD_OUT) + 1
        for row in rows:
            found = _Interpolated(backbone, trainer, row)
            checks += found.checks
            refused += [found.refusal] if found.refusal else []
            exact -= found.guessed.keys()
            pairs |= found.pairs()
    settings = trainer.settings({dial: pairs[dial] for dial in dials}, exact)
    guessed = len(exact) < len(dials)
    info = FeatureInfo(
        requested=features,
        used="exact" if not guessed else "mixed" if refused else "interpolated",
        evaluated=backbone.evaluated,
        total=len(dials),
        checks=tuple(checks),
        reason="; ".join(refused) or None,
    )
    return settings, info


class _Interpolated:
    """Interpolation along one row, checked at held-out betas.

    Attributes:
        guessed: features that were interpolated; empty if that was refused.
        checks: what the held-out betas showed.
        refusal: why nothing was interpolated.
    """

    def __init__(self, backbone: Backbone, trainer: Trainer, row: Row) -> None:
        self._backbone, self._trainer, self._row = backbone, trainer, dict(row)
        betas = sorted(self._row)
        self._nodes = nodes(betas, _NODES)
        held = held_out(betas, self._nodes, _HELD_OUT)
        rest = set(betas) - set(self._nodes) - set(held)
        self.checks: list[InterpolationCheck] = []
        self.guessed: dict[Dial, Pair] = {}
        self.refusal: str | None = None
        if not rest:
            self.refusal = f"{len(betas)} values of beta are too few to interpolate between"
            return
        self._known = {beta: self._exact(beta) for beta in self._nodes}
        self.checks = self._check(held)
        self.refusal = _refusal(self.checks)
        if self.refusal:
            return
        self.guessed = {(beta, self._row[beta]): self._guess(beta) for beta in sorted(rest)}

    def pairs(self) -> dict[Dial, Pair]:
        """Features of the whole row, those that were not interpolated computed."""
        backbone = self._backbone
        if self.refusal:
            backbone.expected += len(self._row) - len(self._nodes) - len(self.checks)
        dials: list[Dial] = list(self._row.items())
        return {d: self.guessed[d] if d in self.guessed else backbone.pair(d) for d in dials}

    def _check(self, betas: Sequence[float]) -> list[InterpolationCheck]:
        exact, guesses = [self._exact(b) for b in betas], [self._guess(b) for b in betas]
        probes = self._trainer.fit([*exact, *guesses])
        checks = []
        for i, beta in enumerate(betas):
            score, other = probes[i].accuracy, probes[len(betas) + i].accuracy
            error, feature_error = abs(score - other), _relative_error(guesses[i], exact[i])
            unit = standard_error(score, len(probes[i].correct))
            c = self._row[beta]
            checks.append(InterpolationCheck(beta, c, self._nodes, feature_error, error, unit))
        return checks

    def _exact(self, beta: float) -> Pair:
        return self._backbone.pair((beta, self._row[beta]))

    def _guess(self, beta: float) -> Pair:
        train, val = (
            interpolate({node: pair[split] for node, pair in self._known.items()}, beta)
            for split in (0, 1)
        )
        return train, val


def _refusal(checks: Sequence[InterpolationCheck]) -> str | None:
    """Why the interpolation is not accurate enough; None if it is."""
    feature_error = max(check.feature_error for check in checks)
    score_error = math.sqrt(sum(check.score_error**2 for check in checks) / len(checks))
    unit = min(check.standard_error for check in checks)
    if feature_error <= _MAX_FEATURE_ERROR and score_error <= _MAX_SCORE_ERROR * unit:
        return None
    betas = ", ".join(f"{check.beta:g}" for check in checks)
    return (
        f"at the held-out betas {betas} (c = {checks[0].c:g} at the first) interpolated features "
        f"were off by up to {feature_error:.1%} (allowed: {_MAX_FEATURE_ERROR:.0%}) and scores by "
        f"{score_error:.4f} (allowed: {_MAX_SCORE_ERROR:g} of the standard error {unit:.4f})"
    )


def _relative_error(guess: Pair, exact: Pair) -> float:
    """‖guess − exact‖ / ‖exact − its mean over samples‖ over both splits, Frobenius norms."""
    found, true = torch.cat(guess), torch.cat(exact)
    spread = (true - true.mean(0)).norm()
    return float((found - true).norm() / spread.clamp_min(torch.finfo(true.dtype).tiny))
