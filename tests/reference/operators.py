"""Linear layers as matrices, by applying them to a basis, and their norms by SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexure.layers.norms import NormBounds


def dense_matrix(apply: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """The matrix `(outputs, inputs)` of a map of batches of `shape`, affine or linear, float64."""
    count = math.prod(shape)
    basis = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    with torch.no_grad():
        images = apply(basis) - apply(torch.zeros(1, *shape, dtype=torch.float64))
    return images.reshape(count, -1).mT


def dense_norms(matrix: Tensor) -> NormBounds:
    """All norms of a matrix, each by its definition."""
    return NormBounds(
        spectral=float(torch.linalg.svdvals(matrix)[0]),
        row=max(float(row.norm()) for row in matrix),
        column=max(float(column.norm()) for column in matrix.mT),
        row_sum=float(torch.linalg.matrix_norm(matrix, math.inf)),
        column_sum=float(torch.linalg.matrix_norm(matrix, 1)),
    )
