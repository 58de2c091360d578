"""`flexure attack` itself: accuracy against the radius, of a network or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from flexure.attacks.bounded import Bounded
from flexure.cli.attack_jobs import Done, Subject, fraction, warn_of
from flexure.cli.attack_sweep import samples_of
from flexure.cli.chosen import Space, dials_of, same_inputs, side_by_side, space
from flexure.cli.common import check_takes, load
from flexure.contracts import FlexureError
from flexure.data import batches, load_data
from flexure.methods.attack_model import PROTOCOLS, attack_model

__all__ = ["SAMPLES", "PlainAttack", "radii_of"]

SAMPLES = 256
"""Samples that are attacked unless told otherwise: an interval of about ±6 points, in minutes."""


@dataclass(frozen=True)
class PlainAttack:
    """What `attack_model` is told.

    Attributes:
        attacks: names.
        eps: norm -> radii.
        every: whether each attack is run on all samples that are right.
        masking: whether to look for masked gradients.
        certify: whether to certify l2 radii.
        protocol: beside the standard one, or that.
    """

    attacks: Sequence[str]
    eps: dict[str, list[float]]
    every: bool
    masking: bool
    certify: bool
    protocol: str
    verb = "attacked"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise FlexureError(
                f"expected --protocol {' or '.join(PROTOCOLS)}, got {self.protocol!r}; choose one"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """See `attack_model`; the standard protocol is always among them."""
        protocols = list(dict.fromkeys([PROTOCOLS[0], self.protocol]))
        return {
            "attacks": list(self.attacks), "eps": self.eps, "every": self.every,
            "masking": self.masking, "certify": self.certify, "protocol": protocols,
        }  # fmt: skip

    def run(self, subject: Subject, store: Path) -> Done:
        """The model beside another one, or beside itself as it was, if it is changed."""
        dials = None if subject.steer is None else dials_of(subject.steer)
        loaded = load(subject.model, subject.device)
        other = None if subject.against is None else load(subject.against, subject.device)
        count = SAMPLES if subject.samples is None else subject.samples
        chosen, split = samples_of(subject, load_data(subject.data), count)
        own = space(loaded, chosen)
        theirs = own if other is None else space(other, chosen)
        _check_spaces(own, theirs)
        ready = partial(batches, batch_size=subject.batch_size, device=subject.device, cache=True)
        given = ready(chosen, preprocess=own.prepare)
        for each in (loaded, other):
            if each is not None:
                check_takes(each, given)
        warn_of(own, loaded)
        pair = side_by_side(
            loaded, other, dials, subject.adapter, given, beside_adapter=True,
            alike=same_inputs(own, theirs),
        )  # fmt: skip
        found = attack_model(
            _bounded(pair.model, own),
            given,
            reference=None if pair.against is None else _bounded(pair.against, theirs),
            names=pair.names,
            **self.settings,
            batch_size=subject.batch_size,
            seed=subject.seed,
            resume=store,
            progress=subject.progress,
        )
        config = {
            "against": subject.against, "steer": subject.steer, "adapter": subject.adapter,
            "after": subject.after,
            "names": pair.names, "split": split, "samples": len(chosen),
        }  # fmt: skip
        return Done(found, loaded, config, {"classes": chosen.classes})

    def page(self, path: Path, found: Any, **more: Any) -> Path:
        """See `attack_page`."""
        from flexure.report.attack import attack_page

        return attack_page(path, found, **more)


def radii_of(texts: Sequence[str]) -> dict[str, list[float]]:
    """Norm -> radii, of `linf:1/255,2/255` and the like.

    Raises:
        FlexureError: something else.
    """
    found: dict[str, list[float]] = {}
    for text in texts:
        norm, _, rest = text.rpartition(":")
        radii = [fraction("--eps", part) for part in rest.split(",")]
        found.setdefault(norm.strip() or "linf", []).extend(radii)
    return found


def _check_spaces(own: Space, theirs: Space) -> None:
    """Refuses a network of pixels beside one of other inputs.

    Raises:
        FlexureError: only of one of both the normalisation is known.
    """
    if (own.bounds is None) != (theirs.bounds is None):
        which = "MODEL's" if own.bounds is None else "that of --against"
        raise FlexureError(
            f"expected two models of pixels, got one preprocessing without a normalisation that is "
            f"known, {which}; give it a flexure.models.Preprocess, or make two runs"
        )


def _bounded(model: nn.Module, own: Space) -> Bounded:
    return Bounded(model, mean=own.mean, std=own.std, bounds=own.bounds)
