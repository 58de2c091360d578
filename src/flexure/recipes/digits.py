"""Transfer of scikit-learn's digits 0-4 to 5-9: does the searched beta help, over several seeds?

A small ReLU network is trained on one half of the classes; a linear probe on its frozen features
learns the other half from few labelled images, at every beta. The demo shows this recipe, whatever
comes out. Nothing in it but the method is from the papers. The network and the grid of betas were
chosen on seeds 0-4 and 42-46, which are therefore not among those that are reported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from flexure.calling import seeded
from flexure.contracts import Batches, FlexureError, LabelledData
from flexure.data import Splits, batches, load_data, only_classes, split
from flexure.methods.probe import fit_probes
from flexure.methods.search import search_beta
from flexure.methods.search_result import BetaSearch, Gain, TestScore
from flexure.models.mlp import MLP
from flexure.record import record, write_json
from flexure.report import (
    Estimate,
    Section,
    Table,
    estimates,
    gain_text,
    percent,
    run_table,
    search_sections,
    table_of,
    verdict,
    write_page,
)
from flexure.train.fit import fit

__all__ = ["Config", "Findings", "Pooled", "Transfer", "measure", "run", "sections"]

SHOWS = (
    "What choosing beta on validation images does to the test accuracy of a linear probe, for this "
    "network and these images, with test images that took no part in any choice.",
    "How much that changes from one split and one training of the network to the next.",
)
DOES_NOT_SHOW = (
    "That this network is the way to read these digits: the same probe on the raw pixels is better "
    "still (see the table). Lower betas make the network more nearly linear, and its features "
    "closer to the pixels; on these easy images that is what helps.",
    "That other networks gain as much. On the seeds with which this recipe was made, the gain was "
    "2 points with two hidden layers of 64, 5 with three of 128, 20 with six of 64 (whose features "
    "were much worse to begin with), and 0 for a small convolutional network.",
    "What would happen on other images: all seeds share the same 896 images of 5-9, so the "
    "interval over seeds covers the split and the training, not a new source of data.",
    "That the chosen beta is the best one: the values within one standard error of it cannot be "
    "told apart from it.",
)


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: one network, one split and one search each; at least two.
        hidden: widths of the hidden layers.
        epochs: of the network's training on digits 0-4 (Adam, 0.001).
        batch_size: of that training.
        test_share: share of the images of 5-9 that only the report sees.
        val_share: share of the remaining images by which beta is chosen; the probe learns from the
            rest.
        betas: what is searched. The paper's 0.70 ... 0.99 end before anything happens in this
            network, whose units have small inputs.
        c: the second dial; the paper's default.
    """

    seeds: tuple[int, ...] = tuple(range(50, 60))
    hidden: tuple[int, ...] = (128, 128, 128)
    epochs: int = 30
    batch_size: int = 32
    test_share: float = 0.5
    val_share: float = 0.5
    betas: tuple[float, ...] = tuple(i / 20 for i in range(21))
    c: float = 0.5

    @classmethod
    def small(cls, *, seed: int = 50) -> Config:
        """Half of the seeds, from `seed` on."""
        return cls(seeds=tuple(range(seed, seed + 5)))


@dataclass(frozen=True)
class Transfer:
    """One seed.

    Attributes:
        seed: of the split and the training.
        source_accuracy: of the network on held-out images of the digits it was trained on, in
            [0, 1].
        search: the search on the other digits.
        gain: its gain on test images.
        test: its accuracies on test images.
        pixels: test accuracy of the same probe on the raw pixels, without a network, in [0, 1].
    """

    seed: int
    source_accuracy: float
    search: BetaSearch
    gain: Gain
    test: TestScore
    pixels: float


@dataclass(frozen=True)
class Pooled:
    """Mean gain over seeds in percentage points, with its 95 % t-interval.

    Attributes:
        points: the mean.
        low: lower end of the interval.
        high: upper end.
        wins: seeds with a gain above 0.
        losses: seeds with a gain below 0.
    """

    points: float
    low: float
    high: float
    wins: int
    losses: int


