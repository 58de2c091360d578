"""A measure must leave everything as it was: the model to the bit, and what is global."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module | None = None, *tensors: Tensor) -> Iterator[None]:
    """Fails if anything inside changes the model, the tensors or global state, also after an error.

    Compared are the values, dtypes and `requires_grad` of parameters, buffers and `tensors`, which
    tensors they are, their `.grad`, modes, hooks, attributes and submodules of every module; the
    random states of torch, NumPy and Python; grad mode, autocast, the attention backends, threads.
    """
    before = _state(model, tensors)
    try:
        yield
    finally:
        after = _state(model, tensors)
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        if changed:
            pytest.fail(f"changed: {sorted(changed)}")


def _state(model: nn.Module | None, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    state: dict[str, Any] = dict(_globals())
    for index, tensor in enumerate(tensors):
        state[f"tensor {index}"] = _described(tensor)
    for path, module in [] if model is None else model.named_modules():
        state[f"module {path!r}"] = (id(module), type(module), module.training)
        for name, value in vars(module).items():
            state[f"module {path!r} {name}"] = _attribute(value)
    return state


def _globals() -> Iterator[tuple[str, Any]]:
    yield "torch's generator", torch.random.get_rng_state().numpy().tobytes()
    if torch.cuda.is_available():
        yield "CUDA generators", [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    yield "NumPy's generator", str(np.random.get_state(legacy=False))
    yield "Python's generator", random.getstate()
    yield "grad mode", torch.is_grad_enabled()
    yield "inference mode", torch.is_inference_mode_enabled()
    yield "autocast", torch.is_autocast_enabled("cpu")
    yield "default dtype", torch.get_default_dtype()
    yield "threads", torch.get_num_threads()
    yield "deterministic", torch.are_deterministic_algorithms_enabled()
    for backend in ("flash", "mem_efficient", "math", "cudnn"):
        yield f"{backend} attention", getattr(torch.backends.cuda, f"{backend}_sdp_enabled")()


def _attribute(value: Any) -> Any:
    """What can be compared of a module's attribute: bits of tensors, identities of the rest."""
    if isinstance(value, Tensor):
        return _described(value)
    if isinstance(value, dict):
        return [(key, _attribute(item)) for key, item in value.items()]
    if isinstance(value, bool | int | float | str | None):
        return value
    return id(value)


def _described(tensor: Tensor) -> Any:
    bits = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    grad = None if not tensor.is_leaf or tensor.grad is None else _described(tensor.grad)
    kind = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.requires_grad)
    return id(tensor), kind, hash(bits), grad
