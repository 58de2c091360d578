"""The penalties by definition, one sample after the other, with dense derivatives. Slow.

For networks that treat each sample by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of each sample's cross-entropy in its input, each with its graph."""

    def loss(row: Tensor, label: Tensor) -> Tensor:
        z = model(row[None])[0]
        return z.exp().sum().log() - z[label]

    return [
        torch.autograd.functional.jacobian(lambda r, c=c: loss(r, c), row, create_graph=True)
        for row, c in zip(x, y, strict=True)
    ]


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return sum((g**2).sum() for g in gradients(model, x, y)) / len(x)


def cure(model: nn.Module, x: Tensor, y: Tensor, length: float) -> Tensor:
    here = gradients(model, x, y)
    directions = [torch.sign(g.detach()) for g in here]
    moved = [
        row + (length * d / (d**2).sum().sqrt() if d.any() else 0 * d)
        for row, d in zip(x, directions, strict=True)
    ]
    there = gradients(model, torch.stack(moved), y)
    return sum(((a - b) ** 2).sum() for a, b in zip(there, here, strict=True)) / len(x)


def curvature_rate(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """v_2/v_1 of the probability of the class that is largest at each sample, from Hessians."""
    squares = [0.0, 0.0]
    for row, direction in zip(x, v, strict=True):
        top = int(model(row[None]).argmax())
        first, second = along(lambda r, k=top: model(r[None]).softmax(1)[0, k], row, direction)
        squares = [squares[0] + first**2, squares[1] + second**2]
    return (squares[1] / squares[0]) ** 0.5


def along(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    gradient = torch.autograd.functional.jacobian(f, x, create_graph=True)
    hessian = torch.autograd.functional.hessian(f, x, create_graph=True)
    flat = v.flatten()
    return gradient.flatten() @ flat, flat @ hessian.reshape(len(flat), -1) @ flat
