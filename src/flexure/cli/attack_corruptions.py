"""`flexure attack --corruptions`: accuracy on corrupted images, which no adversary chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexure.cli.attack_jobs import Done, Subject
from flexure.cli.attack_sweep import samples_of
from flexure.cli.chosen import SPLITS, dials_of, numbers, side_by_side
from flexure.cli.common import check_takes, load
from flexure.contracts import DataError, FlexureError, LabelledData
from flexure.data import Subset, batches, load_data
from flexure.methods.corruption_accuracy import corruption_accuracy

__all__ = ["Corruptions"]

_ALL = 1_000_000_000


@dataclass(frozen=True)
class Corruptions:
    """What `corruption_accuracy` is told; see there.

    Attributes:
        settings: its arguments, by name.
        shifts: name -> address of other versions of the images, in the same order.
    """

    settings: dict[str, Any]
    shifts: dict[str, str]
    verb = "on corrupted images"

    @classmethod
    def told(
        cls, *, names: Sequence[str] | None, severities: str, files: str | None,
        shifts: Sequence[str],
    ) -> Corruptions:  # fmt: skip
        """From options as they were typed.

        Raises:
            FlexureError: an option of another kind.
        """
        settings = {
            "corruptions": list(names) if names else None,
            "severities": numbers("--severities", severities, int),
            "sources": files,
        }
        return cls(settings, dict(_named(text) for text in shifts))

    def run(self, subject: Subject, store: Path) -> Done:
        """The model beside another one, or beside itself as it was, if it is changed."""
        dials = None if subject.steer is None else dials_of(subject.steer)
        loaded = load(subject.model, subject.device)
        other = None if subject.against is None else load(subject.against, subject.device)
        data = load_data(subject.data)
        chosen, split = self._chosen(data, subject)
        given = batches(
            chosen, preprocess=loaded.preprocess, batch_size=subject.batch_size,
            device=subject.device,
        )  # fmt: skip
        for each in (loaded, other):
            if each is not None:
                check_takes(each, given)
        pair = side_by_side(loaded, other, dials, subject.adapter, given, beside_adapter=True)
        found = corruption_accuracy(
            pair.model,
            chosen,
            preprocess=loaded.preprocess,
            reference=pair.against,
            names=pair.names,
            **self.settings,
            shifts=self._shifts(chosen, split),
            seed=subject.seed,
            batch_size=subject.batch_size,
            resume=store,
            progress=subject.progress,
        )
        config = {
            "against": subject.against, "steer": subject.steer, "adapter": subject.adapter,
            "after": subject.after,
            "names": pair.names, "split": split, "samples": len(chosen), "shifts": self.shifts,
        }  # fmt: skip
        return Done(found, loaded, config)

    def page(self, path: Path, found: Any, **more: Any) -> Path:
        """See `corruption_page`."""
        from flexure.report.attack_corruptions import corruption_page

        return corruption_page(path, found, **more)

    def _chosen(self, data: dict[str, LabelledData], subject: Subject) -> tuple[Subset, str]:
        """All images, or so many; of official files the first ones, which theirs begin with."""
        count = _ALL if subject.samples is None else subject.samples
        found, split = samples_of(subject, data, count)
        first = torch.arange(len(found))
        rows = found.indices.sort().values if self.settings["sources"] is None else first
        return Subset(found.data, rows), split

    def _shifts(self, chosen: Subset, split: str) -> dict[str, LabelledData]:
        """The same rows of other versions of the data."""
        found: dict[str, LabelledData] = {}
        for name, address in self.shifts.items():
            data = load_data(address)
            whole = data.get(split, data[next(each for each in SPLITS if each in data)])
            if len(whole) != len(chosen.data):
                raise DataError(
                    f"expected --shift {name} to have the {len(chosen.data)} images of the data in "
                    f"the same order, got {len(whole)}; give such a version"
                )
            found[name] = Subset(whole, chosen.indices)
        return found


def _named(text: str) -> tuple[str, str]:
    name, equals, address = text.partition("=")
    if not name.strip() or not equals or not address.strip():
        raise FlexureError(
            f"expected --shift like jpeg=npz:FILE, got {text!r}; give a name and an address"
        )
    return name.strip(), address.strip()
