"""Per-sample scalar fields: what a measure differentiates, from a model and a target.

A `Field` maps the inputs (B, *shape) to (B,) values, one of each sample alone. For a classifier it
is the margin m, of which the cross-entropy is softplus(−m): derivatives of m do not cancel where
those of the loss do. Measures call a field inside `measuring`. Nothing is differentiated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import call_model, check_logits, copied, logits_of, map_tensors, margin
from flexure.contracts import FlexureError
from flexure.measuring import measuring

__all__ = ["Field", "check_target", "margin", "measuring", "point_of", "scalar_field"]


@dataclass(frozen=True)
class Field:
    """A scalar field on B samples, at hand with its point x.

    `field(x)` are its (B,) values at any (B, *shape) x; call it inside `measuring`. Sample i's
    target and other inputs stay those of sample i.

    Attributes:
        x: (B, *shape) floating point, without a graph: what is differentiated with respect to.
        is_margin: whether the values are margins m of a classifier, the loss being softplus(−m)
            and its gradient −σ(−m)·∇m; otherwise the field is itself what is measured.
        target: (B,) labels, targets of the output's shape, or None.
    """

    x: Tensor
    is_margin: bool
    target: Tensor | None
    _values: Callable[[Any, Any], Tensor]
    _example: Any

    def __len__(self) -> int:
        return len(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        """The values at x.

        Args:
            x: (B, *shape), of any dtype and device that the model takes.

        Returns:
            (B,) values.

        Raises:
            FlexureError: the values are not one a sample.
        """
        example = map_tensors(self._example, lambda leaf: x if leaf is self.x else leaf)
        values = self._values(example, self.target)
        if values.shape != (len(x),):
            raise FlexureError(
                f"expected a field with one value for each of {len(x)} samples, got shape "
                f"{tuple(values.shape)}; return a tensor of shape ({len(x)},)"
            )
        return values

    def taken(self, rows: Tensor | slice) -> Field:
        """The field of some of the samples."""
        batch, x = len(self.x), self.x[rows]

        def part(leaf: Tensor) -> Tensor:
            if leaf is self.x:
                return x
            return leaf[rows] if leaf.dim() and len(leaf) == batch else leaf

        target = None if self.target is None else self.target[rows]
        return replace(self, x=x, target=target, _example=map_tensors(self._example, part))


def scalar_field(
    model: nn.Module | Callable[..., Any],
    x: Any,
    y: Tensor | None = None,
    *,
    field: Callable[[Tensor], Tensor] | None = None,
) -> Field:
    """The field that a measure of `model` with the target `y` is about.

    - `y` holds integers: the margin of these labels (see `margin`).
    - `y` is None: a model with one output a sample gives that output (regression); otherwise the
      label is the predicted class, held fixed.
    - `y` holds floats: half the squared error, ½·Σ(output − y)², for each sample.
    - `field` is given: that, whatever the model is; it may close over the model.

    Call it inside `measuring`, on the device of the model.

    Args:
        model: a network, or any callable that gives outputs (or an object with `.logits`).
        x: an `Example` with exactly one floating-point tensor, which is the point. Other tensors
            (masks, positions) are held.
        y: (B,) labels, or targets of the output's shape.
        field: (B, *shape) -> (B,), differentiable; each sample's value depends on it alone.

    Raises:
        FlexureError: no field can be made of these; the message says what to do.
    """
    x = map_tensors(x, _plain)
    point = point_of(x)
    if field is not None:
        return Field(point, False, None, lambda example, _: field(point_of(example)), x)
    check_target(y, len(point))
    target = None if y is None else _plain(y).to(point.device)

    def outputs(example: Any) -> Tensor:
        return logits_of(call_model(model, example))  # type: ignore[arg-type]

    if target is None:
        with torch.no_grad():
            z = outputs(copied(x))  # models may overwrite their input
        if z.dim() == 1 or z.shape[1:] == (1,):
            return Field(point, False, None, lambda example, _: outputs(example).flatten(), x)
        target = check_logits(z, None).argmax(1)
    elif target.is_floating_point():
        return Field(point, False, target, lambda example, y: _error(outputs(example), y), x)
    else:
        target = target.long()
    return Field(
        point, True, target, lambda example, y: margin(check_logits(outputs(example), y), y), x
    )


def check_target(y: Tensor | None, batch: int) -> None:
    """Checks what can be told of targets without the model's output.

    Raises:
        FlexureError: there is not one for each of the samples, or they are complex, or labels with
            more than one dimension.
    """
    if y is None:
        return
    if not y.dim() or len(y) != batch:
        raise FlexureError(
            f"expected one target for each of {batch} samples, got "
            f"{len(y) if y.dim() else 'a single number'}; give y of the same batch"
        )
    if y.is_complex() or (y.dim() > 1 and not y.is_floating_point()):
        raise FlexureError(
            f"expected labels of shape ({batch},), or floating-point targets of the output's shape,"
            f" got {y.dtype} of shape {tuple(y.shape)}; give y.flatten(), or real targets"
        )


def point_of(x: Any) -> Tensor:
    """The one floating-point tensor of an example."""
    found: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        if leaf.is_floating_point():
            found.append(leaf)
        return leaf

    map_tensors(x, note)
    if not isinstance(x, Tensor | tuple | list | dict):
        raise FlexureError(
            f"expected an example that is a tensor, a tuple or a dict of tensors, got "
            f"{type(x).__name__}; give dict(x), or the tensor itself"
        )
    if len(found) != 1:
        raise FlexureError(
            f"expected an example with exactly one floating-point tensor, got {len(found)}; give "
            f"one input to differentiate with respect to (for token models inputs_embeds=..., for "
            f"several inputs a function that closes over the others)"
        )
    point = found[0]
    if point.dtype.itemsize < 4:
        raise FlexureError(
            f"expected inputs of float32 or float64, got {point.dtype}: second derivatives drown "
            f"in its rounding; use model.float() and x.float()"
        )
    if point.dim() < 2 or not point[:1].numel():
        raise FlexureError(
            f"expected inputs (B, *shape) with at least one element a sample, got shape "
            f"{tuple(point.shape)}; give one row for each sample"
        )
    return point


def _plain(leaf: Tensor) -> Tensor:
    """Without a graph, and fit for one."""
    return leaf.clone() if leaf.is_inference() else leaf.detach()


def _error(outputs: Tensor, y: Tensor) -> Tensor:
    """Half the squared error of each sample, which is quadratic in the output."""
    if y.shape != outputs.shape:
        raise FlexureError(
            f"expected targets of the output's shape {tuple(outputs.shape)}, got "
            f"{tuple(y.shape)}; reshape y (integers are labels of a classifier)"
        )
    return (outputs - y).square().reshape(len(outputs), -1).sum(1) / 2
