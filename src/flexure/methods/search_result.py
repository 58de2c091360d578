"""What a search over beta found, and how to use it. The search itself is in `search`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from flexure.contracts import Example
from flexure.methods.probe import Probe
from flexure.methods.steer import Steering, steer
from flexure.record import to_json
from flexure.surgery.replace import replace_module
from flexure.surgery.sites import SiteReport, Where

__all__ = [
    "BetaSearch",
    "FeatureInfo",
    "Gain",
    "InstalledSearch",
    "InterpolationCheck",
    "Setting",
    "TestScore",
    "paired_gain",
    "standard_error",
]

_LEVEL = 0.95


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy on n independent samples: sqrt(p(1−p)/n).

    At p = 0 and 1 that would be 0, as if there were no doubt left; there p is Laplace's
    (n·p + 1)/(n + 2).
    """
    if accuracy in (0.0, 1.0):
        accuracy = (n * accuracy + 1) / (n + 2)
    return math.sqrt(accuracy * (1.0 - accuracy) / n)


@dataclass(frozen=True)
class Setting:
    """One position of the dials and how its probe did on validation data.

    Attributes:
        beta: None for the untouched network.
        c: None for the untouched network; at beta = 1 it has no effect.
        score: validation accuracy.
        error: its standard error.
        exact: whether the features were computed, not interpolated.
        probe: the probe that was trained.
    """

    beta: float | None
    c: float | None
    score: float
    error: float
    exact: bool
    probe: Probe = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the probe's parameters."""
        probe = {key: getattr(self.probe, key) for key in ("ridge", "epoch", "converged", "nll")}
        own = {key: getattr(self, key) for key in ("beta", "c", "score", "error", "exact")}
        return {**own, "probe": probe}


@dataclass(frozen=True)
class Gain:
    """Difference of two test accuracies on the same samples, in percentage points.

    Attributes:
        points: 100 · (accuracy of the best setting − accuracy of the baseline).
        low: lower end of the interval, in points.
        high: upper end.
        level: of the interval, the exact one of the paired percentile bootstrap over test samples.
        wins: samples that only the best setting gets right.
        losses: samples that only the baseline gets right.
        n: test samples.
    """

    points: float
    low: float
    high: float
    level: float
    wins: int
    losses: int
    n: int

    @property
    def discordant(self) -> int:
        """Samples that only one of the two gets right; without any the interval is a point."""
        return self.wins + self.losses

    def __str__(self) -> str:
        if not self.discordant:
            return f"{self.points:+.2f} points (no discordant samples among n = {self.n})"
        return (
            f"{self.points:+.2f} points [{self.low:+.2f}, {self.high:+.2f}] "
            f"({self.level:.0%} paired bootstrap, exact, n = {self.n}; {self.wins} won, "
            f"{self.losses} lost)"
        )


def paired_gain(best: Tensor, baseline: Tensor) -> Gain:
    """The gain with its interval: the paired percentile bootstrap's, without resampling.

    Resampling samples whose difference is 1, −1 or 0 makes wins − losses a sum of n independent
    draws of these; its quantiles are those of the exact distribution, which no seed moves.

    Args:
        best: (N,) bool, which test samples the best setting gets right.
        baseline: (N,) bool, the same for the baseline.
    """
    n = len(best)
    wins, losses = int((best & ~baseline).sum()), int((baseline & ~best).sum())
    low, high = _interval(wins, losses, n)
    points = 100.0 * (wins - losses) / n
    return Gain(points, 100.0 * low / n, 100.0 * high / n, _LEVEL, wins, losses, n)


def _interval(wins: int, losses: int, n: int) -> tuple[int, int]:
    """The innermost values that leave at most (1 − level)/2 outside on either side."""
    size = 2 ** math.ceil(math.log2(2 * n + 1))
    step = np.zeros(size)
    step[0], step[1], step[-1] = (n - wins - losses) / n, wins / n, losses / n
    # The n-fold convolution of one draw's distribution with itself.
    mass = np.fft.irfft(np.fft.rfft(step) ** n, size)
    below = np.cumsum(np.concatenate([mass[-n:], mass[: n + 1]]))  # P(difference <= -n ... n)
    tail, rounding = (1 - _LEVEL) / 2, 1e-9
    low = int(np.searchsorted(below, tail + rounding, side="left")) - n
    high = int(np.searchsorted(below, 1 - tail - rounding, side="left")) - n
    return low, high


