"""The scalar of a model whose growth is measured: the probability of its answer.

For measures of functions from inputs to numbers (curvature rate, Sobolev semi-norm), which have no
labels. Losses and margins of labelled samples are in `fields`. Nothing is differentiated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import call_model, logits_of, map_tensors
from flexure.contracts import FlexureError
from flexure.measure.fields import measuring, point_of
from flexure.measuring import unchanged_randomness

__all__ = [
    "Odds",
    "ScaledField",
    "at_rows",
    "check_positive",
    "pieces",
    "probability_field",
    "undisturbed",
]


@dataclass(frozen=True)
class ScaledField:
    """A function whose derivatives are those of another, up to sign and to a scale a sample.

    Attributes:
        function: (B, *shape) -> (B,).
        log_scale: (B,) float64; the absolute values of all derivatives, the value left out, are to
            be multiplied by its exponential.
    """

    function: Callable[[Tensor], Tensor]
    log_scale: Tensor


class Odds:
    """(1 - p)/e^s = o/(1 + e^s·o), o = sum over the other classes of exp(z_j - z_top - s).

    p is the softmax of the class `top` that is largest at a point, and s its largest z_j - z_top
    there: constants, whatever z it is called with. Of a sure sample's derivatives a softmax would
    leave only rounding errors, and where e^s underflows 1 - p is 0: o, and so this, is between 1/2
    and the number of classes at the point.

    Args:
        logits: (B, classes) at the point.

    Attributes:
        log_scale: (B,) float64, s.
    """

    def __init__(self, logits: Tensor) -> None:
        logits = logits.detach()
        self._top = top = logits.argmax(1, keepdim=True)
        self._others = torch.ones_like(logits).scatter_(1, top, 0.0)
        gap = (logits - logits.gather(1, top)).scatter(1, top, -torch.inf).amax(1, keepdim=True)
        gap = gap.masked_fill(gap.isneginf(), 0.0)  # all others are ruled out
        self._shift, self._scale = gap * self._others, gap.exp()
        self.log_scale = gap[:, 0].double()

    def __call__(self, z: Tensor) -> Tensor:
        """(B,), of (B, classes) logits at any point."""
        relative = z - z.gather(1, self._top) - self._shift.to(z)
        odds = (relative.exp() * self._others.to(z)).sum(1)
        return odds / (1 + self._scale.to(z)[:, 0] * odds)


def probability_field(f: Callable[..., Any], x: Any) -> ScaledField:
    """The function that stands for `f` near `x`; call it inside `undisturbed`.

    Args:
        f: a function that returns (B,), itself; a model with logits (B, classes): the probability
            of the class that is largest at `x`, which stays the same class away from `x`; a model
            with one output, (B,) or (B, 1): that output. A probability is scaled, so that its
            derivatives do not underflow where the model is sure; outputs are not.
        x: an `Example` with one floating-point tensor (B, *shape), which is what the function
            returned is of; the others are held. `f` is called on it once.

    Raises:
        FlexureError: `f` returns something else.
    """
    point = point_of(x)

    def output(inputs: Tensor) -> Tensor:
        example = map_tensors(x, lambda leaf: inputs if leaf is point else leaf)
        return logits_of(call_model(f, example))  # type: ignore[arg-type]

    with torch.no_grad():
        out = output(point)
    unscaled = torch.zeros(len(point), dtype=torch.float64, device=out.device)
    if out.shape == point.shape[:1]:
        return ScaledField(output, unscaled)
    is_model = isinstance(f, nn.Module)
    if not is_model or out.dim() != 2 or len(out) != len(point):
        wanted = "(B,), (B, 1) or (B, classes) from the model" if is_model else "(B,) from f"
        raise FlexureError(
            f"expected {wanted} for B = {len(point)} samples, got {tuple(out.shape)}; wrap it in a "
            f"function that returns one number for each sample"
        )
    if out.shape[1] == 1:
        return ScaledField(lambda inputs: output(inputs).squeeze(1), unscaled)
    odds = Odds(out)
    return ScaledField(lambda inputs: odds(output(inputs)), odds.log_scale)


@contextmanager
def undisturbed(f: Callable[..., Any], x: Any) -> Iterator[None]:
    """The state in which measures call `f`, without a graph; random generators are put back."""
    with unchanged_randomness(point_of(x).device), measuring(f), torch.no_grad():
        yield


def pieces(batch: int, chunk: int | None) -> Iterator[slice]:
    """The rows of a batch, `chunk` at a time; None: all at once."""
    size = batch if chunk is None else chunk
    return (slice(start, start + size) for start in range(0, batch, size))


def at_rows(x: Any, rows: slice | Tensor) -> Any:
    """An `Example` of some of the samples of another."""
    batch = len(point_of(x))
    return map_tensors(x, lambda t: t[rows] if t.dim() and len(t) == batch else t)


def check_positive(**settings: int | None) -> None:
    """Refuses counts below 1; None is left alone.

    Raises:
        FlexureError: names the setting.
    """
    for name, value in settings.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= 1):
            raise FlexureError(
                f"expected {name} to be a whole number from 1, got {value!r}; give one, or leave "
                f"it out"
            )
