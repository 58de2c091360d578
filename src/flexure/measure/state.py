"""The state of torch that measures compute in, put back: attention, precision, randomness.

It is the whole process's, so that one thread measures at a time. A model's own state (modes,
gradients) is the business of `measure/fields.py`.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = [
    "full_precision",
    "one_at_a_time",
    "twice_differentiable",
    "unchanged_randomness",
    "uncompiled",
]

_LOCK = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Other threads wait here; the thread that is inside may enter again.

    Modes of models, flags of torch and global generators are shared by threads: one that came in
    between would take another's temporary state for the one to put back.
    """
    with _LOCK:
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, CUDA multiplies and convolves float32 in float32, not in the 11 bits of TF32."""
    backends: Any = torch.backends
    exact: Any
    places = [backends.cuda.matmul, backends.cudnn]
    name, exact = "allow_tf32", False
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # since torch 2.9, and not to be mixed
        places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        name, exact = "fp32_precision", "ieee"
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


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


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, what torch.compile made runs as Python: it cannot compile for a tensor subclass."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def unchanged_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Puts back what is drawn inside from the global generators of torch, Python and NumPy.

    Args:
        device: whose generator, besides the CPU's; None: every CUDA device in use.
    """
    with one_at_a_time():
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
