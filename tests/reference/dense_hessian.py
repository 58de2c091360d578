"""Dense Hessians in float64, and inputs where they are large: slow, and by other means than src."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def logit_hessians(model: nn.Module, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """(K, d, d): the Hessian of each logit at one input, by autograd row by row."""

    def logits(flat: Tensor) -> Tensor:
        return model(flat.reshape(1, *x.shape))[0]

    def jacobian(flat: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(logits, flat, create_graph=True)

    flat = x.flatten()
    return torch.autograd.functional.jacobian(jacobian, flat, create_graph=create_graph)


def logit_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(K, d)."""
    return torch.autograd.functional.jacobian(
        lambda flat: model(flat.reshape(1, *x.shape))[0], x.flatten()
    )


def cross_entropy_hessian(model: nn.Module, x: Tensor, label: int) -> Tensor:
    """(d, d): of the cross-entropy of one input, by autograd."""
    target = torch.tensor([label])

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(flat.reshape(1, *x.shape)), target)

    return torch.autograd.functional.hessian(loss, x.flatten())


def norm(matrix: Tensor) -> float:
    """The spectral norm."""
    return torch.linalg.matrix_norm(matrix, 2).item()


def largest_combination(hessians: Tensor) -> float:
    """A lower bound of sup ‖Σ_k w_k H_k‖₂ over unit w, by alternating between u and w."""
    best = 0.0
    for w in torch.eye(len(hessians), dtype=hessians.dtype):
        for _ in range(10):
            values, vectors = torch.linalg.eigh(torch.einsum("k,kij->ij", w, hessians))
            top = values.abs().argmax()
            best = max(best, float(values[top].abs()))
            u = vectors[:, top]
            along = torch.einsum("i,kij,j->k", u, hessians, u)
            if not float(along.norm()):
                break
            w = along / along.norm()
    return best


def climbed(size: Callable[[Tensor], Tensor], x: Tensor, steps: int, rate: float) -> Tensor:
    """Where gradient ascent from x has found the largest value of a function of one input."""
    point = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([point], lr=rate, maximize=True)
    best, at = -1.0, x
    for _ in range(steps):
        value = size(point)
        if value.item() > best:
            best, at = value.item(), point.detach().clone()
        optimizer.zero_grad()
        (point.grad,) = torch.autograd.grad(value, point)
        optimizer.step()
    return at
