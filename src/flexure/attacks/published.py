"""The published evaluation of steered networks, which is no l_p robustness, and says so.

It is run by `evaluate` like any other; here is what differs: where attacks search, what is accepted
of them, and how the result is called.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded, limits_of
from flexure.attacks.checks import finite_inputs
from flexure.attacks.harness import Harness
from flexure.attacks.norms import norm_named
from flexure.attacks.robustness import Robustness
from flexure.contracts import FlexureError

__all__ = ["PublishedHarness", "PublishedRobustness", "as_published", "in_normalised_space"]


@dataclass(frozen=True)
class PublishedRobustness(Robustness):
    """What the published evaluation of Curvature Tuning gives, which is not an l_p robustness.

    There, attacks change normalised inputs and clamp them to [0, 1], as if those were pixels: most
    of what they change is the clamp's doing, lies far outside of the ball of radius eps, and
    happens at eps = 0 too. `distance` is the evidence.

    Attributes:
        x_adv: in the units of the given inputs, outside of their bounds where the attack went so;
            x itself of samples that no attack misclassified, whatever was tried there.
        distance: (B,) float64, ‖x_adv − x‖ in the norm, both normalised: what eps was meant to
            bound, and does not. 0 of samples that no attack misclassified.
        distance_in_pixels: (B,) float64, the same in the units of the given inputs.
    """

    distance_in_pixels: Tensor

    @property
    def largest(self) -> float:
        """The largest change of a normalised input that was misclassified then."""
        return float(self.distance.max())

    @property
    def largest_in_pixels(self) -> float:
        """The largest change in the units of the given inputs."""
        return float(self.distance_in_pixels.max())

    def to_dict(self) -> dict[str, Any]:
        """As of `Robustness`, labelled, with the largest changes."""
        return {
            "protocol": "published",
            "l_p_robustness": False,
            **super().to_dict(),
            "largest_distance": self.largest,
            "largest_distance_in_pixels": self.largest_in_pixels,
        }

    def __str__(self) -> str:
        """What it is not, how far the attacks went, and a table with a row for each attack."""
        head = (
            f"published protocol, NOT an l_p robustness: clean accuracy {self.clean_accuracy:.1%}, "
            f"accuracy {self.accuracy:.1%} ({self.norm}, eps {self.eps:.4g} of normalised inputs "
            f"that were clamped to [0, 1], {len(self)} samples)\n"
            f"largest change: {self.largest:.4g} normalised, {self.largest_in_pixels:.4g} in the "
            f"inputs' units, where a radius of {self.eps:.4g} was meant"
        )
        return "\n".join([head, *super().__str__().splitlines()[1:]])


@dataclass(frozen=True)
class PublishedHarness(Harness):
    """Takes what attacks return as it is, near or far: no projection, no bounds.

    Attributes:
        model: of normalised inputs, with bounds of (0, 1) that they do not have.
    """

    @property
    def searches(self) -> bool:
        """Always: also without a radius the clamp changes inputs."""
        return True

    def accepted(self, made: Any, name: str, x: Tensor) -> Tensor:
        """What an attack returned, once it is finite inputs of the right shape."""
        return finite_inputs(made, name, x)

    def near(self, x: Tensor, numbers: Tensor) -> Tensor:
        """(b, *shape), a random point of the ball for each of these samples, clamped."""
        return super().near(x, numbers).clamp(*limits_of(self.model, x.dtype))

    def accepts(self, x_adv: Tensor, x: Tensor) -> bool:
        """Whether these may be what was accepted."""
        return bool(x_adv.isfinite().all())


def in_normalised_space(harness: Harness, x: Tensor) -> tuple[PublishedHarness, Tensor]:
    """The harness of the published evaluation, and the normalised inputs.

    Args:
        harness: of a `Bounded` that normalises.
        x: (B, *shape) within its bounds.

    Raises:
        FlexureError: the model does not normalise.
    """
    model, mean, std = _normalising(harness.model, x)
    inner = Bounded(model, bounds=(0.0, 1.0))
    around = (-torch.inf, torch.inf)
    made = PublishedHarness(inner, harness.norm, harness.eps, around, harness.seed)
    return made, (x - mean) / std


def as_published(found: Robustness, bounded: nn.Module, x: Tensor) -> PublishedRobustness:
    """A result of normalised inputs, by its right name and in the units of the given inputs.

    Args:
        found: its `x_adv` normalised.
        bounded: as given.
        x: (B, *shape) as given.
    """
    _, mean, std = _normalising(bounded, x)
    beaten = found.beaten_by.any(1)
    changed = beaten.to(x.device).view(-1, *[1] * (x.dim() - 1))
    x_adv = torch.where(changed, found.x_adv * std + mean, x)
    distance = torch.where(beaten.to(found.distance.device), found.distance, 0.0)
    size = norm_named(found.norm).size(x_adv.double() - x.double())
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    values |= {"x_adv": x_adv, "distance": distance}
    return PublishedRobustness(**values, distance_in_pixels=size)


def _normalising(bounded: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The model inside, and mean and standard deviation, (C, 1, ...)."""
    mean, std = getattr(bounded, "mean", None), getattr(bounded, "std", None)
    if not isinstance(bounded, Bounded) or mean is None or std is None:
        raise FlexureError(
            "expected a flexure.Bounded with mean and std, whose normalised inputs the published "
            "protocol attacks, got a model without; give Bounded(model, mean=..., std=...)"
        )
    shape = (-1, *[1] * (x.dim() - 2))
    return bounded.model, mean.to(x).view(shape), std.to(x).view(shape)
