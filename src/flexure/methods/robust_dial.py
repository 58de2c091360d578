"""The dial for robustness: which beta and c, and which calibration, make a network most robust.

Orchestration only: dials are evaluated in `robust_dial_bench`, moved in `robust_dial_moves`, and
reported in `robust_dial_report`; the result is in `robust_dial_result`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded
from flexure.attacks.pgd import PGD
from flexure.contracts import Attack, Batches, DataError, FlexureError
from flexure.fingerprints import described, fingerprint, tensor_digest
from flexure.methods.backbone import Clock
from flexure.methods.robust_dial_bench import DialBench, DialledModel, Outcome
from flexure.methods.robust_dial_groups import ALL_SITES, Groups, site_groups
from flexure.methods.robust_dial_moves import SEARCHES, Point
from flexure.methods.robust_dial_report import Report, TestData
from flexure.methods.robust_dial_result import DialCandidate, RobustDial, RobustDialSearch
from flexure.methods.samples import Samples, check_disjoint, read_samples
from flexure.methods.steer import Steering
from flexure.progress import Progress, ProgressReporter
from flexure.record import versions
from flexure.store import Store
from flexure.surgery.census import sites
from flexure.surgery.sites import Where
from flexure.surgery.wrapped import unwrapped

__all__ = ["DIAL_BETAS", "DIAL_CS", "search_robust_dial"]

DIAL_BETAS: tuple[float, ...] = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
DIAL_CS: tuple[float, ...] = (0.0, 0.1, 0.15, 0.25, 0.35, 0.5)
"""The paper's 0.5, and below, where uncalibrated networks keep their means better."""

_RADII = tuple(k / 255 for k in (0.5, 1, 2, 4, 8))
_STEPS = 8
_SOFTNESS = 0.15
_FORFEIT = 3.0

Data: TypeAlias = "Batches | tuple[Tensor, Tensor]"


