"""The state in which models are measured and attacked, put back: modes, precision, randomness.

Some of it is the whole process's, so that one thread measures at a time. What is computed inside is
not known here.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from flexure.calling import evaluating, unwritten
from flexure.contracts import FlexureError

__all__ = [
    "constant_parameters",
    "full_precision",
    "measuring",
    "one_at_a_time",
    "twice_differentiable",
    "unchanged_randomness",
    "uncompiled",
]

_LOCK = threading.RLock()


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """The state in which measures call a model; everything is put back at the end.

    Eval mode, parameters without gradients (the input's are what is asked for), autocast off,
    grad mode on, no TF32, and scaled-dot-product attention by its MATH backend, the only one that
    can be differentiated twice. What models draw from global random generators is put back, and
    what they write into buffers and attributes. One thread of the process is inside at a time.

    Args:
        model: a module, or anything else, which is left alone.

    Raises:
        FlexureError: the model was built in inference mode.
    """
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time())
        if isinstance(model, nn.Module):
            _refuse_unusable(model)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(twice_differentiable())
        stack.enter_context(full_precision())
        stack.enter_context(unchanged_randomness())
        if isinstance(model, nn.Module):
            stack.enter_context(unwritten(model))
            stack.enter_context(evaluating(model))
            stack.enter_context(constant_parameters(model))
        yield


@contextmanager
def constant_parameters(model: nn.Module) -> Iterator[None]:
    """Parameters that need no gradient: graphs are smaller, and products cheaper."""
    needed = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


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


def _refuse_unusable(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise FlexureError(
                f"expected a model whose parameters have values, got {name!r} of a lazy layer "
                f"without; call the model once on a batch before it is measured"
            )
        if tensor.is_inference():
            raise FlexureError(
                f"expected a model that was built outside of torch.inference_mode, got {name!r} "
                f"made inside, which autograd cannot use; measure copy.deepcopy(model)"
            )
