"""A forward pass that leaves no trace: what it writes, and random generators, are put back.

Nothing here knows what an activation is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from flexure.calling import unwritten

__all__ = ["preserved"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores `model` and the random generators on exit, bit for bit.

    Covers what `flexure.calling.unwritten` does, and the generators of Python, NumPy and PyTorch on
    every device in use.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), unwritten(model):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
