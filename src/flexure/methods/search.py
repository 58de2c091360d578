"""Search over beta: which dial setting of a frozen backbone transfers best to labelled data.

Orchestration only: reading data is `samples`, features `features`, probes `probe`, interpolation
in beta `interpolation`, resuming `store`, and the result `search_result`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor, nn

from flexure.calling import map_tensors, take
from flexure.contracts import Batches, DataError, Example, FlexureError
from flexure.fingerprints import fingerprint
from flexure.methods.backbone import Backbone, Clock, Dial
from flexure.methods.comparison import Row, Trainer, compare
from flexure.methods.features import (
    FeatureReader,
    check_head,
    default_head,
    device_of,
    head_module,
)
from flexure.methods.samples import Samples, check_disjoint, check_labels, read_samples
from flexure.methods.search_result import (
    BetaSearch,
    FeatureInfo,
    Setting,
    TestScore,
    paired_gain,
    standard_error,
)
from flexure.methods.steer import Steering, steer
from flexure.progress import Progress, ProgressReporter
from flexure.record import versions
from flexure.store import Store
from flexure.surgery.sites import Where
from flexure.surgery.wrapped import unwrapped

__all__ = ["BETAS", "search_beta"]

BETAS: tuple[float, ...] = tuple(round(0.70 + 0.01 * i, 2) for i in range(30))
"""The paper's grid. It lacks beta = 1, which the search always adds."""

_MAX_SETTINGS = 10_000
_CACHE_BYTES = 2**30  # inputs up to this size are preprocessed once and kept

Mixture: TypeAlias = "float | Literal['balanced']"


def search_beta(
    model: nn.Module,
    *,
    train: Batches,
    val: Batches,
    head: str | None = None,
    betas: float | Sequence[float] | None = None,
    c: Mixture | Sequence[Mixture] = 0.5,
    protocol: Literal["converged", "published"] = "converged",
    features: Literal["exact", "interpolated"] = "exact",
    seed: int = 42,
    test: Batches | None = None,
    resume: str | os.PathLike[str] | None = None,
    example: Example | None = None,
    where: Where = None,
    progress: Progress = None,
) -> BetaSearch:
    """Finds the dial setting whose features a linear probe classifies best ([CT], section 3.2).

    For every setting the frozen, steered network's features are computed once and a probe is
    trained on `train`; the setting with the highest accuracy on `val` is chosen (of equals, the
    beta nearest 1, then the c nearest 0.5). beta = 1 is always among the settings; c has no effect
    there, so it occurs once. `test` is read for its labels, and run through the network only at
    the chosen setting and at the baseline. The model is unchanged afterwards.

    The baseline is beta = 1 where that is the original network, else (SiLU, GELU, ...) the
    untouched network, which then has its own probe.

    Interpolated features: the network is evaluated at 5 values of beta, and the features in
    between are those of the interpolating polynomial. At 2 further betas both are compared. Where
    the features are off by more than 10 %, or the validation accuracies by more than half their
    standard error (root mean square), features are computed everywhere, for each c on its own.
    The chosen setting's features are always computed, and its score is the one on them.

    Args:
        model: a pretrained network.
        train: `(x, y)` batches that can be iterated again and give the same samples in the same
            order; inputs up to 1 GiB are kept in memory, so that they are prepared only once.
        val: what the setting, and the probe's ridge or epoch, is chosen on.
        head: path of the module whose input are the features; default: the
            `nn.Linear` that gives the logits.
        betas: values in [0, 1], or one of them; default: the paper's 0.70, 0.71, ... 0.99.
        c: in [0, 1], `"balanced"` for beta²/(1+beta²), or several of them: both dials searched.
        protocol: "converged": logistic regression to convergence, ridge chosen on `val`;
            "published": the paper's 20 epochs of Adam.
        features: "exact" or "interpolated".
        seed: of the published probes; the paper's first.
        test: data for the gain. It must not share samples with the others.
        resume: folder where every finished setting is kept; the same search continues from it.
        example: an input to find the activation sites with; default: two training samples.
        where: the sites to steer, as in `steer`.
        progress: True for a bar on stderr, or a callable (stage, done, total).

    Raises:
        FlexureError: a dial out of range, over 10,000 settings, a seed below 0, an unknown
            protocol, a head that does not exist, does not give the logits or does not receive one
            vector per sample, a folder of another search.
        SiteError: no site to steer, or one that cannot be steered.
        DataError: empty data, one class, labels that are not 0, 1, 2, ..., a class that train
            lacks, splits that share samples, passes that differ, or non-finite features.
    """
    model = unwrapped(model)
    _check_seed(seed)
    rows = _grid(BETAS if betas is None else betas, c)
    _check_choice("protocol", protocol, ("converged", "published"))
    _check_choice("features", features, ("exact", "interpolated"))
    if head is not None:
        head_module(model, head)  # a wrong name is refused before any work
    clock, reporter = Clock(), ProgressReporter(progress)
    try:
        with clock("reading"):
            splits = _read(train=train, val=val, test=test)
            shared = {f"{b}-{a}": _shared(splits, a, b) for a, b in combinations(splits, 2)}
            classes = check_labels(*splits.values())
            example = _first(model, splits["train"]) if example is None else example
            head = default_head(model, example) if head is None else head
            check_head(model, head, example)
            parts = {} if resume is None else _fingerprint(model, splits, head)
        trainer = Trainer(splits, protocol, seed, device_of(model), clock, reporter)
        with steer(model, beta=1.0, example=example, where=where) as steering:
            store = None if resume is None else Store(resume, parts | _sites(steering))
            backbone = Backbone(
                FeatureReader(model, head), steering, splits, store, clock, reporter
            )
            settings, best, info = _choose(backbone, trainer, rows, features)
            # Only now test data may be looked at.
            own = _on_test(backbone, trainer, best, "test" in splits)
            baseline = _baseline(settings, steering, backbone, trainer)
            same = baseline is best
            before = own if same else _on_test(backbone, trainer, baseline, "test" in splits)
    finally:
        reporter.close()
    return BetaSearch(
        settings=settings,
        best=best,
        baseline=baseline,
        gain=None if own is None or before is None else paired_gain(own, before),
        test=None if own is None or before is None else _test_score(own, before),
        protocol=protocol,
        features=info,
        head=head,
        classes=classes,
        samples={name: len(split) for name, split in splits.items()},
        shared=shared,
        seed=seed,
        timing=dict(clock.seconds),
        report=steering.report,
        _model=model,
        _example=example,
        _where=where,
    )


