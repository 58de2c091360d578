"""What training one network by several methods found. The training itself is in `flat.py`.

Which quantities there are, and how runs become one number with an interval, is
`flat_quantities.py`'s; what a reader must know of the numbers is told in `flat_notes.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flexure.columns import aligned
from flexure.measure.discrepancy import Discrepancy, discrepancy
from flexure.methods.flat_notes import flat_notes
from flexure.methods.flat_quantities import FlatEstimate, FlatQuantity, over_seeds, quantities
from flexure.record import to_json

if TYPE_CHECKING:
    from flexure.measure.over import Summary

__all__ = ["FlatNoise", "FlatRow", "FlatRun", "FlatTraining", "Plane"]

_TABLE = ("gradient_norm", "hessian_norm", "normalized", "accuracy")
_PER_CENT = 100.0


@dataclass(frozen=True)
class FlatRun:
    """One network, trained by one method from one seed.

    Everything that is measured is measured on the kept weights in eval mode, on the same samples
    for all runs, with the input in the same units (pixels in [0, 1] where the network was given
    mean and std).

    Attributes:
        method: name of the method, as in `FlatTraining.methods`.
        seed: of the initial weights, the order of the samples, and all that training draws.
        start: digest of the initial weights, before the method changed the network: the same for
            all methods from the same seed.
        parameters: trained numbers.
        losses: mean objective (loss plus weighted penalties) of every epoch.
        val_accuracy: share of right answers on validation data after every epoch.
        val_loss: mean cross-entropy there, in nats.
        penalties: name -> the unweighted penalty, its mean over every epoch.
        learning_rates: of the weights, at the last update of every epoch.
        kept: the epoch whose weights were kept, from 1.
        seconds: of the training by the wall clock, with validation and saving.
        seconds_per_epoch: mean over epochs, updates alone: without validation and saving. Of a
            training that was interrupted, over the epochs after it was resumed.
        test: measure -> its values on test samples, for those of `"curvature"`, `"rate"`,
            `"gradient_change"` and `"calibration"` that the network allows. `.result` holds one row
            a sample, in the same order for all runs; `"calibration"` covers all test samples, the
            others the first ones.
        train: likewise on training samples, `"curvature"` alone.
        robust: (n, R) bool, whether the answer to the first n test samples is right and stays so
            under attack, for each radius of `FlatTraining.radii`; None where the attack was
            refused.
        probabilities: (G, G, classes) float32, class probabilities on the grid of
            `FlatTraining.plane`, [i, j] at (x = plane.x[j], y = plane.y[i]); None without a plane.
        lipschitz: bound of the logits' Lipschitz constant, in 1 / input unit; None where refused.
        betas: site -> learned beta of the centered softplus; empty where there are none.
        gammas: layer -> learned gamma of the Lipschitz BatchNorm.
        kinks: functions of the network at which its gradient jumps; no Hessian sees that.
        changed: part of the network -> how many of its sites or layers the method replaced, of
            `"activation"`, `"linear"` and `"norm"` those that it replaces.
        weights: digest of the file of final weights; None where none was written.
        refusals: what was to be measured -> why this network does not have it.
        warnings: what was warned of during the run.
        failure: why the training could not be finished; then nothing was measured.
    """

    method: str
    seed: int
    start: str
    parameters: int
    losses: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    val_loss: tuple[float, ...]
    penalties: Mapping[str, tuple[float, ...]]
    learning_rates: tuple[float, ...]
    kept: int
    seconds: float = field(compare=False)
    seconds_per_epoch: float | None = field(compare=False)
    test: Mapping[str, Summary[Any]] = field(default_factory=dict, repr=False, compare=False)
    train: Mapping[str, Summary[Any]] = field(default_factory=dict, repr=False, compare=False)
    robust: Tensor | None = field(default=None, repr=False, compare=False)
    probabilities: Tensor | None = field(default=None, repr=False, compare=False)
    lipschitz: float | None = None
    betas: Mapping[str, float] = field(default_factory=dict)
    gammas: Mapping[str, float] = field(default_factory=dict)
    kinks: tuple[str, ...] = ()
    changed: Mapping[str, int] = field(default_factory=dict)
    weights: str | None = field(default=None, compare=False)
    refusals: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    @cached_property
    def discrepancies(self) -> Mapping[str, Discrepancy]:
        """Quantity -> how much larger it is on test samples than on training samples.

        Of gradient norm, Hessian norm and normalised curvature; empty where there are none.
        """
        if "curvature" not in self.test or "curvature" not in self.train:
            return {}
        return discrepancy(self.train["curvature"], self.test["curvature"])

    def to_dict(self) -> dict[str, Any]:
        """The run in JSON terms, without the values of single samples and without the grid."""
        big = {"test", "train", "robust", "probabilities"}
        own = {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__
               if name not in big}  # fmt: skip
        return {**own, "discrepancies": to_json(dict(self.discrepancies))}


@dataclass(frozen=True)
class Plane:
    """The plane of two-dimensional data, for drawing decision boundaries.

    Attributes:
        x: (G,) float32, first coordinates of the grid, increasing.
        y: (G,) float32, second coordinates.
        points: (N, 2) float32, training samples.
        labels: (N,) int64, theirs.
    """

    x: Tensor
    y: Tensor
    points: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FlatNoise:
    """The relative gradient change of one method under noise of one radius.

    Attributes:
        radius: l2 norm of the noise, in input units.
        change: mean of ‖∇f(x+ε) − ∇f(x)‖ / ‖∇f(x)‖, with its interval.
        bound: median of the estimated bound e^a − 1 over samples, its mean over runs (see
            `flexure.gradient_change`); nan where there is none.
    """

    radius: float
    change: FlatEstimate
    bound: float


@dataclass(frozen=True)
class FlatRow:
    """One method: what its runs come to.

    Attributes:
        method: its name.
        says: what it is, in words.
        runs: one a seed, failed ones included.
        estimates: quantity -> mean over runs and samples, with its interval; without those that
            the network does not have.
        differences: quantity -> minus the baseline's, paired by seed and by sample; empty for the
            baseline itself.
        discrepancies: `"gradient_norm"`, `"hessian_norm"`, `"normalized"` -> (test − train)/train:
            of one run with its interval over samples, of several with that over seeds.
        noise: the noise curve, by increasing radius.
        relative_time: seconds per epoch over the baseline's; nan without both.
    """

    method: str
    says: str
    runs: tuple[FlatRun, ...]
    estimates: Mapping[str, FlatEstimate]
    differences: Mapping[str, FlatEstimate]
    discrepancies: Mapping[str, FlatEstimate]
    noise: tuple[FlatNoise, ...]
    relative_time: float

    @property
    def finished(self) -> tuple[FlatRun, ...]:
        """The runs that did not fail."""
        return tuple(run for run in self.runs if run.failure is None)

    @property
    def kinks(self) -> tuple[str, ...]:
        """Functions of its networks at which the gradient jumps."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.kinks))

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return self.runs[0].parameters

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON terms, its runs without single samples."""
        own = {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__}
        return {**own, "parameters": self.parameters, "kinks": list(self.kinks)}


@dataclass(frozen=True)
class FlatTraining:
    """The result of `train_flat`.

    Attributes:
        methods: name -> what it is, in words; in the order in which they were asked for.
        seeds: of the runs of each method.
        runs: method by method, seed by seed; failed ones included.
        baseline: the method that the others are compared with: `"standard"` where it is among
            them, else the first.
        radii: l2 radii of the attacks, in input units.
        samples: what -> number of samples: `"train"`, `"val"`, `"test"`, and `"measured"`, the
            first ones of train and test on which geometry and attacks are measured.
        settings: of training and measurement, by name; JSON values.
        timing: stage -> seconds.
        told: what a reader must know of all runs, one clause each.
        plane: for two-dimensional inputs; else None.
    """

    methods: Mapping[str, str]
    seeds: tuple[int, ...]
    runs: tuple[FlatRun, ...]
    baseline: str
    radii: tuple[float, ...]
    samples: Mapping[str, int]
    settings: Mapping[str, Any]
    timing: Mapping[str, float]
    told: tuple[str, ...] = ()
    plane: Plane | None = field(default=None, repr=False, compare=False)

    @cached_property
    def quantities(self) -> Mapping[str, FlatQuantity]:
        """Name -> the quantity, with its label and the direction that is wanted."""
        return {one.name: one for one in quantities(self.radii)}

    @cached_property
    def rows(self) -> tuple[FlatRow, ...]:
        """One a method."""
        return tuple(self._row(method) for method in self.methods)

    def __getitem__(self, method: str) -> FlatRow:
        """The row of a method."""
        return {row.method: row for row in self.rows}[method]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know, one clause each."""
        return (*self.told, *flat_notes(self))

    @property
    def covers(self) -> tuple[str, ...]:
        """What the intervals of numbers with samples cover the draw of, in words."""
        found = [one for row in self.rows for one in row.estimates.values()]
        return tuple(dict.fromkeys(e.covers for e in found if e.has_interval and e.samples))

    def table(self) -> list[dict[str, str]]:
        """The main table as text, one dictionary a method, the same keys in each."""
        names = [*self._shown(), "seconds_per_epoch"]
        return [self._cells(row, names, row.estimates, sign="") for row in self.rows]

    def differences(self) -> list[dict[str, str]]:
        """The table of differences to the baseline, likewise, without the baseline."""
        names = self._shown()
        rows = [row for row in self.rows if row.method != self.baseline]
        return [self._cells(row, names, row.differences, sign="+") for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON terms: rows with their runs, without the values of single samples."""
        own = {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__
               if name not in ("runs", "plane")}  # fmt: skip
        labels = {name: one.label for name, one in self.quantities.items()}
        rows = [row.to_dict() for row in self.rows]
        return {**own, "quantities": labels, "rows": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = aligned(self.table())
        if differences := self.differences():
            lines += ["", f"minus {self.baseline}, paired:", *aligned(differences)]
        intervals = f"95 % intervals over {' or '.join(self.covers)}; " if self.covers else ""
        lines += [f"{intervals}shares in %."]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _shown(self) -> list[str]:
        return [*_TABLE, "clean", *(f"pgd_{radius:g}" for radius in self.radii)]

    def _runs(self, method: str) -> tuple[FlatRun, ...]:
        return tuple(run for run in self.runs if run.method == method)

    def _row(self, method: str) -> FlatRow:
        runs, base = self._runs(method), self._runs(self.baseline)
        estimates = {k: found for k, q in self.quantities.items() if (found := q.estimate(runs))}
        differences = {
            k: found
            for k, q in self.quantities.items()
            if method != self.baseline and (found := q.difference(runs, base))
        }
        seconds = self.quantities["seconds_per_epoch"]
        mine, theirs = seconds.estimate(runs), seconds.estimate(base)
        relative = mine.value / theirs.value if mine and theirs and theirs.value else math.nan
        return FlatRow(
            method,
            self.methods[method],
            runs,
            estimates,
            differences,
            _discrepancies(runs),
            _noise(runs),
            relative,
        )

    def _cells(
        self, row: FlatRow, names: Sequence[str], found: Mapping[str, FlatEstimate], *, sign: str
    ) -> dict[str, str]:
        known = [self.quantities[name] for name in names]
        cells = {one.head: _text(one, found.get(one.name), sign) for one in known}
        return {"method": row.method, **cells}


def _discrepancies(runs: Sequence[FlatRun]) -> dict[str, FlatEstimate]:
    found = [run.discrepancies for run in runs if run.discrepancies]
    if len(found) == 1:
        return {
            name: FlatEstimate(
                one.relative, *one.interval, "samples", 1, min(one.train_samples, one.test_samples)
            )
            for name, one in found[0].items()
        }
    return {name: over_seeds([one[name].relative for one in found]) for name in (found or [{}])[0]}


def _noise(runs: Sequence[FlatRun]) -> tuple[FlatNoise, ...]:
    found = [run for run in runs if "gradient_change" in run.test]
    if not found:
        return ()
    radii = found[0].test["gradient_change"].result.radii
    return tuple(_noise_at(found, column, radius) for column, radius in enumerate(radii))


def _noise_at(runs: Sequence[FlatRun], column: int, radius: float) -> FlatNoise:
    def values(run: FlatRun, name: str = "change") -> Tensor:
        of: Tensor = run.test["gradient_change"].result.samples()[name][:, column]
        return of

    quantity = FlatQuantity("change", "relative gradient change", "", "lower", "mean", values)
    change = quantity.estimate(runs)
    medians = [values(run, "estimated_bound").double().nanquantile(0.5) for run in runs]
    bound = float(sum(medians)) / len(runs)
    return FlatNoise(radius, change or over_seeds([math.nan]), bound)


def _text(quantity: FlatQuantity, found: FlatEstimate | None, sign: str) -> str:
    if found is None or math.isnan(found.value):
        return "–"
    scale, form = (_PER_CENT, ".2f") if quantity.kind == "share" else (1.0, ".4g")
    told = f"{scale * found.value:{sign}{form}}"
    if not found.has_interval:
        return told
    return f"{told} [{scale * found.low:{sign}{form}}, {scale * found.high:{sign}{form}}]"
