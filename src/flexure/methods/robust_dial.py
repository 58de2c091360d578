"""The dial for robustness: which beta and c, and which calibration, make a network most robust.

Orchestration only: what is given is checked in `robust_dial_setup`, dials are evaluated in
`robust_dial_bench`, chosen in `robust_dial_stages` and reported in `robust_dial_report`; the result
is in `robust_dial_result`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexure.attacks.norms import norm_named
from flexure.attacks.pgd import PGD
from flexure.contracts import Attack
from flexure.methods.attack_model import RADII
from flexure.methods.backbone import Clock
from flexure.methods.robust_dial_bench import Axis
from flexure.methods.robust_dial_data import Data, read_splits
from flexure.methods.robust_dial_groups import Groups
from flexure.methods.robust_dial_report import Report, Reporting
from flexure.methods.robust_dial_result import RobustDialSearch
from flexure.methods.robust_dial_setup import (
    DialSettings,
    Space,
    Subject,
)
from flexure.methods.robust_dial_stages import Stages
from flexure.processes import current_processes
from flexure.progress import Progress, ProgressReporter
from flexure.surgery.sites import Where

__all__ = ["DIAL_BETAS", "DIAL_CS", "search_robust_dial"]

DIAL_BETAS: tuple[float, ...] = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)

DIAL_CS: tuple[float, ...] = (0.0, 0.1, 0.15, 0.25, 0.35, 0.5)
"""The paper's 0.5, and below."""

_STEPS = 8
"""Of the attack of the search: enough to tell dials apart, not to report them."""


def search_robust_dial(
    model: nn.Module,
    *,
    val: Data,
    test: Data | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    norm: str = "linf",
    eps: float = 1 / 255,
    radii: Sequence[float] | None = None,
    betas: Sequence[float] = DIAL_BETAS,
    cs: Sequence[float] = DIAL_CS,
    groups: Groups | None = "layers",
    search: str | None = "evolutionary",
    budget: int = 120,
    starts: int = 1,
    calibration: Iterable[Any] | Tensor | None = None,
    matches: Sequence[str | None] = (None, "mean", "mean+std"),
    clean_loss: float = 0.01,
    attack: Attack | None = None,
    report_attack: str | Attack = "apgd-ce",
    report_radii: Sequence[float] | None = None,
    oracle: bool = True,
    seed: int = 42,
    batch_size: int = 128,
    where: Where = None,
    axis: Axis = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> RobustDialSearch:
    """Finds the dial at which a steered network is most robust, without losing clean accuracy.

    1. Every beta with every c and every calibration, the same for all sites.
    2. From the best of these on, a dial for each group of sites.
    3. Chosen is what has the highest objective (`robust_dial_stages.DialObjective`: robust accuracy
       and margins under a cheap attack) of all candidates whose clean accuracy is not more than
       `clean_loss` below the plain network's. All of this on validation data only.
    4. The best dials of each kind are attacked by a stronger attack on the test data.

    Several processes search alike, each everything; the attacks of the report they share. Whoever
    calls it on several must give all of them the same arguments.

    The model is left as it was. beta = 1 is always among the candidates, once where it is the plain
    network; where activations are smooth it is not, but another network with kinks, and tried with
    every calibration.

    Args:
        model: a classifier of normalised inputs, or a `Bounded`.
        val: what dials are chosen on: `(x, y)` batches, or one pair of tensors; x (B, *shape)
            within the bounds, before normalisation.
        test: what is reported on. It must not share samples with `val`.
        mean: of the normalisation, one number a channel; not with a `Bounded`, which has its own.
        std: likewise.
        bounds: lowest and highest value of inputs.
        norm: "linf" or "l2".
        eps: the radius that the dial is chosen for.
        radii: others, for the curve and the report; `eps` is added; None: those usual for the
            norm (`attack_model.RADII`).
        betas: of the shared dial, in [0, 1]; 1 is added.
        cs: of the shared dial, in [0, 1].
        groups: "layers" (by the outermost module), "sites" (each apart), or name -> patterns; None:
            shared dials only.
        search: "evolutionary", "coordinate" or "greedy"; None: shared dials only.
        budget: candidates of the group search, for each of its starts.
        starts: how many shared dials groups are searched from: the best of each of so many
            calibrations.
        calibration: unlabelled inputs before normalisation, a tensor or batches, none of them of
            `test`; None: those of `val`.
        matches: what calibration keeps, of None (no calibration), "mean", "mean+std".
        clean_loss: by how much clean accuracy may fall, as a share: on validation data.
        attack: of the search, cheap; None: 8 steps of `PGD` from the input on.
        report_attack: a name of `attacks.catalogue.ATTACKS`, or an `Attack`.
        report_radii: that the report is made at; None: all of `radii`.
        oracle: whether to evaluate all shared dials on the test data too, by the attack of the
            search.
        seed: of everything random.
        batch_size: samples at a time.
        where: the sites to steer, as in `steer`.
        axis: channel axis where the producing layer does not tell it, as in `steer`: calibration
            needs one.
        resume: folder of finished parts; the same search continues from it.
        progress: True for a bar on stderr, or a callable (stage, done, total).

    Raises:
        DataError: no samples, splits that share samples, or that the model does not take.
        FlexureError: settings, inputs or models that do not fit.
        SiteError: no site to steer, or one that cannot be steered.
    """
    norm_named(norm)
    cheap = PGD(norm=norm, steps=_STEPS, random_start=False) if attack is None else attack
    settings = DialSettings(
        norm, eps, RADII[norm] if radii is None else radii, report_radii, betas, cs, matches,
        search, budget, starts, clean_loss, cheap, report_attack, seed, batch_size,
    )  # fmt: skip
    bounded = Space(mean, std, bounds).bounded(model)
    splits, both = read_splits(val, test)
    subject = Subject(
        bounded, splits, calibration=calibration, groups="layers" if groups is None else groups,
        where=where, axis=axis, settings=settings, folder=resume,
    )  # fmt: skip
    by = None if groups is None else search
    folder = None if resume is None else Path(resume) / "report"
    clock = Clock()
    reporter = ProgressReporter(progress if current_processes().is_first else None)
    try:
        stages, report = _searched(subject, settings, by, folder, oracle, clock, reporter)
    finally:
        subject.model.close()
        reporter.close()
    chosen = stages.best()
    return RobustDialSearch(
        tuple(stages.candidates), chosen, report.rows, report.oracle, report.curve, subject.groups,
        norm, float(eps), settings.all_radii, float(clean_loss), *settings.attack_names,
        {name: len(split) for name, split in splits.items()}, both, seed,
        subject.model.plain_at_one, (*subject.notes, *report.notes), dict(clock.seconds),
        subject.model.installer(chosen.dial, subject.digest),
    )  # fmt: skip


def _searched(
    subject: Subject,
    settings: DialSettings,
    search: str | None,
    folder: Path | None,
    oracle: bool,
    clock: Clock,
    reporter: ProgressReporter,
) -> tuple[Stages, Report]:
    """All stages, and the report on test data if there are any."""
    with clock("shared dials"):
        benches = subject.benches()
        stages = Stages(benches["val"], settings, reporter)
        stages.shared()
    if search is not None:
        with clock("group dials"):
            stages.groups(tuple(subject.groups), search)
    if "test" not in benches:
        return stages, Report((), None, ())
    # Only now anything on test data is measured.
    reporting = Reporting(benches["test"], settings, folder, reporter)
    with clock("test"):
        return stages, reporting.report(tuple(stages.candidates), stages.best(), oracle=oracle)