@dataclass(frozen=True)
class _Objective:
    """What the search maximises, so that candidates of equal counts differ.

    J = ½ mean σ(m/t) + ½ r − 3 max(0, p − a − ½ loss),

    with m the margins under attack, t 0.15 times the median |margin| without (which makes J free of
    the scale of the logits), r and a the robust and the clean accuracy, and p the plain network's
    clean accuracy. Counts alone move in steps of 1/N, so that a small change of a dial often shows
    in none of them, and what it shows is luck; σ(m/t) tells how far samples are from the boundary.
    """

    plain: float
    clean_loss: float

    def __call__(self, found: Outcome, robust: float) -> float:
        sizes = found.margins[found.margins.isfinite()].abs()
        scale = float(sizes.median()) if len(sizes) else 1.0
        soft = torch.sigmoid(found.attacked / max(_SOFTNESS * scale, 1e-12)).mean()
        lost = max(0.0, self.plain - self.clean_loss / 2 - found.clean)
        return 0.5 * float(soft) + 0.5 * robust - _FORFEIT * lost

    def allowed(self, found: Outcome) -> bool:
        return found.clean >= self.plain - self.clean_loss - 1e-9


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
    radii: Sequence[float] = _RADII,
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
    resume: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> RobustDialSearch:
    """Finds the dial at which a steered network is most robust, without losing clean accuracy.

    1. Every beta with every c and every calibration, the same for all sites.
    2. From the best of these on, a dial for each group of sites.
    3. Chosen is what has the highest objective (`_Objective`: robust accuracy and margins under a
       cheap attack) of all candidates whose clean accuracy is not more than `clean_loss` below the
       plain network's. All of this on validation data only.
    4. The best dials of each kind are attacked by a stronger attack on the test data.

    The model is left as it was. beta = 1, where c and calibration have no effect, is always among
    the candidates, once.

    Args:
        model: a classifier of normalised inputs, or a `Bounded`.
        val: what dials are chosen on: `(x, y)` batches, or one pair of tensors; x (B, *shape)
            within the bounds, before normalisation.
        test: what is reported on. It must not share samples with `val`.
        mean: of the normalisation, one number a channel.
        std: likewise.
        bounds: lowest and highest value of inputs.
        norm: "linf" or "l2".
        eps: the radius that the dial is chosen for.
        radii: others, for the curves; `eps` is added.
        betas: of the shared dial, in [0, 1]; 1 is added.
        cs: of the shared dial, in [0, 1].
        groups: "layers" (by the outermost module), "sites" (each apart), or name -> patterns; None:
            shared dials only.
        search: "evolutionary", "coordinate" or "greedy"; None: shared dials only.
        budget: candidates of the group search, for each of its starts.
        starts: how many shared dials groups are searched from: the best of each of so many
            calibrations.
        calibration: unlabelled inputs before normalisation, a tensor or batches; None: those of
            `val`.
        matches: what calibration keeps, of None (no calibration), "mean", "mean+std".
        clean_loss: by how much clean accuracy may fall, as a share: on validation data.
        attack: of the search, cheap; None: 8 steps of `PGD` from the input on.
        report_attack: a name of `attacks.catalogue.ATTACKS`, or an `Attack`.
        report_radii: that the report is made at; None: all of `radii`.
        oracle: whether to evaluate all shared dials on the test data too.
        seed: of everything random.
        batch_size: samples at a time.
        where: the sites to steer, as in `steer`.
        resume: folder of finished parts; the same search continues from it.
        progress: True for a bar on stderr, or a callable (stage, done, total).

    Raises:
        DataError: no samples, or splits that share samples.
        FlexureError: settings, inputs or models that do not fit.
        SiteError: no site to steer, or one that cannot be steered.
    """
    settings = _Settings(norm, eps, tuple(radii), tuple(betas), tuple(cs), tuple(matches))
    cheap = PGD(norm=norm, steps=_STEPS, random_start=False) if attack is None else attack
    settings.check(cheap, search, budget, clean_loss)
    bounded = _bounded(model, mean, std, bounds)
    device = next((p.device for p in bounded.model.parameters()), torch.device("cpu"))
    clock, reporter = Clock(), ProgressReporter(progress)
    read, shared = _read(val, test)
    x, y = _tensors(read["val"], device)
    inputs = x if calibration is None else _inputs(calibration, device)
    example = _normalised(bounded, x[:2])
    names = [site.name for site in sites(bounded.model, example).select(where)]
    grouped = site_groups(names, "layers" if groups is None else groups)
    dialled = DialledModel(
        bounded, grouped, example=example, where=where, calibration=[_normalised(bounded, inputs)]
    )
    common = {
        "model": fingerprint(bounded), "calibration": tensor_digest(inputs), "norm": norm,
        "attack": described(cheap), "eps": repr(settings.eps), "seed": str(seed),
        "sites": ", ".join(names), "library": str(versions()["flexure"]),
    }  # fmt: skip
    bench = DialBench(
        dialled, x, y, attack=cheap, eps=settings.eps, seed=seed, batch_size=batch_size,
        store=_store(resume, "validation", common, x, y),
    )  # fmt: skip
    try:
        stages = _Stages(bench, settings, reporter, clean_loss)
        with clock("shared dials"):
            stages.shared()
        if groups is not None and search is not None:
            with clock("group dials"):
                stages.groups(tuple(grouped), search, budget, starts, seed)
        candidates = tuple(stages.candidates)
        chosen = stages.best()
        # Only now test data may be looked at.
        report = Report((), None, ())
        if "test" in read:
            xt, yt = _tensors(read["test"], device)
            data = TestData(
                DialBench(
                    dialled, xt, yt, attack=cheap, eps=settings.eps, seed=seed,
                    batch_size=batch_size, store=_store(resume, "test", common, xt, yt),
                ),
                xt, yt, norm, settings.eps, settings.all_radii,
                settings.all_radii if report_radii is None else
                tuple(sorted({*report_radii, settings.eps})),
                report_attack, clean_loss, seed, batch_size,
                None if resume is None else Path(resume) / "report", reporter,
            )  # fmt: skip
            with clock("test"):
                report = data.report(candidates, chosen, settings.grid(), oracle=oracle)
    finally:
        dialled.close()
        reporter.close()

    def installed() -> Steering:
        if chosen.dial is None:
            raise FlexureError("expected a dial to install, got none: the plain network is best")
        return dialled.steered(chosen.dial)

    return RobustDialSearch(
        candidates, chosen, report.rows, report.oracle, report.curve, grouped, norm, settings.eps,
        settings.all_radii, clean_loss, repr(cheap),
        report_attack if isinstance(report_attack, str) else repr(report_attack),
        {name: len(split) for name, split in read.items()}, shared, seed, dict(clock.seconds),
        installed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Settings:
    norm: str
    eps: float
    radii: tuple[float, ...]
    betas: tuple[float, ...]
    cs: tuple[float, ...]
    matches: tuple[str | None, ...]

    @property
    def all_radii(self) -> tuple[float, ...]:
        return tuple(sorted({*self.radii, self.eps}))

    def grid(self) -> tuple[RobustDial, ...]:
        """Every shared dial; beta = 1 last, once."""
        below = sorted({float(beta) for beta in self.betas} - {1.0})
        found = [
            _shared(beta, c, match) for match in self.matches for c in self.cs for beta in below
        ]
        return (*found, _shared(1.0, self.cs[0], None))

    def check(self, attack: Attack, search: str | None, budget: int, clean_loss: float) -> None:
        if attack.norm != self.norm:
            raise FlexureError(
                f"expected an attack in {self.norm}, got one in {attack.norm}; give its norm"
            )
        if search is not None and search not in SEARCHES:
            raise FlexureError(
                f"expected search among {', '.join(SEARCHES)} or None, got {search!r}"
            )
        if not self.cs or not self.matches or not self.betas:
            raise FlexureError("expected at least one beta, c and match, got none; leave them out")


def _shared(beta: float, c: float, match: str | None) -> RobustDial:
    return RobustDial({ALL_SITES: float(beta)}, {ALL_SITES: float(c)}, match)


class _Stages:
    """The candidates, stage after stage."""

    def __init__(
        self, bench: DialBench, settings: _Settings, reporter: ProgressReporter, clean_loss: float
    ) -> None:
        self._bench, self._settings, self._reporter = bench, settings, reporter
        plain = bench(None, settings.all_radii)
        self._objective = _Objective(plain.clean, clean_loss)
        self.candidates = [self._candidate(None, "plain", plain)]

    def shared(self) -> None:
        """Every shared dial."""
        grid = self._settings.grid()
        for done, dial in enumerate(grid, 1):
            found = self._bench(dial, self._settings.all_radii)
            self.candidates.append(self._candidate(dial, "shared", found))
            self._reporter("shared dials", done, len(grid))

    def groups(
        self, names: tuple[str, ...], search: str, budget: int, starts: int, seed: int
    ) -> None:
        """A dial for each group, from the best shared dials on."""
        for number, start in enumerate(self._starts(starts)):
            dial = start.dial
            if dial is None:
                continue
            here: Point = (
                *[dial.betas[ALL_SITES]] * len(names), *[dial.cs[ALL_SITES]] * len(names)
            )  # fmt: skip
            moves = SEARCHES[search](here, start.objective, seed)
            point = next(moves, None)
            for done in range(1, budget + 1):
                if point is None:
                    break
                found = self._tried(names, point, dial.match)
                self._reporter(f"group dials, start {number + 1}", done, budget)
                try:
                    point = moves.send(found.objective)
                except StopIteration:
                    break

    def best(self) -> DialCandidate:
        """Of all that are allowed, the highest objective; of equals the first."""
        return max((one for one in self.candidates if one.allowed), key=lambda one: one.objective)

    def _starts(self, count: int) -> list[DialCandidate]:
        """The best shared dial of each calibration, best first."""
        found: dict[str | None, DialCandidate] = {}
        shared = [one for one in self.candidates if one.stage == "shared" and one.allowed]
        for one in sorted(shared, key=lambda one: -one.objective):
            if one.dial is not None:
                found.setdefault(one.dial.match, one)
        return list(found.values())[:count]

    def _tried(self, names: tuple[str, ...], point: Point, match: str | None) -> DialCandidate:
        betas, cs = point[: len(names)], point[len(names) :]
        dial = RobustDial(
            dict(zip(names, betas, strict=True)), dict(zip(names, cs, strict=True)), match
        )
        candidate = self._candidate(dial, "groups", self._bench(dial, ()))
        self.candidates.append(candidate)
        return candidate

    def _candidate(self, dial: RobustDial | None, stage: str, found: Outcome) -> DialCandidate:
        robust = {eps: float(hits.double().mean()) for eps, hits in sorted(found.robust.items())}
        objective = self._objective(found, robust[self._settings.eps])
        allowed = self._objective.allowed(found)
        return DialCandidate(dial, stage, found.clean, robust, objective, allowed)


def _bounded(
    model: nn.Module,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    bounds: tuple[float, float] | None,
) -> Bounded:
    if isinstance(model, Bounded):
        mean, std, bounds, model = model.mean, model.std, model.bounds, model.model
    return Bounded(unwrapped(model), mean=mean, std=std, bounds=bounds)


def _normalised(bounded: Bounded, x: Tensor) -> Tensor:
    """What the model inside is given."""
    inner = Bounded(nn.Identity(), mean=bounded.mean, std=bounded.std, bounds=None)
    found: Tensor = inner.to(x.device)(x)
    return found


def _read(val: Data, test: Data | None) -> tuple[dict[str, Samples], int]:
    """The splits, and how many samples they share."""
    if test is val:
        raise DataError(
            "expected different data as val and test, got the same object; what is chosen by and "
            "reported must be disjoint"
        )
    given = {"val": val} if test is None else {"val": val, "test": test}
    read = {}
    for name, data in given.items():
        pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
        batches: Any = [data] if pair else data
        read[name] = read_samples(batches, name, cache_bytes=2**40)
    return read, check_disjoint(read["test"], read["val"]) if "test" in read else 0


def _tensors(samples: Samples, device: torch.device) -> tuple[Tensor, Tensor]:
    parts = [x for x, _ in samples.inputs()]
    if not all(isinstance(x, Tensor) and x.shape[1:] == parts[0].shape[1:] for x in parts):
        raise DataError(
            f"expected {samples.name} inputs that are tensors of one shape, got others; attacks "
            f"change one tensor"
        )
    return torch.cat([x.to(device) for x in parts]), samples.labels.to(device)


def _inputs(calibration: Iterable[Any] | Tensor, device: torch.device) -> Tensor:
    if isinstance(calibration, Tensor):
        return calibration.to(device)
    parts = [one[0] if isinstance(one, tuple | list) else one for one in calibration]
    if not parts or not all(isinstance(one, Tensor) for one in parts):
        raise DataError("expected calibration inputs as tensors, got none or others; give batches")
    return torch.cat([one.to(device) for one in parts])


def _store(
    resume: str | os.PathLike[str] | None, name: str, common: dict[str, str], x: Tensor, y: Tensor
) -> Store | None:
    if resume is None:
        return None
    parts = common | {"data": tensor_digest(x), "labels": tensor_digest(y)}
    return Store(Path(resume) / name, parts, holds="evaluated dials")
