"""Training a network anew by several methods, side by side, by the same rules.

Orchestration only: the methods are `flat_methods.py`'s table, one training is `flat_run.py`, what
is measured `flat_measured.py`, finished runs on disk `flat_store.py`, the result `flat_result.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import Batches, FlexureError
from flexure.data.augment import Augmentation
from flexure.fingerprints import content, fingerprint
from flexure.methods.backbone import Clock
from flexure.methods.features import device_of
from flexure.methods.flat_check import check_method
from flexure.methods.flat_measured import ATTACK
from flexure.methods.flat_methods import STANDARD, FlatMethod, flat_methods
from flexure.methods.flat_result import FlatRun, FlatTraining, Plane
from flexure.methods.flat_run import train_flat_once, weights_digest
from flexure.methods.flat_store import FlatStore
from flexure.methods.flat_task import OPTIMIZERS, FlatTask, Network, Recipe, Space
from flexure.methods.settings import check_counts, checked_seeds
from flexure.methods.tuning_data import TuningData
from flexure.models import RESIDUAL_FACTORS
from flexure.progress import Progress, ProgressReporter
from flexure.record import check_writable, code_digest, to_json, versions
from flexure.train.schedules import lcnn_schedule

__all__ = ["DEFAULTS", "RADII", "SEEDS", "train_flat"]

DEFAULTS: tuple[str, ...] = ("standard", "lcnn", "gradreg", "lcnn+gradreg")
"""What is trained unless told otherwise: the baseline and the paper's own."""

RADII: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
"""l2 radii of the attacks, those of the paper's Table 2."""

SEEDS: tuple[int, ...] = (42,)

_GRID = 200  # points a side of the map of two-dimensional data
_MARGIN = 0.25  # of the map around the data, as a share of their range


