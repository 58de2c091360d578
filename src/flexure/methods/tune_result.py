"""What a comparison of adaptation methods found. The comparison itself is in `tune`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flexure.columns import aligned
from flexure.methods.crossed import CrossedMean, crossed_difference, crossed_share
from flexure.record import to_json
from flexure.units.parameterization import saturated_share

__all__ = ["ArmResult", "Candidate", "Difference", "Run", "TuneResult", "compared"]

_MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One training of one setting from one seed.

    Attributes:
        arm: the arm it belongs to.
        setting: what distinguishes it within the arm.
        seed: of the head, of the adapter's own initial values, and of the order of the samples.
        parameters: trained numbers without the head.
        head_parameters: trained numbers in the head.
        losses: mean training loss of every epoch.
        val_accuracy: share of right answers on validation data after every epoch.
        kept: the epoch whose weights were kept, from 1: the best on validation data.
        seconds: of training by the wall clock, with validation and saving.
        step_bytes: peak memory of one training step; None where it was not measured.
        predictions: (N,) int64, the class predicted for each test sample.
        betas: site -> beta of each channel after training, in network order.
        cs: site -> c of each channel.
        warnings: what was warned of during the run.
        failure: why it could not be finished; then the numbers of training are empty.
    """

    arm: str
    setting: str
    seed: int
    parameters: int
    head_parameters: int
    losses: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    kept: int
    seconds: float
    step_bytes: int | None
    predictions: Tensor = field(repr=False, compare=False)
    betas: Mapping[str, Tensor] = field(repr=False, compare=False)
    cs: Mapping[str, Tensor] = field(repr=False, compare=False)
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def score(self) -> float:
        """Validation accuracy of the weights that were kept; −1 for a run that failed."""
        return -1.0 if self.failure else self.val_accuracy[self.kept - 1]

    @property
    def saturated(self) -> float | None:
        """Share of betas and cs below 0.01 or above 0.99; None where none were trained."""
        learned = bool(self.betas) and self.parameters > 0
        return saturated_share(*self.betas.values(), *self.cs.values()) if learned else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions."""
        names = [name for name in self.__dataclass_fields__ if name != "predictions"]
        own = {name: to_json(getattr(self, name)) for name in names}
        return {**own, "score": self.score, "saturated": self.saturated}


@dataclass(frozen=True)
class Candidate:
    """One setting of an arm's sweep and how it did on validation data, on the first seed.

    Attributes:
        setting: its name within the arm.
        score: validation accuracy; None where the run failed.
        rate: its learning rate, where the settings differ in that.
        failure: why it failed.
        beta: its constant beta, where the settings differ in that.
    """

    setting: str
    score: float | None
    rate: float | None = None
    failure: str | None = None
    beta: float | None = None


@dataclass(frozen=True)
class Difference:
    """An arm's test accuracy minus the probe's on the same samples, in percentage points.

    Attributes:
        points: mean over seeds and samples; arm and probe are paired by seed and by sample.
        low: lower end of the interval (see `crossed_difference`).
        high: upper end.
        level: of the interval.
        covers: what the interval covers the draw of.
        wins: samples that the arm gets right from more seeds than the probe.
        losses: samples that the probe gets right from more seeds.
        n: test samples.
    """

    points: float
    low: float
    high: float
    level: float
    covers: str
    wins: int
    losses: int
    n: int

    def __str__(self) -> str:
        if not self.wins + self.losses:
            return f"{self.points:+.2f} points (no sample told apart among n = {self.n})"
        return (
            f"{self.points:+.2f} points [{self.low:+.2f}, {self.high:+.2f}] "
            f"({self.wins} won, {self.losses} lost)"
        )


@dataclass(frozen=True)
class ArmResult:
    """One arm: the setting that validation data chose, trained from every seed.

    Attributes:
        name: of the arm.
        method: name and settings of the chosen method.
        setting: the chosen one of the sweep.
        candidates: the sweep, in its order.
        runs: of the chosen setting, one a seed.
        accuracy: on test data, a share (see `crossed_share`); None without test data.
        accuracies: of each seed.
        difference: to the probe; None without test data, and for the probe itself.
    """

    name: str
    method: Mapping[str, Any]
    setting: str
    candidates: tuple[Candidate, ...]
    runs: tuple[Run, ...]
    accuracy: CrossedMean | None
    accuracies: tuple[float, ...]
    difference: Difference | None

    @property
    def parameters(self) -> int:
        """Trained numbers without the head."""
        return self.runs[0].parameters

    @property
    def head_parameters(self) -> int:
        """Trained numbers in the head."""
        return self.runs[0].head_parameters

    @property
    def seconds(self) -> float:
        """Mean over runs; of one training, validation included."""
        return sum(run.seconds for run in self.runs) / len(self.runs)

    @property
    def step_bytes(self) -> int | None:
        """Peak memory of one training step."""
        return self.runs[0].step_bytes

    @property
    def saturated(self) -> float | None:
        """Share of learned betas and cs below 0.01 or above 0.99, mean over seeds."""
        shares = [run.saturated for run in self.runs if run.saturated is not None]
        return sum(shares) / len(shares) if shares else None

    def to_dict(self) -> dict[str, Any]:
        """The arm in JSON terms, its derived numbers included."""
        derived = ("parameters", "head_parameters", "seconds", "step_bytes", "saturated")
        names = [*self.__dataclass_fields__, *derived]
        return {name: to_json(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class TuneResult:
    """The result of `tune`.

    Attributes:
        arms: the probe first, then as asked for.
        seeds: of the runs; the settings were chosen on the first.
        epochs: passes over the training data in every run.
        batch_size: training samples a step; the last batch of an epoch may be smaller.
        schedule: factor on every learning rate at the last step of each epoch.
        head: path of the module that every arm replaces by a new one.
        classes: number of classes.
        samples: split -> number of samples.
        shared: pair of splits -> samples that occur in both.
        timing: stage -> seconds.
    """

    arms: tuple[ArmResult, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    schedule: tuple[float, ...]
    head: str
    classes: int
    samples: Mapping[str, int]
    shared: Mapping[str, int]
    timing: Mapping[str, float]

    def __getitem__(self, name: str) -> ArmResult:
        """The arm of that name."""
        return {arm.name: arm for arm in self.arms}[name]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know, one clause each; often nothing."""
        notes = [f"{n} samples are in both {pair}" for pair, n in self.shared.items() if n]
        if len(self.seeds) == 2:
            notes.append("two seeds say little about their spread: the intervals are wide")
        for arm in self.arms:
            failed = [c for c in arm.candidates if c.failure]
            notes += [f"{arm.name}, {c.setting}: failed ({c.failure})" for c in failed]
            notes += _end_of_sweep(arm)
            told = dict.fromkeys(text for run in arm.runs for text in run.warnings)
            notes += [f"{arm.name}: {text}" for text in told]
        return tuple(notes)

    def rows(self) -> list[dict[str, str]]:
        """The table, one dictionary an arm, the same keys in each."""
        return [_row(arm) for arm in self.arms]

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON terms."""
        own = {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__}
        return {**own, "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = aligned(self.rows())
        covers = next((a.accuracy.covers for a in self.arms if a.accuracy), None)
        if covers is not None:
            lines.append(f"95 % intervals over {covers}; differences are paired.")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def compared(
    arm: Sequence[Run], probe: Sequence[Run], labels: Tensor
) -> tuple[CrossedMean, tuple[float, ...], Difference | None]:
    """Accuracy of an arm's runs on test data, of each, and their difference to the probe's.

    Args:
        arm: one run a seed.
        probe: the probe's runs from the same seeds; the same object for the probe itself.
        labels: (N,) int64, the test labels.

    Returns:
        The mean accuracy with its interval, the accuracy of each seed, and the difference.
    """
    hits, base = _hits(arm, labels), _hits(probe, labels)
    accuracy = crossed_share(hits)
    accuracies = tuple(hits.mean(1).tolist())
    if arm is probe:
        return accuracy, accuracies, None
    found = crossed_difference(hits - base)
    by_sample = (hits - base).sum(0)
    difference = Difference(
        100.0 * found.mean,
        100.0 * found.low,
        100.0 * found.high,
        found.level,
        found.covers,
        wins=int((by_sample > 0).sum()),
        losses=int((by_sample < 0).sum()),
        n=len(labels),
    )
    return accuracy, accuracies, difference


def _hits(runs: Sequence[Run], labels: Tensor) -> Tensor:
    """(S, N) float64, 1 where a seed's run is right."""
    return torch.stack([(run.predictions == labels).double() for run in runs])