def _choose(
    backbone: Backbone, trainer: Trainer, rows: Sequence[Row], features: str
) -> tuple[tuple[Setting, ...], Setting, FeatureInfo]:
    """All settings, the best of them on computed features, and how the features came about."""
    settings, info = compare(backbone, trainer, rows, features)
    # A computed score may be lower than the interpolated one: then another setting leads.
    while not (best := max(settings, key=_preference)).exact:
        dial = _dial(best)
        (computed,) = trainer.settings({dial: backbone.pair(dial)}, {dial})
        settings = tuple(computed if _dial(setting) == dial else setting for setting in settings)
    return settings, best, replace(info, evaluated=backbone.evaluated)


def _on_test(backbone: Backbone, trainer: Trainer, setting: Setting, given: bool) -> Tensor | None:
    """(N,) bool: which test samples the setting's probe gets right; None without test data."""
    return trainer.hits(setting, backbone.test(_dial(setting))) if given else None


def _read(**splits: Batches | None) -> dict[str, Samples]:
    """Reads and checks the splits that are given."""
    given = {name: batches for name, batches in splits.items() if batches is not None}
    for first, second in combinations(given, 2):
        if given[first] is given[second]:
            raise DataError(
                f"expected different data as {first} and {second}, got the same object; what is "
                f"trained on, chosen by and reported must be disjoint"
            )
    read: dict[str, Samples] = {}
    for name, batches in given.items():
        # Test inputs are needed at most twice, and not before the end.
        cache = 0 if name == "test" else _CACHE_BYTES // 2
        read[name] = read_samples(batches, name, cache_bytes=cache)
    return read


