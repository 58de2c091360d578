"""Models whose inputs lie within bounds, such as pixels in [0, 1], with normalisation inside.

What is done to such a model is the business of the attacks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import FlexureError

__all__ = ["Bounded", "check_bounds", "check_within", "limits_of"]


class Bounded(nn.Module):
    """A model of inputs within bounds: normalises, (x − mean) / std, and calls the model.

    The model is referred to, never copied: steering it, training it or loading its weights shows
    here at once, and the other way round. Inputs are not checked, nor clamped.

    Attributes:
        model: the model.
        mean: (C,) buffer, or None.
        std: (C,) buffer, or None.
        bounds: (lowest, highest) value of every input, for attacks to stay within; either may be
            infinite; None: there are no bounds.

    Args:
        model: takes normalised inputs (B, C, ...).
        mean: one number a channel (a feature, where inputs are vectors), on the scale of the
            bounds; `Preprocess.mean` of a loaded model. None: no normalisation.
        std: the same; above 0.
        bounds: see above.

    Raises:
        FlexureError: not both of mean and std, or they or the bounds do not fit.

    Example:
        >>> import torch
        >>> inner = torch.nn.Identity()
        >>> bounded = Bounded(inner, mean=(0.5, 0.25), std=(0.5, 0.25))
        >>> bounded(torch.tensor([[1.0, 1.0]])).tolist(), bounded.model is inner
        ([[1.0, 3.0]], True)
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.bounds = check_bounds(bounds)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        values = [None if v is None else _channels(v, like) for v in (mean, std)]
        _check_statistics(*values)
        for name, value in zip(("mean", "std"), values, strict=True):
            self.register_buffer(name, value)
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        """The model's own output at the normalised input.

        Args:
            x: (B, C, ...) within the bounds.

        Raises:
            FlexureError: the input has another number of channels than the statistics.
        """
        if self.mean is None or self.std is None:
            return self.model(x)
        if x.dim() < 2 or x.shape[1] != len(self.mean):
            raise FlexureError(
                f"expected inputs (B, {len(self.mean)}, ...), got shape {tuple(x.shape)}; give as "
                f"many channels as mean and std have, in dimension 1"
            )
        shape = (-1, *[1] * (x.dim() - 2))
        return self.model((x - self.mean.view(shape)) / self.std.view(shape))

    def extra_repr(self) -> str:
        """The bounds and the statistics."""
        rest = [] if self.mean is None else [f"mean={self.mean.tolist()}"]
        rest += [] if self.std is None else [f"std={self.std.tolist()}"]
        return ", ".join([f"bounds={self.bounds}", *rest])


def limits_of(model: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    """The lowest and the highest value of a model's inputs, by its attribute `bounds`.

    Infinite where it has none. Rounded to what inputs can hold: 0.1 is no float32, and an input
    that lies on the bound has the nearest one.

    Args:
        model: with an attribute `bounds`, or without.
        dtype: of the inputs.

    Raises:
        FlexureError: the attribute is something else.
    """
    bounds = check_bounds(getattr(model, "bounds", None))
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    return float(torch.tensor(low, dtype=dtype)), float(torch.tensor(high, dtype=dtype))


def check_bounds(bounds: Any) -> tuple[float, float] | None:
    """The lowest and the highest value of inputs, or None for no bounds.

    Raises:
        FlexureError: they are something else.
    """
    if bounds is None:
        return None
    try:
        low, high = (math.nan, math.nan) if isinstance(bounds, str) else map(float, bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise FlexureError(
            f"expected bounds to be a lowest and a higher number, or None, got {bounds!r}; give "
            f"(0, 1) for pixels"
        )
    return low, high


def check_within(x: Tensor, limits: tuple[float, float]) -> None:
    """Refuses inputs outside of a model's limits, or not finite.

    Raises:
        FlexureError: see above.
    """
    low, high = (float(end) for end in x.detach().aminmax())
    if not (limits[0] <= low and high <= limits[1] and abs(low) + abs(high) < math.inf):
        raise FlexureError(
            f"expected finite inputs within the bounds {limits}, got values from {low:.4g} to "
            f"{high:.4g}; give inputs before normalisation (pixels / 255), or other bounds"
        )


def _channels(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().to(like.device, like.dtype, copy=True)
    try:
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FlexureError(
            f"expected mean and std to be sequences of numbers, got {values!r} ({error}); give one "
            f"number a channel"
        ) from error


def _check_statistics(mean: Tensor | None, std: Tensor | None) -> None:
    if mean is None and std is None:
        return
    if mean is None or std is None or mean.dim() != 1 or mean.shape != std.shape:
        got = [None if value is None else tuple(value.shape) for value in (mean, std)]
        raise FlexureError(
            f"expected mean and std with one number a channel each, or neither, got shapes "
            f"{got[0]} and {got[1]}; give those that the model was trained with"
        )
    if not bool((mean.isfinite() & std.isfinite() & (std > 0)).all()):
        raise FlexureError(
            f"expected finite means and standard deviations above 0, got {mean.tolist()} and "
            f"{std.tolist()}; give those that the model was trained with"
        )