def _end_of_sweep(arm: ArmResult) -> list[str]:
    """A choice at the end of what was tried: the best one may lie beyond it."""
    done = [c for c in arm.candidates if c.failure is None]
    rates = {c.setting: c.rate for c in done if c.rate is not None}
    betas = {c.setting: c.beta for c in done if c.beta is not None}
    ends = [("learning rate", _end(rates.get(arm.setting), rates.values()))]
    # The largest beta is no end of the search: 1 is the network as it was.
    if (end := _end(betas.get(arm.setting), betas.values())) == "smallest":
        ends.append(("beta", end))
    return [
        f"{arm.name}: the chosen {what} is the {end} of the sweep; widen it"
        for what, end in ends
        if end is not None
    ]


def _end(chosen: float | None, tried: Collection[float]) -> str | None:
    if chosen is None or len(set(tried)) < 2 or min(tried) < chosen < max(tried):
        return None
    return "largest" if chosen == max(tried) else "smallest"


def _row(arm: ArmResult) -> dict[str, str]:
    accuracy, difference, size = arm.accuracy, arm.difference, arm.step_bytes
    return {
        "arm": arm.name,
        "parameters": f"{arm.parameters:,}",
        "with head": f"{arm.parameters + arm.head_parameters:,}",
        "chosen": arm.setting or "–",
        "accuracy": "–"
        if accuracy is None
        else f"{100 * accuracy.mean:.2f} [{100 * accuracy.low:.2f}, {100 * accuracy.high:.2f}]",
        "against the probe": "–" if difference is None else str(difference),
        "seconds": f"{arm.seconds:.1f}",
        "step MiB": "–" if size is None else f"{size / _MIB:.1f}",
        "saturated": "–" if arm.saturated is None else f"{100 * arm.saturated:.1f} %",
    }
