"""Tuning: adaptation methods side by side on one network and one data set, by the same rules.

Orchestration only: the methods and their settings are `arms`, one training is `tune_run`, finished
runs on disk `run_store`, intervals `crossed`, and the result `tune_result`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from flexure.contracts import Batches, Example, FlexureError
from flexure.fingerprints import fingerprint
from flexure.methods.arms import RATE_FACTORS, Arm, Arms, Trial, arms_of
from flexure.methods.backbone import Clock
from flexure.methods.features import check_head, default_head, head_module
from flexure.methods.head import HEAD_LEARNING_RATE
from flexure.methods.in_place import adaptation_in_place
from flexure.methods.run_store import RunStore
from flexure.methods.settings import check_counts, checked_seeds
from flexure.methods.tune_result import ArmResult, Candidate, Run, TuneResult, compared
from flexure.methods.tune_run import Task, check_arm, train_once
from flexure.methods.tuning_data import Train, TuningData
from flexure.progress import Progress, ProgressReporter
from flexure.record import check_writable, versions
from flexure.surgery.sites import Where
from flexure.train.fit import Schedule
from flexure.train.schedules import step_schedule

__all__ = ["SEEDS", "tune"]

SEEDS: tuple[int, ...] = (42, 43, 44)
"""The paper's."""

_LARGEST_HEAD_RATE = 1e3  # with Adam, the length of the first step of every weight


