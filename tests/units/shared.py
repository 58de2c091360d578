"""What the tests of the units share: dtypes, strategies, dials in every form."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

DOUBLE = torch.float64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, DOUBLE)
ALMOST_ONE = math.nextafter(1.0, 0.0)

dial = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 0.5, 0.999, 1 - 1e-7, ALMOST_ONE, 1]))
anything = st.one_of(
    st.floats(-8, 8),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from([0.0, -0.0, 1e-30, 65504.0, -65504.0, 3.4e38, -3.4e38]),
)


def as_dials(beta: float, c: float, kind: str) -> tuple[float | Tensor, float | Tensor]:
    """The pair as numbers, as tensors without dimensions, or as one pair per channel of two."""
    if kind == "number":
        return beta, c
    size = () if kind == "scalar" else (2,)
    return torch.full(size, beta, dtype=DOUBLE), torch.full(size, c, dtype=DOUBLE)


def tensors(*values: float, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, ...]:
    """Leaves without dimensions."""
    return tuple(torch.tensor(v, dtype=dtype, requires_grad=True) for v in values)
