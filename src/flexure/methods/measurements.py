"""Measuring: all measures of one model, or of two side by side, on the same labelled samples.

Orchestration only: the measures and how two models' are compared are the table in `measures.py`,
means over samples `measure/over.py`, finished batches on disk `measured_store.py`, the result
`measurements_result.py`, and what must be known of it `measured_notes.py`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import call_model, logits_of, seeded, take
from flexure.contracts import Batches, BudgetError, DataError, FlexureError
from flexure.fingerprints import content, fingerprint
from flexure.measure.bounds import HessianBound, hessian_bound
from flexure.measure.fields import measuring
from flexure.measure.over import Summary, over
from flexure.methods.features import device_of
from flexure.methods.measured_notes import notes
from flexure.methods.measured_store import MeasuredStore
from flexure.methods.measurements_result import Measurements, ModelMeasurements
from flexure.methods.measures import BOUND, MEASURES, Settings
from flexure.methods.paired import QuantityDifference
from flexure.methods.samples import Samples, read_samples
from flexure.methods.shuffled import InOrder
from flexure.processes import current_processes
from flexure.progress import Progress, ProgressReporter
from flexure.record import versions

__all__ = [
    "NOISE_SAMPLES",
    "RATE_SAMPLES",
    "Measurements",
    "ModelMeasurements",
    "compared",
    "measure_model",
]

RATE_SAMPLES = 256
"""Samples that the curvature rate takes unless told otherwise: several times the curvature's cost
each, and it pools over all of them."""

NOISE_SAMPLES = 64
"""Samples that the gradient's change under noise takes: for the bound beside it curvature is
measured at several points a sample (see `gradient_change`)."""

_CACHE_BYTES = 2**30  # inputs up to this size are preprocessed once and kept


def measure_model(
    model: nn.Module,
    batches: Batches,
    *,
    against: nn.Module | None = None,
    names: tuple[str, str] = ("model", "against"),
    measures: Sequence[str] | None = None,
    curvature_samples: int | None = None,
    rate_samples: int | None = RATE_SAMPLES,
    noise_samples: int | None = NOISE_SAMPLES,
    tol: float = 1e-2,
    max_products: int = 20,
    radii: Sequence[float] | None = None,
    directions: int = 16,
    orders: Sequence[int] = (1, 2, 3, 4),
    normalization: str = "raw",
    seed: int = 42,
    memory: int | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Measurements:
    """Measures the input-space geometry of one model, or of two on the same samples and noise.

    Every measure of the table `MEASURES`, and the data-free bound of the Hessian norm. What a
    model does not have (a ReLU network has no curvature rate and no bound) is left out, and the
    result says why; the other measures go on. The models are not changed.

    With `against`, every quantity of `model` is compared with that of the other one, sample by
    sample: differences of means with t-intervals, median ratios with intervals from the sign test
    (norms span decades, so their means are those of few samples), and for the curvature rate, which
    pools over samples, the difference with a paired percentile bootstrap. The calibration error
    has no interval: at few samples its bias is larger than what resampling shows.

    The first samples are taken wherever fewer than all are measured: give batches in a random
    order, not sorted by class.

    Args:
        model: a classifier that returns logits.
        batches: labelled samples `(x, y)` in a random order, the same in every pass; a batch's
            samples go through a measure together.
        against: another classifier of the same inputs and classes.
        names: what to call the two.
        measures: of the table, and `"bound"`; default: all.
        curvature_samples: samples for the Hessian norm, the first ones; None: all.
        rate_samples: samples for the curvature rate, the first ones.
        noise_samples: samples for the gradient's change under noise, the first ones.
        tol: relative residual at which a Hessian norm counts as converged; smaller is stricter.
        max_products: Hessian-vector products that a sample may take for a Hessian norm; what has
            not converged by then is a lower bound, and the notes count it.
        radii: of the noise; default: the measure's own.
        directions: of the curvature rate, a sample.
        orders: of the derivatives that the curvature rate is fitted to.
        normalization: of these: `"raw"` or `"factorial"`.
        seed: of everything random; both models get the same draws.
        memory: bytes that the Hessian norm, and the gradient's change under noise, may hold at once
            beyond model and inputs.
        store: folder of finished batches; the same measurement continues from it, bit by bit, also
            with more measures.
        progress: True for a bar on stderr, or a callable (stage, samples done, samples in all).

    Raises:
        FlexureError: a wrong argument; a model that no measure fits; or a folder that holds
            batches of another measurement.
        BudgetError: `memory` is too small for a sample.
        DataError: no samples, labels that the models do not have, or batches that are not the same
            in every pass.
    """
    asked = _asked(measures)
    limits = {
        "curvature": curvature_samples,
        "rate": rate_samples,
        "gradient_change": noise_samples,
    }
    settings = Settings(
        tol=tol,
        max_products=max_products,
        radii=None if radii is None else tuple(radii),
        directions=directions,
        orders=tuple(orders),
        normalization=normalization,
        memory=memory,
        limits=_limits(limits),
        seed=_seed(seed),
    )
    models = _named(names, model, against)
    _check_settings(asked, settings)
    samples = read_samples(batches, "measured", cache_bytes=_CACHE_BYTES)
    for name, each in models.items():
        _check_classes(name, each, samples)
    kept = None if store is None else MeasuredStore(store, _parts(models, samples, settings))
    reporter = ProgressReporter(progress if current_processes().is_first else None)
    try:
        bench = _Bench(samples, settings, kept, reporter)
        found = tuple(
            bench.measured(place, name, each, asked)
            for place, (name, each) in enumerate(models.items())
        )
    finally:
        reporter.close()
    differences = compared(*found, seed=settings.seed) if len(found) == 2 else ()
    told = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return Measurements(found, differences, tuple(notes(found)), told)


def compared(
    first: ModelMeasurements, second: ModelMeasurements, *, seed: int = 42
) -> tuple[QuantityDifference, ...]:
    """How one model compares with another that was measured on the same samples.

    Args:
        first: the model.
        second: what it is compared with.
        seed: of the bootstrap.

    Returns:
        One row or several for each measure that both have, in the order of `MEASURES`.

    Raises:
        FlexureError: the two were measured on different numbers of samples.
    """
    both = [name for name in MEASURES if name in first.summaries and name in second.summaries]
    return tuple(
        found
        for name in both
        for quantity in MEASURES[name].quantities
        for found in quantity.differences(
            name, first.summaries[name], second.summaries[name], seed=seed
        )
    )


class _Bench:
    """Runs the measures of one model after another."""

    def __init__(
        self,
        samples: Samples,
        settings: Settings,
        store: MeasuredStore | None,
        reporter: ProgressReporter,
    ) -> None:
        self._samples, self._settings = samples, settings
        self._store, self._reporter = store, reporter

    def measured(
        self, place: int, name: str, model: nn.Module, asked: Sequence[str]
    ) -> ModelMeasurements:
        """All measures that were asked for and that the model allows."""
        summaries: dict[str, Summary[Any]] = {}
        refusals: dict[str, str] = {}
        seconds: dict[str, float] = {}
        bound: HessianBound | None = None
        for measure in asked:
            start = time.perf_counter()
            try:
                if measure == BOUND:
                    bound = hessian_bound(model, self._input_shape())
                else:
                    summaries[measure] = self._summary(place, name, model, measure)
            except DataError:
                raise  # the samples are wrong, whatever the model
            except BudgetError as error:
                raise BudgetError(
                    f"expected memory of at least {error.needed:,} bytes for {measure} of {name}, "
                    f"got {self._settings.memory:,}; raise it, or set no limit",
                    error.needed,
                ) from error
            except FlexureError as error:
                refusals[measure] = _line(error)
            seconds[measure] = time.perf_counter() - start
        if len(refusals) == len(asked):
            reason = next(iter(refusals.values()))
            raise FlexureError(f"{name} has no {' and no '.join(asked)}: {reason}")
        seed = self._settings.seed
        estimates = tuple(
            estimate
            for measure, summary in summaries.items()
            for quantity in MEASURES[measure].quantities
            for estimate in quantity.estimates(measure, summary, seed=seed)
        )
        loose = _looseness(bound, summaries.get("curvature"))
        return ModelMeasurements(
            name, len(self._samples), summaries, estimates, bound, loose, refusals, seconds
        )

    def _summary(self, place: int, name: str, model: nn.Module, measure: str) -> Summary[Any]:
        row, samples = MEASURES[measure], self._samples
        total = min(self._settings.limits.get(measure, len(samples)), len(samples))
        stage = f"{name}: {measure}"
        batches = _First(
            InOrder(samples, device_of(model)),
            total,
            lambda done: self._reporter(stage, done, total),
        )
        bound = row.bind(model, self._settings)
        kept = None if self._store is None else self._store.of(place, measure, row.result)
        return over(bound, batches, seed=self._settings.seed, kept=kept)

    def _input_shape(self) -> tuple[int, ...]:
        """Of one sample, without the batch dimension."""
        x, _ = next(self._samples.inputs())
        if not isinstance(x, Tensor):
            raise FlexureError(
                f"expected inputs that are one tensor to bound the Hessian, got "
                f"{type(x).__name__}; leave {BOUND!r} out, or wrap the model"
            )
        return tuple(x.shape[1:])


class _First:
    """The first samples of some batches; tells how many are done."""

    def __init__(self, batches: InOrder, total: int, report: Callable[[int], None]) -> None:
        self._batches, self._total, self._report = batches, total, report

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        done = 0
        for x, y in self._batches:
            rows = min(self._total - done, len(y))
            yield take(x, slice(0, rows), len(y)), y[:rows]
            done += rows
            self._report(done)
            if done == self._total:
                return


def _asked(measures: Sequence[str] | None) -> tuple[str, ...]:
    """The measures to run, in the order of the table."""
    known = (*MEASURES, BOUND)
    given = known if measures is None else tuple(measures)
    if isinstance(measures, str) or not given or not set(given) <= set(known):
        raise FlexureError(
            f"expected measures (--measures) among {', '.join(known)}, got {measures!r}"
        )
    return tuple(name for name in known if name in given)


def _named(
    names: tuple[str, str], model: nn.Module, against: nn.Module | None
) -> dict[str, nn.Module]:
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise FlexureError(f"expected two different names of models, got {names!r}")
    return {names[0]: model} | ({} if against is None else {names[1]: against})


def _limits(given: Mapping[str, int | None]) -> dict[str, int]:
    for measure, limit in given.items():
        whole = isinstance(limit, Integral) and not isinstance(limit, bool)
        if limit is not None and (not whole or limit < 1):
            raise FlexureError(
                f"expected the number of samples for {measure} to be a whole number, at least 1, "
                f"or None for all, got {limit!r}"
            )
    return {measure: int(limit) for measure, limit in given.items() if limit is not None}


def _seed(seed: int) -> int:
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64:
        raise FlexureError(f"expected a whole seed, at least 0 and below 2^64, got {seed!r}")
    return int(seed)


def _check_settings(asked: Sequence[str], settings: Settings) -> None:
    """Refuses settings that measures refuse even for a network that fits all of them."""
    with seeded(0):
        fits = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).eval()
    sample = (torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    free = replace(settings, memory=None)  # what is needed depends on the model
    for measure in asked:
        if measure in MEASURES:
            over(MEASURES[measure].bind(fits, free), [sample])


def _check_classes(name: str, model: nn.Module, samples: Samples) -> None:
    """Refuses labels that the model does not have before anything is measured.

    Raises:
        DataError: there are such labels.
    """
    x, _ = next(iter(InOrder(samples, device_of(model))))
    with measuring(model), torch.no_grad():
        logits = logits_of(call_model(model, x))
    if logits.dim() != 2 or logits.shape[1] < 2:
        return  # no classifier: measures say so
    classes, labels = logits.shape[1], samples.labels
    if wrong := int((labels >= classes).sum()):
        raise DataError(
            f"expected labels from 0 to {classes - 1}, the {classes} classes of {name}, got "
            f"{int(labels.min())} to {int(labels.max())}, {wrong} of {len(labels)} above them; "
            f"give the labels that the model was trained on"
        )


def _parts(models: Mapping[str, nn.Module], samples: Samples, settings: Settings) -> dict[str, str]:
    """All that the values of a batch depend on, by name."""
    library = versions()
    labels = hashlib.blake2b(content(samples.labels), digest_size=16)
    told = {field.name: repr(getattr(settings, field.name)) for field in fields(settings)}
    return {
        **{f"model {name!r}": fingerprint(model) for name, model in models.items()},
        "data": samples.fingerprint,
        "labels": labels.hexdigest(),
        **told,
        "library": f"flexure {library['flexure']}, torch {library['torch']}",
    }


def _looseness(bound: HessianBound | None, curvature: Summary[Any] | None) -> float | None:
    """The bound over the largest Hessian norm that was found."""
    if bound is None or curvature is None:
        return None
    norms = curvature.result.hessian_norm
    norms = norms[norms.isfinite()]
    return float(bound.looseness(float(norms.max()))) if len(norms) and norms.max() > 0 else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
