"""`flexure attack --sweep`: the dial for robustness, chosen on one half and reported on the other.

And what is done with it `--after`. The options are those of `attack.py`; what is searched, and how,
is the library's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.norms import norm_named
from flexure.cli.attack_jobs import Done, Subject, fraction, warn_of
from flexure.cli.chosen import SPLITS, drawn, numbers, space
from flexure.cli.common import check_takes, load
from flexure.contracts import DataError, FlexureError, LabelledData
from flexure.data import Subset, batches, load_data, stratified_split
from flexure.methods.robust_dial import search_robust_dial
from flexure.methods.robust_dial_moves import SEARCHES
from flexure.methods.robust_dial_result import RobustDialSearch
from flexure.surgery.adapter import CONFIG, TENSORS

__all__ = ["MATCHES", "NONE", "Halves", "Sweep", "Swept", "halves", "samples_of"]

NONE = "none"
"""Of groups, of the search, of calibration: there is none."""

MATCHES = {NONE: None, "mean": "mean", "mean+std": "mean+std"}
"""What calibration keeps, as it is typed."""

_TARGETS = {"linf": 1 / 255, "l2": 0.1}  # where networks that were not trained for it differ
_ADAPTER = (CONFIG, TENSORS)
_SHARE = 0.5  # of the samples that dials are chosen on, where no number is given


@dataclass(frozen=True)
class Halves:
    """What dials are chosen on, and what they are reported on; no sample is in both.

    Attributes:
        split: of the data, that the test samples are from.
    """

    val: Subset
    test: Subset
    split: str


def halves(data: Mapping[str, LabelledData], sizes: Mapping[str, int | None], seed: int) -> Halves:
    """The source's own validation and test data, or two parts of what the network was not made by.

    A network that is attacked was trained elsewhere, so that nothing is kept for training: the
    parts are those of the test data, or without any of the only split there is.

    Raises:
        DataError: sizes that do not fit.
    """
    if "validation" in data and "test" in data:
        val, test = (_taken(data[name], sizes[key], seed, f"--{key}-size")
                     for name, key in (("validation", "val"), ("test", "test")))  # fmt: skip
        return Halves(val, test, "test")
    split = next(name for name in SPLITS if name in data)
    pool = data[split]
    first, second = sizes["val"], sizes["test"]
    if (first or 1) + (second or 1) > len(pool):
        raise DataError(
            f"expected --val-size and --test-size to be together at most {len(pool)}, the samples "
            f"of {split}, got {_size_text(first)} and {_size_text(second)}; lower them"
        )
    if first is None:
        first = round(_SHARE * len(pool)) if second is None else len(pool) - second
    if second is None:
        second = len(pool) - first
    rows = stratified_split(pool.labels, [first, second], seed=seed)
    return Halves(Subset(pool, rows[0]), Subset(pool, rows[1]), split)


@dataclass(frozen=True)
class Swept:
    """A finished sweep, as its folder tells of it.

    Attributes:
        folder: of its results.
        config: what it was told.
    """

    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Swept:
        """From the folder of its results.

        Raises:
            FlexureError: there is no finished sweep, it chose the network as it was, or its
                adapter is gone.
        """
        try:
            payload = json.loads((folder / "results.json").read_text())
            config, dial = payload["config"], payload["numbers"]["chosen"]["dial"]
            found = cls(folder, {name: config[name] for name in ("model", "data", *_SPLIT)})
        except (OSError, ValueError, KeyError, TypeError):
            raise FlexureError(
                f"expected --after to name the folder of a finished sweep, got {str(folder)!r}; "
                f"run flexure attack --sweep --out {folder}"
            ) from None
        if dial is None:
            raise FlexureError(
                f"expected the sweep in {str(folder)!r} to have chosen a dial, got the network as "
                f"it was; attack that without --after"
            )
        if not all((found.adapter / name).exists() for name in _ADAPTER):
            raise FlexureError(
                f"expected the dial of the sweep in {str(found.adapter)!r}, got no adapter there; "
                f"run the sweep again"
            )
        return found

    @property
    def adapter(self) -> Path:
        """The folder of the dial that it chose."""
        return self.folder / "adapter"

    def test(self, data: Mapping[str, LabelledData]) -> tuple[Subset, str]:
        """What it reported on, and the split that this is of."""
        found = halves(data, *(self.config[name] for name in _SPLIT))
        return found.test, found.split

    def check(self, subject: Subject) -> None:
        """Refuses another model, or other data."""
        for name, given in (("model", subject.model), ("data", subject.data)):
            if given != self.config[name]:
                raise FlexureError(
                    f"expected the {name} of the sweep, {self.config[name]}, got {given}; give the "
                    f"same, or --adapter {self.adapter}"
                )


_SPLIT = ("sizes", "split_seed")  # of a sweep's record: what `halves` is told


def samples_of(subject: Subject, data: dict[str, LabelledData], count: int) -> tuple[Subset, str]:
    """So many samples in a random order, and their split: all, or those a sweep reported on."""
    if subject.after is None:
        return drawn(data, subject.split, count, subject.seed)
    swept = Swept.read(subject.after)
    swept.check(subject)
    part, split = swept.test(data)
    chosen, _ = drawn({split: part}, split, count, subject.seed)
    return Subset(part.data, part.indices[chosen.indices]), split


def _size_text(size: int | None) -> str:
    return "a share" if size is None else str(size)


def _taken(data: LabelledData, size: int | None, seed: int, option: str) -> Subset:
    if size is None:
        return Subset(data, torch.arange(len(data)))
    if size > len(data):
        raise DataError(
            f"expected {option} to be at most {len(data)}, the samples of the split, got {size}; "
            f"lower it"
        )
    (rows,) = stratified_split(data.labels, [size], seed=seed)
    return Subset(data, rows)


@dataclass(frozen=True)
class Sweep:
    """What `search_robust_dial` is told; see there.

    Attributes:
        settings: its arguments, by name.
        sizes: samples to choose on, `"val"`, and to report on, `"test"`; None: a share.
    """

    settings: Mapping[str, Any]
    sizes: Mapping[str, int | None]
    verb = "steered to be robust"

    @classmethod
    def told(
        cls,
        *,
        eps: Mapping[str, Sequence[float]],
        attacks: Sequence[str],
        target: str | None,
        betas: str,
        cs: str,
        match: str,
        groups: str,
        search: str,
        budget: int,
        starts: int,
        clean_loss: float,
        val_size: int | None,
        test_size: int | None,
    ) -> Sweep:
        """From options as they were typed.

        Raises:
            FlexureError: several norms or attacks, or an option of another kind.
        """
        if len(eps) != 1 or len(attacks) != 1:
            raise FlexureError(
                f"expected one norm and one --attack with --sweep, got {', '.join(eps)} and "
                f"{', '.join(attacks)}; choose one of each"
            )
        ((norm, radii),) = eps.items()
        norm_named(norm)
        if attacks[0] not in ATTACKS:
            raise FlexureError(
                f"expected --attack among {', '.join(ATTACKS)}, got {attacks[0]!r}; choose one"
            )
        settings = {
            "norm": norm,
            "eps": _TARGETS[norm] if target is None else fraction("--target", target),
            "radii": tuple(radii),
            "betas": numbers("--betas", betas, float),
            "cs": numbers("--cs", cs, float),
            "matches": _matches(match),
            "groups": _choice("--groups", groups, ("layers", "sites", NONE)),
            "search": _choice("--search", search, (*SEARCHES, NONE)),
            "budget": budget,
            "starts": starts,
            "clean_loss": clean_loss,
            "report_attack": attacks[0],
        }
        return cls(settings, {"val": val_size, "test": test_size})

    def run(self, subject: Subject, store: Path) -> Done:
        """The search; the chosen dial is saved as an adapter, if it is not the plain network."""
        loaded = load(subject.model, subject.device)
        parts = halves(load_data(subject.data), self.sizes, subject.seed)
        own = space(loaded, parts.val)
        ready = partial(
            batches, preprocess=own.prepare, batch_size=subject.batch_size, device=subject.device,
            cache=True,
        )  # fmt: skip
        val, test = ready(parts.val), ready(parts.test)
        check_takes(loaded, val)
        warn_of(own, loaded)
        found = search_robust_dial(
            loaded.model,
            val=val,
            test=test,
            mean=own.mean,
            std=own.std,
            bounds=own.bounds,
            **self.settings,
            seed=subject.seed,
            batch_size=subject.batch_size,
            resume=store,
            progress=subject.progress,
        )
        lines = _saved(found, subject.out / "adapter")
        sizes = {"val": len(parts.val), "test": len(parts.test)}
        return Done(found, loaded, {"sizes": sizes, "split_seed": subject.seed}, lines=lines)

    def page(self, path: Path, found: Any, **more: Any) -> Path:
        """See `robust_dial_page`."""
        from flexure.report.attack_dials import robust_dial_page

        return robust_dial_page(path, found, **more)


def _saved(found: RobustDialSearch, folder: Path) -> tuple[str, ...]:
    if found.chosen.dial is None:
        _remove(folder)  # that of an earlier sweep
        return ()
    steering = found.install()
    steering.save(folder)
    steering.remove()
    return (f"Adapter: {folder}",)


def _remove(folder: Path) -> None:
    for name in _ADAPTER:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or with files of others
        folder.rmdir()


def _matches(text: str) -> list[str | None]:
    names = [part.strip() for part in text.split(",")]
    if not set(names) <= set(MATCHES):
        raise FlexureError(
            f"expected --match among {', '.join(MATCHES)}, with commas, got {text!r}"
        )
    return [MATCHES[name] for name in names]


def _choice(option: str, text: str, names: Sequence[str]) -> str | None:
    if text not in names:
        raise FlexureError(f"expected {option} among {', '.join(names)}, got {text!r}; choose one")
    return None if text == NONE else text
