"""A forward pass that leaves no trace: what it writes, and random generators, are put back.

Nothing here knows what an activation is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["preserved", "rewritten_weights"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restores `model` and the random generators on exit, bit for bit.

    Covers buffers, the weights that torch's own layers overwrite (`rewritten_weights`), whatever a
    module binds to its attributes (counters, caches), and the generators of Python, NumPy and
    PyTorch on every device in use. Another parameter that the pass overwrites, and a list or dict
    that it changes in place, are not covered.
    """
    modules = [
        (module, _attributes(module), dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    overwritten = (*model.buffers(), *rewritten_weights(model).values())
    contents = {
        id(tensor): (tensor, tensor.detach().clone())
        for tensor in overwritten
        if not tensor.is_meta
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
                for tensor, content in contents.values():
                    if not torch.equal(tensor, content):
                        tensor.copy_(content)


def rewritten_weights(model: nn.Module) -> dict[str, Tensor]:
    """Path -> weight, of every layer that rewrites its weight when it is called, in eval mode too.

    An embedding with `max_norm` scales down the rows that it looks up, in place.
    """
    return {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(module, _RENORMALISING) and module.max_norm is not None
    }


_RENORMALISING = (nn.Embedding, nn.EmbeddingBag)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps besides parameters, buffers, children and hooks."""
    return {
        key: value
        for key, value in module.__dict__.items()
        if not (key.startswith("_") and key in _OWN)
    }


_OWN = frozenset(nn.Module().__dict__)
