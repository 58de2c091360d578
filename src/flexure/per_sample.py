"""The base of every measure's result: values for each sample of a batch.

Says how such results are cut, joined and listed. What the values mean is the measure's business;
means and intervals are those of `measure/over.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from typing_extensions import Self

from flexure.contracts import FlexureError

__all__ = ["PerSample"]


@dataclass(frozen=True)
class PerSample:
    """Values for each of B samples; a measure derives its result from this.

    Every field that holds a tensor is per sample, with the sample on dimension 0. Every other
    field is a setting of the measure, the same for all samples. What pools over samples (a root
    mean square, a slope of pooled norms) is a property, computed from the fields: joined results
    then pool over all of their samples.

    Attributes:
        converged: (B,) bool, whether the sample's values are what the measure promises.
    """

    converged: Tensor

    def __len__(self) -> int:
        return len(self.converged)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The result over the samples of all parts, in their order.

        Raises:
            FlexureError: there are no parts, or their settings differ.
        """
        if not parts:
            raise FlexureError("expected at least one batch of samples, got none; give data")
        first = parts[0]
        for part in parts[1:]:
            if part.settings() != first.settings():
                raise FlexureError(
                    f"expected parts of one measurement, got the settings {first.settings()} and "
                    f"{part.settings()}; measure all batches with the same settings"
                )
        columns = {
            name: torch.cat([part.samples()[name] for part in parts]) for name in first.samples()
        }
        return replace(first, **columns)

    def samples(self) -> dict[str, Tensor]:
        """The fields that are per sample, by name."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def settings(self) -> dict[str, object]:
        """The fields that are the same for all samples, by name."""
        known = self.samples()
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in known}

    def taken(self, rows: Tensor | slice) -> Self:
        """The result of some of the samples."""
        return replace(self, **{name: value[rows] for name, value in self.samples().items()})
