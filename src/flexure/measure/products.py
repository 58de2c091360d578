"""Hessian-vector products of a scalar field, sample by sample, in ways that differ in cost.

The catalogue `PRODUCTS` names them. They know nothing of what the field or the products are for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexure.measure.constant_weights import ConstantWeights
from flexure.measure.fields import Field
from flexure.measure.forward_mode import ForwardMode

__all__ = ["PRODUCTS", "DoubleBackward", "ForwardOverReverse", "HessianProducts"]


class HessianProducts(Protocol):
    """The values, gradients and Hessian-vector products of a field at its point.

    Attributes:
        values: (B,).
        gradient: (B, *shape).
    """

    values: Tensor
    gradient: Tensor

    def __init__(self, field: Field) -> None: ...

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
        """∇²f_i v_i for the samples numbered in `rows` (ascending), (B', *shape)."""
        ...


class DoubleBackward:
    """Backward through the graph of the backward pass, which is built once and kept.

    A product costs about two passes. When at most half of the samples of the graph are still asked
    for, the graph is built anew for these.
    """

    def __init__(self, field: Field) -> None:
        self._field = field
        self._rows = torch.arange(len(field), device=field.x.device)
        self._graph: _Graph | None = _Graph(field)
        self.values, self.gradient = self._graph.values.detach(), self._graph.gradient.detach()

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
        """∇²f_i v_i for the samples numbered in `rows` (ascending), (B', *shape)."""
        if self._graph is None or 2 * len(rows) <= len(self._rows):
            self._graph = None  # freed before the next one is built
            self._graph, self._rows = _Graph(self._field.taken(rows)), rows
        if len(rows) == len(self._rows):
            return self._graph.product(v)
        at = torch.searchsorted(self._rows, rows)
        padded = torch.zeros_like(self._graph.point)
        padded[at] = v
        return self._graph.product(padded)[at]


class ForwardOverReverse:
    """A forward derivative of the backward pass; no graph is kept between products.

    A product costs about four passes. At its peak it holds what a gradient's backward pass needs of
    each sample, and the tangents of that; double backward holds the graph of the backward pass
    instead, with all that the slopes of smooth activations are made of. A piecewise linear slope is
    made of nothing: there only ReLU holds less in this mode (see `forward_mode.py`), while others,
    such as leaky ReLU, hold more, as torch keeps their input's tangent.
    """

    def __init__(self, field: Field) -> None:
        self._field = field
        point = field.x.detach().requires_grad_()
        with ForwardMode():
            values = _values(field, point)
        self.values = values.detach()
        self.gradient = _gradient(values, point, create_graph=False)

    def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
        """∇²f_i v_i for the samples numbered in `rows` (ascending), (B', *shape)."""
        field = self._field if len(rows) == len(self._field) else self._field.taken(rows)
        with forward_ad.dual_level():
            point = forward_ad.make_dual(  # type: ignore[no-untyped-call]
                field.x.detach().requires_grad_(), v
            )
            with ForwardMode():
                values = _values(field, point)
            gradient = _gradient(values, point, create_graph=False)
            del values
            product: Tensor | None = forward_ad.unpack_dual(  # type: ignore[no-untyped-call]
                gradient
            ).tangent
        return torch.zeros_like(v) if product is None else product


PRODUCTS: Mapping[str, type[HessianProducts]] = {
    "double-backward": DoubleBackward,
    "forward-over-reverse": ForwardOverReverse,
}
"""Ways to compute the products, by the names that users give."""


class _Graph:
    """The graph of a gradient."""

    def __init__(self, field: Field) -> None:
        self.point = field.x.detach().requires_grad_()
        self.values = _values(field, self.point)
        self.gradient = _gradient(self.values, self.point, create_graph=True)

    def product(self, v: Tensor) -> Tensor:
        """∇²f_i v_i; an affine field's gradient does not depend on its point."""
        if not self.gradient.requires_grad:
            return torch.zeros_like(v)
        product: Tensor = torch.autograd.grad(
            self.gradient, self.point, v, retain_graph=True, materialize_grads=True
        )[0]
        return product


def _values(field: Field, point: Tensor) -> Tensor:
    """f at a leaf. Models see a copy, which they may overwrite."""
    with ConstantWeights():
        return field(point.clone())


def _gradient(values: Tensor, point: Tensor, *, create_graph: bool) -> Tensor:
    """∇f of each sample, which depends on its own input alone."""
    if not values.requires_grad:
        return torch.zeros_like(point)
    gradient: Tensor = torch.autograd.grad(
        values.sum(), point, create_graph=create_graph, materialize_grads=True
    )[0]
    return gradient
