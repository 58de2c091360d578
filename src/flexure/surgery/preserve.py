"""A forward pass that leaves no trace: buffers, attributes and random generators are put back.

Nothing here knows what an activation is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["preserved"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores `model` and the random generators on exit, bit for bit.

    Covers buffers, whatever a module binds to its attributes (counters, caches), and the
    generators of Python, NumPy and PyTorch on every device in use. A parameter that the pass
    overwrites, and a list or dict that it changes in place, are not covered.
    """
    modules = [
        (module, _attributes(module), dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    contents = {
        id(buffer): (buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta
    }
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, attributes, buffers in modules:
                for key in _attributes(module).keys() - attributes.keys():
                    del module.__dict__[key]
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, content in contents.values():
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps besides parameters, buffers, children and hooks."""
    return {
        key: value
        for key, value in module.__dict__.items()
        if not (key.startswith("_") and key in _OWN)
    }


_OWN = frozenset(nn.Module().__dict__)