def tune(
    model: nn.Module,
    *,
    train: Train,
    val: Batches,
    test: Batches | None = None,
    arms: Arms = None,
    seeds: Sequence[int] = SEEDS,
    epochs: int = 20,
    batch_size: int = 32,
    schedule: Callable[[int], Schedule] | None = step_schedule,
    rate_factors: Sequence[float] = RATE_FACTORS,
    head_learning_rate: float = HEAD_LEARNING_RATE,
    head: str | None = None,
    where: Where = None,
    example: Example | None = None,
    store: str | os.PathLike[str] | None = None,
    adapters: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> TuneResult:
    """Compares ways to adapt a pretrained network: the same data, head, order and schedule.

    Every arm replaces the head by the same fresh one for the same seed, sees the same batches in
    the same order, and is trained by `flexure.fit` with Adam, the same schedule
    and number of epochs; the weights after the epoch that is best on `val` count. What an arm may
    choose (its learning rate; the steered network its beta), it chooses on `val`, by the run from
    the first seed; of equals the first one counts. Then that setting is trained from every seed.
    Test labels are used only after the last choice. The model is the same afterwards, bit by bit.

    Seeds decide the head's and the adapter's first values and the order of the samples. Training,
    validation and test data are the same for all of them, so that every interval covers the draw
    of test samples and of seeds, and not of training data.

    Args:
        model: a pretrained network.
        train: `(x, y)` batches, put together and shuffled anew in every epoch; or, for data that
            memory cannot hold, a function of the seed that returns batches that do so themselves.
        val: what settings and epochs are chosen on.
        test: what the accuracies and differences are measured on; None: there are none.
        arms: names of `ARMS`, or methods by names of one's own; default: all. The probe is always
            among them: every other arm is compared with it.
        seeds: of the runs; the paper's by default.
        epochs: of every run, as published.
        batch_size: training samples a step, as published; not with a function as `train`.
        schedule: steps per epoch -> schedule; default: the published one, linear warm-up in the
            first epoch and a tenth after ten. None: constant rates.
        rate_factors: the sweep, as factors on a method's own learning rate. Every arm that has
            something to choose gets as many trials: the steered network so many betas, Trainable
            CT so many pairs of a start and a rate; several methods are tried as given.
        head_learning_rate: of every arm's head, as published; above 0 and at most 1000. In few
            steps it leaves the head, and with it the probe, far from converged: what an arm then
            gains over the probe is partly the head's training that it makes up for.
        head: path of the classification layer; default: the `nn.Linear` that gives the logits.
        where: the activation sites that steered and Trainable CT arms adapt, as in `adapt`; which
            layers LoRA adapts is a setting of its own.
        example: an input to find the activation sites with; default: two training samples.
        store: folder of finished runs; the same comparison continues from it, also with more arms
            or seeds.
        adapters: folder for what each arm learned from the first seed, one folder an arm.
        progress: True for a bar on stderr, or a callable (arm, steps done, steps in all).

    Raises:
        FlexureError: a wrong argument, a method that does not fit the model (before any
            training), an arm of which no run could be finished, or a folder that holds runs of
            another comparison.
        SiteError: an arm that finds no activation, or no layer, to adapt; before any training.
        DataError: empty data, one class, classes that are not 0, 1, 2, ..., a class that train
            lacks, or splits that share samples.
    """
    asked, seeds = arms_of(arms, rate_factors), checked_seeds(seeds)
    check_counts(epochs=epochs, batch_size=batch_size)
    _check(model, head)
    _check_head_rate(head_learning_rate)
    folder = None if adapters is None else check_writable(adapters)
    clock = Clock()
    with clock("reading"):
        data = TuningData(model, train, val, test, batch_size, seeds[0])
        example = data.first() if example is None else example
        head = default_head(model, example) if head is None else head
        check_head(model, head, example)
    task = Task(
        model,
        data.train,
        val=data.in_order("val"),
        test=None if test is None else data.in_order("test"),
        example=example,
        head=head,
        classes=data.classes,
        where=where,
        epochs=epochs,
        schedule=None if schedule is None else schedule(data.steps),
        head_learning_rate=head_learning_rate,
    )
    with clock("checking"):  # before any training, which is lost time if a later arm fails
        for arm in asked:
            check_arm(task, arm, seeds[0])
    with _stored(store, task, data) as runs, closing(ProgressReporter(progress)) as reporter:
        kept = {"resumable": store is not None, "save": folder is not None}
        bench = _Bench(task, data, runs, seeds, reporter, clock, **kept)
        tried = [bench.tried(arm) for arm in asked]
        if folder is not None:
            _keep(tried, runs, seeds[0], folder)
    return TuneResult(
        arms=tuple(_result(one, tried[0], data) for one in tried),
        seeds=seeds,
        epochs=epochs,
        batch_size=data.batch_size,
        schedule=_factors(task, data.steps)[data.steps - 1 :: data.steps],
        head=head,
        classes=data.classes,
        samples={name: len(split) for name, split in data.splits.items()},
        shared=data.shared,
        timing=dict(clock.seconds),
    )


@dataclass(frozen=True)
class _Tried:
    """An arm after its sweep, with the runs of the setting that was chosen."""

    arm: Arm
    trial: Trial
    candidates: tuple[Candidate, ...]
    runs: tuple[Run, ...]


class _Bench:
    """Runs arms: the sweep on the first seed, the choice, and the other seeds."""

    def __init__(
        self,
        task: Task,
        data: TuningData,
        store: RunStore,
        seeds: tuple[int, ...],
        reporter: ProgressReporter,
        clock: Clock,
        *,
        resumable: bool,
        save: bool,
    ) -> None:
        self._task, self._data, self._store, self._seeds = task, data, store, seeds
        self._resumable, self._save, self._reporter = resumable, save, reporter
        self._clock = clock
        self._steps = task.epochs * data.steps

    def tried(self, arm: Arm) -> _Tried:
        """The arm's best setting on validation data, from every seed."""
        with self._clock(arm.name):
            return self._tried(arm)

    def _tried(self, arm: Arm) -> _Tried:
        reports = self._reports(arm.name, len(arm.trials) + len(self._seeds) - 1)
        swept = [self._run(arm.name, trial, self._seeds[0], next(reports)) for trial in arm.trials]
        best = max(range(len(swept)), key=lambda k: (swept[k].score, -k))
        trial, runs = arm.trials[best], [swept[best]]
        _check_finished(runs[-1])
        for seed in self._seeds[1:]:
            runs.append(self._run(arm.name, trial, seed, next(reports)))
            _check_finished(runs[-1])
        candidates = tuple(
            Candidate(t.label, None if r.failure else r.score, t.rate, r.failure, t.beta)
            for t, r in zip(arm.trials, swept, strict=True)
        )
        return _Tried(arm, trial, candidates, tuple(runs))

    def _run(self, arm: str, trial: Trial, seed: int, report: Callable[[int], None]) -> Run:
        """One run, from the store if it is there."""
        store, first = self._store, seed == self._seeds[0]
        wanted = self._save and first  # of the other seeds only the numbers are wanted
        test = self._data.splits.get("test")
        samples = 0 if test is None else len(test)
        run = store.get(arm, trial, seed, samples=samples, adapter=wanted)
        if run is None:
            run = train_once(
                self._task,
                arm,
                trial,
                seed,
                adapter=store.adapter(arm, trial, seed) if wanted else None,
                state=store.checkpoint(arm, trial, seed) if self._resumable else None,
                measured=first,
                report=report,
            )
            store.put(run, trial)
            shutil.rmtree(store.checkpoint(arm, trial, seed), ignore_errors=True)
        report(self._steps)
        return run

    def _reports(self, arm: str, runs: int) -> Iterator[Callable[[int], None]]:
        """For each run of an arm, what tells how many of its steps are done."""
        for number in range(runs):
            yield partial(self._report, arm, number, runs)

    def _report(self, arm: str, number: int, runs: int, done: int) -> None:
        self._reporter(arm, number * self._steps + done, runs * self._steps)


def _check_finished(run: Run) -> None:
    if run.failure is not None:
        setting = f" ({run.setting})" if run.setting else ""
        raise FlexureError(
            f"expected the arm {run.arm}{setting} to train from seed {run.seed}, got: "
            f"{run.failure}; lower its learning rate, or leave the arm out"
        )


@contextmanager
def _stored(
    folder: str | os.PathLike[str] | None, task: Task, data: TuningData
) -> Iterator[RunStore]:
    """Where finished runs are: in the given folder, or in one that is deleted in the end."""
    library = versions()
    factors = repr(_factors(task, data.steps)).encode()
    parts = {
        "model": fingerprint(task.model),
        **data.digests(),
        "head": task.head,
        "where": repr(task.where),
        "training": f"{task.epochs} epochs of {data.steps} steps of {data.batch_size}",
        "head's learning rate": repr(float(task.head_learning_rate)),
        "schedule": hashlib.blake2b(factors, digest_size=16).hexdigest(),
        "library": f"flexure {library['flexure']}, torch {library['torch']}",
    }
    if folder is not None:
        yield RunStore(folder, parts)
        return
    with TemporaryDirectory(prefix="flexure-") as temporary:
        yield RunStore(temporary, parts)


def _keep(tried: Sequence[_Tried], runs: RunStore, seed: int, folder: Path) -> None:
    """Copies what the chosen settings learned from the first seed."""
    for one in tried:
        source = runs.adapter(one.arm.name, one.trial, seed)
        shutil.copytree(source, folder / one.arm.name, dirs_exist_ok=True)


def _result(one: _Tried, probe: _Tried, data: TuningData) -> ArmResult:
    """Only here test labels are used."""
    test = data.splits.get("test")
    found = None if test is None else compared(one.runs, probe.runs, test.labels)
    accuracy, accuracies, difference = found or (None, (), None)
    return ArmResult(
        name=one.arm.name,
        method=one.trial.settings,
        setting=one.trial.label,
        candidates=one.candidates,
        runs=one.runs,
        accuracy=accuracy,
        accuracies=accuracies,
        difference=difference,
    )


def _factors(task: Task, steps: int) -> tuple[float, ...]:
    """The factor on the learning rates at every step of a run."""
    schedule = task.schedule
    return tuple(1.0 if schedule is None else schedule(k) for k in range(task.epochs * steps))


def _check_head_rate(rate: object) -> None:
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not number or not 0 < rate <= _LARGEST_HEAD_RATE:  # type: ignore[operator]
        raise FlexureError(
            f"expected a head's learning rate above 0 and at most {_LARGEST_HEAD_RATE:g}, got "
            f"{rate!r}; {HEAD_LEARNING_RATE:g} is the published one"
        )


def _check(model: nn.Module, head: str | None) -> None:
    """Refuses what is wrong before any work."""
    if head is not None:
        head_module(model, head)
    if (there := adaptation_in_place(model)) is not None:
        raise FlexureError(
            f"expected a model without an adaptation in place, got one with {there.name!r}; "
            f"disable() or remove() it first"
        )