def train_flat(
    model: Network,
    *,
    train: Batches,
    val: Batches,
    test: Batches,
    methods: str | Sequence[str] = DEFAULTS,
    strengths: Mapping[str, float] | None = None,
    seeds: Sequence[int] = SEEDS,
    epochs: int = 200,
    batch_size: int = 128,
    optimizer: str = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    clip: float | None = None,
    keep: str = "last",
    augment: Augmentation | None = None,
    residual: str = "sum",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bounds: tuple[float, float] | None = None,
    samples: int = 1000,
    radii: Sequence[float] = RADII,
    device: torch.device | str | None = None,
    store: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> FlatTraining:
    """Trains one network by several methods, and measures what came of each.

    Every method starts from the same weights for the same seed, sees the same batches (with the
    same augmentation) in the same order, and is trained by `flexure.fit` with the same optimiser,
    schedule and number of epochs. The defaults are those that Low-Curvature Networks (Srinivas et
    al., 2022) states: SGD at 0.1 with momentum 0.9 and weight decay 5e-4, a tenth of the rate at
    3/4 and at 7/8 of the epochs (150 and 175 of 200), batches of 128, the weights of the last
    epoch. Learned betas and gammas have no weight decay: they have a penalty of their own.
    Nothing is chosen on test data.

    A method that cannot be applied to the network is an error, before any training: its changes are
    made, and its penalties and perturbation computed once, on a copy. A training
    that fails (its loss or a gradient is not finite, say) is a failed run, which the result tells;
    the others go on. What a network does not have (a ReLU network has no curvature rate) is
    recorded with the reason.

    Args:
        model: seed -> a new network, called with the default generator at that seed: the initial
            weights are then those of each seed. Or a network: a copy of it is trained on from the
            weights that it has, the same ones for all seeds; it is not changed.
        train: `(x, y)` batches, put together and shuffled anew in every epoch; tensors (B, *shape).
        val: for the validation accuracy of every epoch.
        test: what is reported, in a random order, not sorted by class: what is costly is measured
            on the first samples.
        methods: of `flexure.methods.flat_methods.METHODS`, or several with `+`.
        strengths: method -> its number (weight of its penalty, radius of its attack), where not the
            published one.
        seeds: of the runs of each method.
        epochs: of every run.
        batch_size: training samples a step.
        optimizer: `"sgd"` or `"adam"`.
        lr: learning rate; default: 0.1 for SGD, 1e-3 for Adam.
        momentum: of SGD.
        weight_decay: see above.
        clip: largest norm of the gradient of all parameters together; default: any.
        keep: `"last"`: the weights after the last epoch count; `"best"`: those after the epoch that
            is best on `val`.
        augment: random flips and crops of training images.
        residual: what becomes of residual sums where a network becomes an LCNN, see `to_lcnn`;
            an error where no method makes one.
        mean: one number a channel: inputs are pixels, and the network gets (x - mean)/std. All
            that is penalised, attacked and measured is in pixels then.
        std: likewise.
        bounds: of the inputs, (0, 1) for pixels: attacks keep to them.
        samples: of test and of training data each that geometry and attacks are measured on, the
            first ones; accuracy and calibration are measured on all test data.
        radii: l2 radii of the attacks, in input units.
        device: where to train; default: where the network is, or is made.
        store: folder of finished runs; the same comparison continues from it bit by bit, also amid
            a run, and with more methods or seeds; not under other code of flexure.
        weights: folder for the final weights of every run, one safetensors file each; a file of
            the same name is replaced, and deleted where the training fails.
        progress: True for a bar on stderr, or a callable (stage, done, total).

    Raises:
        FlexureError: a wrong argument, a method that does not fit the network, or a folder that
            holds runs of another comparison.
        SiteError: a method whose activations cannot be reached, or which finds none to replace.
        DataError: empty data, classes that are not 0, 1, 2, ..., splits that share samples, or a
            network of fewer classes.
    """
    asked, seeds = flat_methods(methods, strengths), checked_seeds(seeds)
    check_counts(epochs=epochs, batch_size=batch_size, samples=samples)
    _check_residual(residual, asked)
    rate = OPTIMIZERS.get(optimizer, 0.0) if lr is None else lr
    recipe = Recipe(epochs, optimizer, rate, momentum, weight_decay, clip, keep)
    space = Space(_floats(mean), _floats(std), _floats(bounds))  # type: ignore[arg-type]
    folder = None if weights is None else check_writable(weights)
    clock = Clock()
    where = _device(model, device)
    with clock("reading"):
        data = TuningData(_placed(where), train, val, test, batch_size, seeds[0], augment=augment)
        plane = _plane(data)
    task = FlatTask(
        network=model,
        device=where,
        space=space,
        recipe=recipe,
        schedule=lcnn_schedule(data.steps, epochs=epochs),
        residual=residual,
        train=data.train,
        val=data.in_order("val"),
        test=data.in_order("test"),
        measured_train=data.first_train(samples),
        measured=min(samples, len(data.splits["test"])),
        radii=_radii(radii),
        example=data.first(),
        grid=None if plane is None else _inputs(plane).to(where),
        measure_seed=seeds[0],
    )
    settings = _settings(task, asked, augment, data)
    with clock("checking"):  # before any training, which is lost time if a later method fails
        for method in asked:
            check_method(task, method, seeds[0], data.classes)
    with (
        _stored(store, task, data, settings) as runs,
        closing(ProgressReporter(progress)) as reporter,
    ):
        bench = _Bench(task, runs, seeds, reporter, clock, store is not None, folder)
        found = tuple(run for method in asked for run in bench.runs_of(method))
    return _result(task, data, asked, found, settings, clock, plane)


def _result(
    task: FlatTask,
    data: TuningData,
    methods: Sequence[FlatMethod],
    runs: tuple[FlatRun, ...],
    settings: Mapping[str, Any],
    clock: Clock,
    plane: Plane | None,
) -> FlatTraining:
    changed = {run.method: run.changed for run in runs}
    names = {method.name: method.told(changed.get(method.name, {})) for method in methods}
    sizes = {name: len(split) for name, split in data.splits.items()}
    return FlatTraining(
        methods=names,
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        runs=runs,
        baseline=STANDARD if STANDARD in names else next(iter(names)),
        radii=task.radii,
        samples={**sizes, "measured": task.measured},
        settings=settings,
        timing=dict(clock.seconds),
        told=_told(task, runs, data),
        plane=plane,
    )


class _Bench:
    """Runs methods, each from all seeds."""

    def __init__(
        self,
        task: FlatTask,
        store: FlatStore,
        seeds: tuple[int, ...],
        reporter: ProgressReporter,
        clock: Clock,
        resumable: bool,
        weights: Path | None,
    ) -> None:
        self._task, self._store, self._seeds = task, store, seeds
        self._reporter, self._clock = reporter, clock
        self._resumable, self._weights = resumable, weights

    def runs_of(self, method: FlatMethod) -> list[FlatRun]:
        """From the store where they are there."""
        with self._clock(method.name):
            return [self._run(method, seed) for seed in self._seeds]

    def _run(self, method: FlatMethod, seed: int) -> FlatRun:
        file = self._weights and self._weights / f"{method.name}-{seed}.safetensors"
        found = self._store.get(method, seed)
        if found is not None and self._is_whole(found, file):
            return found
        folder = self._store.checkpoint(method, seed) if self._resumable else None
        report = partial(self._report, f"{method.name}, seed {seed}")
        run = train_flat_once(self._task, method, seed, folder=folder, weights=file, report=report)
        self._store.put(run, method)
        return run

    @staticmethod
    def _is_whole(run: FlatRun, file: Path | None) -> bool:
        """Whether nothing is missing of a stored run: its weights are those in the file."""
        if run.failure is not None and file is not None:
            file.unlink(missing_ok=True)  # another comparison's
        if run.failure is not None or file is None:
            return True
        return run.weights is not None and weights_digest(file) == run.weights

    def _report(self, run: str, stage: str, done: int, total: int) -> None:
        self._reporter(f"{run}: {stage}", done, total)


@contextmanager
def _stored(
    folder: str | os.PathLike[str] | None,
    task: FlatTask,
    data: TuningData,
    settings: Mapping[str, Any],
) -> Iterator[FlatStore]:
    """Where finished runs are: in the given folder, or in one that is deleted in the end."""
    library = versions()
    test = hashlib.blake2b(content(data.splits["test"].labels), digest_size=16)
    # Methods and their numbers are each run's own.
    common = {k: repr(v) for k, v in settings.items() if k not in ("strengths", "seeds")}
    parts = {
        "model": fingerprint(task.start(task.measure_seed)),
        **data.digests(),
        "test labels": test.hexdigest(),
        **common,
        "measure seed": str(task.measure_seed),
        "library": f"flexure {library['flexure']}, torch {library['torch']}",
        "code of flexure": code_digest(),
    }
    if folder is not None:
        yield FlatStore(folder, parts)
        return
    with TemporaryDirectory(prefix="flexure-") as temporary:
        yield FlatStore(temporary, parts)


def _settings(
    task: FlatTask,
    methods: Sequence[FlatMethod],
    augment: Augmentation | None,
    data: TuningData,
) -> dict[str, Any]:
    """What was decided, by name, as JSON values."""
    strengths = {name: value for method in methods for name, value in method.strengths.items()}
    found: dict[str, Any] = {
        **asdict(task.recipe),
        "batch_size": data.batch_size,
        "steps_per_epoch": data.steps,
        "schedule": "x0.1 at 3/4 and at 7/8 of the updates",
        "augment": augment,
        "residual": task.residual,
        "mean": task.space.mean,
        "std": task.space.std,
        "bounds": task.space.bounds,
        "strengths": strengths,
        "start": "a network" if isinstance(task.network, nn.Module) else "a factory",
        "samples": task.measured,
        "radii": task.radii,
        "attack": repr(ATTACK),
    }
    return {name: to_json(value) for name, value in found.items()}


def _told(task: FlatTask, runs: Sequence[FlatRun], data: TuningData) -> tuple[str, ...]:
    """What a reader must know of all runs."""
    told = [f"{n} samples are in both {pair}" for pair, n in data.shared.items() if n]
    if isinstance(task.network, nn.Module):
        told.append("all trainings go on from the weights that the network had")
    elif len({run.seed for run in runs}) > 1 and len({run.start for run in runs}) == 1:
        told.append("the factory makes the same initial weights for every seed")
    if task.space.mean is not None:
        told.append("inputs are pixels, normalised inside the network: all numbers are per pixel")
    if task.space.bounds is None:
        told.append("inputs have no bounds that attacks keep to")
    if task.recipe.keep == "best":
        told.append("the weights are those of the epoch that is best on validation data")
    return tuple(told)


def _plane(data: TuningData) -> Plane | None:
    """The map of two-dimensional data."""
    points, labels = data.first_train(len(data.splits["train"]))[0]
    if not isinstance(points, Tensor) or points.shape[1:] != (2,):
        return None
    low, high = points.amin(0), points.amax(0)
    room = _MARGIN * (high - low)
    ends = zip((low - room).tolist(), (high + room).tolist(), strict=True)
    x, y = (torch.linspace(start, end, _GRID) for start, end in ends)
    return Plane(x, y, points.float().cpu(), labels.cpu())


def _inputs(plane: Plane) -> Tensor:
    """(G, G, 2) points of the map: rows along y, columns along x."""
    y, x = torch.meshgrid(plane.y, plane.x, indexing="ij")
    return torch.stack([x, y], -1)


def _placed(device: torch.device) -> nn.Module:
    """A module that is on a device, and draws nothing from a random generator."""
    module = nn.Module()
    module.register_buffer("place", torch.empty(0, device=device))
    return module


def _check_residual(residual: str, methods: Sequence[FlatMethod]) -> None:
    if residual not in RESIDUAL_FACTORS:
        raise FlexureError(
            f"expected residual (--residual) to be one of {', '.join(RESIDUAL_FACTORS)}, got "
            f"{residual!r}; choose one of them"
        )
    if residual != "sum" and not any(method.parts for method in methods):
        raise FlexureError(
            f"expected residual (--residual) with a method that makes an LCNN, got {residual!r} "
            f"without one; leave it out, or add lcnn"
        )


def _device(model: Network, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return device_of(model) if isinstance(model, nn.Module) else torch.device("cpu")


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def _radii(radii: Sequence[float]) -> tuple[float, ...]:
    given = tuple(radii)
    numbers = all(isinstance(r, Real) and not isinstance(r, bool) for r in given)
    if not given or not numbers or not 0 < min(given) <= max(given) < float("inf"):
        raise FlexureError(
            f"expected radii of attacks (--radii) above 0 and finite, got {radii!r}; give at least "
            f"one such number"
        )
    if len(set(given)) < len(given):
        raise FlexureError(f"expected each radius once, got {radii!r}; drop the repeated ones")
    return tuple(float(r) for r in given)