@dataclass(frozen=True)
class Findings:
    """All seeds, and what they say together."""

    transfers: tuple[Transfer, ...]
    pooled: Pooled


def run(
    config: Config, out: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measures, writes `digits.json` and `digits.html` into `out`, and returns the results.

    `progress` is told of every stage, one line each.
    """
    findings = measure(config, progress=progress)
    results = record(config=config, seed=config.seeds[0], numbers=numbers(findings))
    write_json(Path(out) / "digits.json", results)
    write_page(
        Path(out) / "digits.html",
        title="Digits 0-4 transferred to 5-9",
        summary=summary(findings),
        sections=sections(findings),
        shows=SHOWS,
        does_not_show=DOES_NOT_SHOW,
        run=run_table(results),
    )
    return results


def measure(config: Config, *, progress: Callable[[str], None] | None = None) -> Findings:
    """Trains and searches once for each seed.

    Args:
        config: the settings.
        progress: is told of every stage, one line each.

    Raises:
        FlexureError: fewer than two seeds.
    """
    if len(config.seeds) < 2:
        raise FlexureError(
            f"expected at least two seeds, to say how much they differ, got {config.seeds}"
        )
    data = load_data("sklearn:digits")["train"]
    transfers = []
    for number, seed in enumerate(config.seeds, start=1):
        if progress is not None:
            progress(f"digits: seed {seed} ({number} of {len(config.seeds)})")
        transfers.append(_transfer(config, data, seed))
    return Findings(tuple(transfers), pool([t.gain.points for t in transfers]))


def pool(gains: Sequence[float]) -> Pooled:
    """Mean, t-interval (mean ± t · sd / √n, n - 1 degrees of freedom), wins and losses."""
    from scipy.stats import t

    mean, count = fmean(gains), len(gains)
    half = float(t.ppf(0.975, count - 1)) * stdev(gains) / math.sqrt(count)
    return Pooled(
        mean, mean - half, mean + half, sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    )


def numbers(findings: Findings) -> dict[str, Any]:
    """The measured numbers; shares in [0, 1], gains in percentage points."""
    return {
        "seeds": [
            {
                "seed": t.seed,
                "source_accuracy": t.source_accuracy,
                "pixel_accuracy": t.pixels,
                "search": t.search.to_dict(),
            }
            for t in findings.transfers
        ],
        "pooled": findings.pooled,
    }


def summary(findings: Findings) -> tuple[str, ...]:
    """What was found, in sentences; every interval is a 95 % t-interval over seeds."""
    pooled, transfers = findings.pooled, findings.transfers
    chosen = [t.search.best_beta for t in transfers]
    same = len(transfers) - pooled.wins - pooled.losses
    return (
        f"Digits, {len(transfers)} seeds: choosing beta on validation images changed the test "
        f"accuracy by {gain_text(pooled.points, pooled.low, pooled.high)}, from "
        f"{_mean([t.test.baseline for t in transfers])} at beta = 1; of the seeds, {pooled.wins} "
        f"gained, {pooled.losses} lost, {same} stayed. {verdict(pooled.low, pooled.high)}",
        f"The chosen beta lay between {min(chosen):.4g} and {max(chosen):.4g}. The same probe on "
        f"the raw pixels, without any network: {_mean([t.pixels for t in transfers])}.",
        "The digits' intervals are t-intervals over seeds, and all seeds share the same images.",
    )


def sections(findings: Findings) -> list[Section]:
    """The parts of a report: one search in full, all seeds, the sites."""
    first = findings.transfers[0]
    rows = [_estimate(f"seed {t.seed}", t.gain) for t in findings.transfers]
    score, steered = search_sections(first.search, title=f"Score against beta, seed {first.seed}")
    return [
        score,
        Section(
            "What the chosen beta gained",
            ("Each seed has a network, a split and a search of its own.",),
            (
                estimates(
                    [*rows, _estimate("all seeds", findings.pooled)],
                    axis="gain in test accuracy over beta = 1 (percentage points)",
                    highlight=("all seeds",),
                ),
            ),
            _seed_table(findings.transfers),
            "Seeds: 95 % paired bootstrap over test images. All seeds: mean with its 95 % "
            "t-interval over seeds; they share the same images, so they are not independent.",
        ),
        steered,
    ]


def _transfer(config: Config, data: LabelledData, seed: int) -> Transfer:
    source = split({"train": only_classes(data, range(5))}, seed=seed)
    target = split(
        {"train": only_classes(data, range(5, 10))},
        seed=seed,
        sizes={"test": config.test_share, "val": config.val_share},
    )
    with seeded(seed):
        model = MLP((64, *config.hidden, 5))
    fit(
        model,
        _batches(source.train, config, seed=seed, shuffle=True),
        epochs=config.epochs,
        seed=seed,
    )
    model.eval()
    search = search_beta(
        model,
        train=_batches(target.train, config),
        val=_batches(target.val, config),
        test=_batches(target.test, config),
        betas=config.betas,
        c=config.c,
        seed=seed,
    )
    if search.gain is None or search.test is None:  # only without test data
        raise RuntimeError("expected the search to report on the test data it was given")
    x, y = _whole(source.test, config)
    with torch.no_grad():
        held_out = _share(model(x), y)
    return Transfer(
        seed, held_out, search, search.gain, search.test, _pixel_accuracy(target, config)
    )


def _batches(data: LabelledData, config: Config, **order: Any) -> Batches:
    return batches(data, preprocess=_preprocess, batch_size=config.batch_size, cache=True, **order)


def _preprocess(image: Tensor) -> Tensor:
    """`(1, 8, 8)` uint8 -> `(64,)` in [0, 1]."""
    return image.float().flatten() / 255


def _pixel_accuracy(target: Splits, config: Config) -> float:
    """What the probe makes of the images themselves, trained and chosen on the same data."""
    (x, y), (x_val, y_val), (x_test, y_test) = (
        _whole(part, config) for part in (target.train, target.val, target.test)
    )
    (probe,) = fit_probes([x], y, val_features=[x_val], val_labels=y_val)
    return _share(probe.logits(x_test), y_test)


def _whole(data: LabelledData, config: Config) -> tuple[Tensor, Tensor]:
    """All samples as one batch."""
    xs, ys = zip(*_batches(data, config), strict=True)
    return torch.cat(xs), torch.cat(ys)


def _share(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _mean(shares: Sequence[float]) -> str:
    """Mean over seeds, with its interval, in per cent."""
    mean = pool([100 * share for share in shares])
    return f"{mean.points:.1f} % ({mean.low:.1f} to {mean.high:.1f})"


def _estimate(label: str, gain: Gain | Pooled) -> Estimate:
    return Estimate(label, gain.points, gain.low, gain.high)


def _seed_table(transfers: Sequence[Transfer]) -> Table:
    columns = (
        "seed", "source accuracy", "chosen beta", "settings within 1 s.e.",
        "test at chosen", "test at beta = 1", "gain (points)", "95 % interval", "raw pixels",
    )  # fmt: skip
    rows = [
        (
            t.seed,
            percent(t.source_accuracy),
            f"{t.search.best_beta:.4g}",
            f"{len(t.search.within_one_se)} of {len(t.search.settings)}",
            percent(t.test.best),
            percent(t.test.baseline),
            f"{t.gain.points:+.2f}",
            f"{t.gain.low:+.2f} to {t.gain.high:+.2f}",
            percent(t.pixels),
        )
        for t in transfers
    ]
    return table_of(columns, rows, *columns)
