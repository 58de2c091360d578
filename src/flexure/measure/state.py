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
def unchanged_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Puts back what is drawn inside from the global generators of torch, Python and NumPy.

    Args:
        device: whose generator, besides the CPU's; None: every CUDA device in use.
    """
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    kind, devices = "cuda", list[torch.device | int]()
    if device is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.extend(range(torch.cuda.device_count()))
    elif device is not None and device.type != "cpu":
        kind, devices = device.type, [device]
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)
