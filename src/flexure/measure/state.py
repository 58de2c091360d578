"""The state of torch that measures compute in, put back afterwards: random generators, attention.

A model's own state (modes, gradients) is the business of `measure/fields.py`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["twice_differentiable", "unchanged_randomness"]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention is computed by operators that have second derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def unchanged_randomness(device: torch.device) -> Iterator[None]:
    """Puts back what is drawn inside from the global generators of torch, Python and NumPy."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    kind = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