@dataclass(frozen=True)
class TestScore:
    """Test accuracy at the best setting and at the baseline, with standard errors."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    best: float
    best_error: float
    baseline: float
    baseline_error: float
    n: int


@dataclass(frozen=True)
class InterpolationCheck:
    """Interpolated against computed features at one beta that the interpolation did not see.

    Attributes:
        beta: the held-out beta.
        c: the other dial.
        nodes: betas that were interpolated between.
        feature_error: ‖interpolated − exact‖ / ‖exact − its mean‖ over train and val features.
        score_error: difference of the validation accuracies of the two probes, absolute.
        standard_error: of the accuracy on exact features.
    """

    beta: float
    c: float
    nodes: tuple[float, ...]
    feature_error: float
    score_error: float
    standard_error: float


@dataclass(frozen=True)
class FeatureInfo:
    """How the features came about.

    Attributes:
        requested: "exact" or "interpolated".
        used: the same, after the checks; "mixed" if they failed at some values of c.
        evaluated: settings whose features were computed.
        total: settings that were compared.
        checks: at the held-out betas; empty for exact features.
        reason: why exact features were used although interpolated ones were requested.
    """

    requested: str
    used: str
    evaluated: int
    total: int
    checks: tuple[InterpolationCheck, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        text = f"{self.used} features, computed at {self.evaluated} of {self.total} settings"
        if self.checks:
            worst = max(check.feature_error for check in self.checks)
            score = max(check.score_error for check in self.checks)
            unit = min(check.standard_error for check in self.checks)
            text += (
                f"; at held-out betas the interpolated ones were off by up to {worst:.1%}, their "
                f"scores by up to {score:.4f} (standard error {unit:.4f})"
            )
        return text + (f"; not interpolated: {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class BetaSearch:
    """The result of `search_beta`.

    Attributes:
        settings: every position of the dials that was compared, by c, then beta; beta = 1 last.
        best: the highest score; of equals the beta nearest 1, then the c nearest 0.5.
        baseline: beta = 1 if that is the original network, else the untouched network.
        gain: on test data, best against baseline; None without test data, for the difference on
            the data of the selection would be optimistic.
        test: the two test accuracies behind the gain.
        protocol: "converged" or "published".
        features: how the features came about.
        head: path of the module whose input are the features.
        classes: number of classes.
        samples: split -> number of samples.
        shared: pair of splits, as "val-train" -> samples that occur in both; few, or the search
            refuses.
        seed: of the published probes.
        timing: stage -> seconds.
        report: the activation sites.
    """

    settings: tuple[Setting, ...]
    best: Setting
    baseline: Setting
    gain: Gain | None
    test: TestScore | None
    protocol: str
    features: FeatureInfo
    head: str
    classes: int
    samples: Mapping[str, int]
    shared: Mapping[str, int]
    seed: int
    timing: Mapping[str, float]
    report: SiteReport = field(repr=False)
    _model: nn.Module = field(repr=False, compare=False)
    _example: Example = field(repr=False, compare=False)
    _where: Where = field(repr=False, compare=False)

    @property
    def betas(self) -> tuple[float, ...]:
        """Beta of each setting."""
        return tuple(s.beta for s in self.settings if s.beta is not None)

    @property
    def cs(self) -> tuple[float, ...]:
        """c of each setting."""
        return tuple(s.c for s in self.settings if s.c is not None)

    @property
    def scores(self) -> tuple[float, ...]:
        """Validation accuracy of each setting."""
        return tuple(s.score for s in self.settings)

    @property
    def errors(self) -> tuple[float, ...]:
        """Standard error of each score."""
        return tuple(s.error for s in self.settings)

    @property
    def best_beta(self) -> float:
        """Beta of the best setting."""
        return cast(float, self.best.beta)  # only a baseline has none

    @property
    def best_c(self) -> float:
        """c of the best setting."""
        return cast(float, self.best.c)

    @property
    def within_one_se(self) -> tuple[Setting, ...]:
        """The settings whose score is within one standard error of the best."""
        return tuple(s for s in self.settings if s.score >= self.best.score - self.best.error)

    @property
    def validation_difference(self) -> float:
        """Best minus baseline on validation data, in percentage points.

        Optimistic: the best setting was chosen on these samples. Report `gain` instead.
        """
        return 100.0 * (self.best.score - self.baseline.score)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know, one clause each; often nothing."""
        notes = [f"{n} samples are in both {pair}" for pair, n in self.shared.items() if n]
        if self.best.probe.converged is False:
            notes.append("the probe of the best setting has not converged")
        if self.features.requested == "interpolated":
            notes.append(str(self.features))
        return tuple(notes)

    def install(self) -> InstalledSearch:
        """Steers the model to the best setting and puts the trained probe in the head's place.

        Returns:
            The handle whose `remove()` restores the model exactly.

        Raises:
            SiteError: the model is steered already.
        """
        steering = steer(
            self._model,
            beta=self.best_beta,
            c=self.best_c,
            example=self._example,
            where=self._where,
        )
        try:
            return InstalledSearch(self._model, self.head, self.best.probe, steering)
        except BaseException:
            steering.remove()
            raise

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON terms; probes without their parameters."""
        names = [f.name for f in fields(self) if not f.name.startswith("_") and f.name != "report"]
        result = {name: to_json(getattr(self, name)) for name in names}
        result["within_one_se"] = to_json(self.within_one_se)
        result["validation_difference_optimistic"] = self.validation_difference
        result["sites"] = to_json(self.report.rows())
        return result

    def __str__(self) -> str:
        score = f"validation accuracy {self.best.score:.4f} ± {self.best.error:.4f}"
        gain = "no test data, so no gain is reported" if self.gain is None else f"gain {self.gain}"
        against = "beta = 1" if self.baseline.beta is not None else "the untouched network"
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"best beta {self.best_beta:g}, c {self.best_c:g} of {len(self.settings)} settings: "
            f"{score} (the same at {against}: {self.baseline.score:.4f}; "
            f"{len(self.within_one_se)} settings within one standard error); {gain}; "
            f"features: the input of {self.head!r}{notes}"
        )


class InstalledSearch:
    """A model steered to the best setting, with its trained head. Made by `BetaSearch.install`.

    Also a context manager that restores the model on exit.

    Attributes:
        steering: the dials.
        head: the new head.
    """

    def __init__(self, model: nn.Module, path: str, probe: Probe, steering: Steering) -> None:
        self.steering = steering
        self.head = probe.linear()
        self._path = path
        self._put_back = replace_module(model, path, self.head)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the dial and the trained head; see `Steering.save`."""
        self.steering.save(path, head=self._path)

    def remove(self) -> None:
        """Restores the old head and the activations; a second call does nothing."""
        self._put_back()
        self.steering.remove()

    def __enter__(self) -> InstalledSearch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