def _shared(splits: Mapping[str, Samples], first: str, second: str) -> int:
    return check_disjoint(splits[first], splits[second])


def _first(model: nn.Module, samples: Samples) -> Example:
    """Two samples, where the model is: enough to find the activation sites with."""
    x, batch = next(samples.inputs())
    device = device_of(model)
    example: Example = map_tensors(
        take(x, slice(0, 2), batch), lambda leaf: leaf.to(device, copy=True)
    )
    return example


def _grid(betas: object, c: object) -> tuple[Row, ...]:
    """The settings, one row for each choice of c; all rows end in the same beta = 1."""
    betas, mixtures = _several("betas", betas), _several("c", c)
    _check_numbers("beta", betas)
    _check_numbers("c", [mixture for mixture in mixtures if mixture != "balanced"])
    if not mixtures:
        raise FlexureError("expected at least one c, got none; leave c out for 0.5")
    below = sorted({float(beta) for beta in betas} - {1.0})
    if len(below) * len(mixtures) >= _MAX_SETTINGS:
        raise FlexureError(
            f"expected at most {_MAX_SETTINGS} settings, got {len(below)} betas for each of "
            f"{len(mixtures)} c; search a coarser grid first"
        )
    last = (1.0, _mixture(mixtures[0], 1.0))
    rows = (tuple((beta, _mixture(m, beta)) for beta in below) for m in mixtures)
    return tuple(dict.fromkeys((*row, last) for row in rows))


def _several(name: str, values: object) -> list[Any]:
    """One value or many, as a list."""
    if isinstance(values, Real | str):
        return [values]
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
        return values if isinstance(values, list) else [values]
    if not isinstance(values, Iterable):
        raise FlexureError(
            f"expected {name} as a number or a sequence of them, got {values!r}; leave it out for "
            f"the default"
        )
    return list(values)


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise FlexureError(f"expected a whole seed of at least 0, got {seed!r}; choose another")


def _mixture(mixture: Mixture, beta: float) -> float:
    if isinstance(mixture, str):
        return beta**2 / (1.0 + beta**2)  # leaves no mean shift
    return float(mixture)


def _check_numbers(name: str, values: Sequence[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            also = ' or "balanced"' if name == "c" else ""
            raise FlexureError(f"expected {name} in [0, 1]{also}, got {value!r}; correct it")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise FlexureError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")


def _preference(setting: Setting) -> tuple[float, float, float]:
    """Larger is better: the score, then closeness of beta to 1, then of c to 0.5."""
    beta, c = setting.beta or 0.0, setting.c or 0.0
    return setting.score, beta, -abs(c - 0.5)


def _dial(setting: Setting) -> Dial:
    return None if setting.beta is None or setting.c is None else (setting.beta, setting.c)


def _baseline(
    settings: Sequence[Setting], steering: Steering, backbone: Backbone, trainer: Trainer
) -> Setting:
    """beta = 1 if that is the original network, else the untouched network, newly scored."""
    steered = [site for site in steering.report.sites if site.name in steering.units]
    if all(site.exact_at_relu for site in steered):
        return settings[-1]
    (setting,) = trainer.settings({None: backbone.pair(None)}, {None})
    return setting


def _test_score(hits: Tensor, before: Tensor) -> TestScore:
    n = len(hits)
    best, baseline = int(hits.sum()) / n, int(before.sum()) / n
    return TestScore(best, standard_error(best, n), baseline, standard_error(baseline, n), n)


def _fingerprint(model: nn.Module, splits: Mapping[str, Samples], head: str) -> dict[str, str]:
    """What the features depend on besides the dials and the sites."""
    library = versions()
    return {
        "model": fingerprint(model),
        "train data": splits["train"].fingerprint,
        "validation data": splits["val"].fingerprint,
        "head": head,
        "library": f"flexure {library['flexure']}, torch {library['torch']}",
    }


def _sites(steering: Steering) -> dict[str, str]:
    rows = hashlib.blake2b(repr(steering.report.rows()).encode(), digest_size=16).hexdigest()
    return {"sites": f"{', '.join(steering.units)} ({rows})"}
