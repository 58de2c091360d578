"""Which adaptation of a model is in place, and whether a first backward reaches all it trains.

What an adaptation is, is `adapt.py`'s. A model keeps its adaptations alive, and nothing here a
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.surgery.frames import run_as_python

__all__ = [
    "InPlace",
    "Mark",
    "Switch",
    "adaptation_in_place",
    "adaptations_of",
    "forget",
    "gradients_arrived",
    "mark",
    "remember",
]


class InPlace(Protocol):
    """What a mark and a switch need of an adaptation."""

    model: nn.Module

    @property
    def removed(self) -> bool:
        """Whether the model was restored for good."""
        ...

    def check_gradients(self) -> bool:
        """Whether gradients have arrived; raises if only some have."""
        ...

    def enable(self) -> Any:
        """Puts it in place."""
        ...

    def disable(self) -> Any:
        """Takes it out."""
        ...


_Kind = TypeVar("_Kind", bound=InPlace)


def adaptation_in_place(model: nn.Module) -> Any:
    """The adaptation that is in place in `model`, None if there is none.

    Raises:
        FlexureError: the model is a copy of an adapted one, which stays as it is; or a part of it
            is adapted.
    """
    for path, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if not isinstance(hook, Mark):
                continue
            if hook.owner is None:
                raise FlexureError(
                    "expected a model whose adaptation can be changed, got a copy of an adapted "
                    "model, which stays adapted; copy the model while its adaptation is disabled"
                )
            if module is not model:
                raise FlexureError(
                    f"expected a model none of whose parts is adapted by itself, got one with an "
                    f"adaptation of {path!r} in place; remove() that one, or adapt that part"
                )
            return hook.owner
    return None


def adaptations_of(model: nn.Module) -> dict[str, Any]:
    """The model's adaptations by name, in place or disabled, in the order they were made."""
    held = model.__dict__.get(_KEY)
    return dict(held) if isinstance(held, _Held) and held.model() is model else {}


def remember(model: nn.Module, name: str, adaptation: Any) -> None:
    """Takes a name: the model keeps the adaptation alive until it is removed."""
    model.__dict__[_KEY] = _Held(model, {**adaptations_of(model), name: adaptation})


def forget(model: nn.Module, name: str) -> None:
    """Gives a name back, and the last one's place on the model."""
    left = {key: value for key, value in adaptations_of(model).items() if key != name}
    model.__dict__.pop(_KEY, None)
    if left:
        model.__dict__[_KEY] = _Held(model, left)


def gradients_arrived(watched: Mapping[str, nn.Parameter]) -> bool:
    """Whether the parameters have gradients, where they require any.

    Raises:
        FlexureError: some have one, and some have none.
    """
    watched = {name: parameter for name, parameter in watched.items() if parameter.requires_grad}
    missing = [name for name, parameter in watched.items() if parameter.grad is None]
    if missing and len(missing) < len(watched):
        raise FlexureError(
            f"expected a gradient for every trained parameter after the first backward, got none "
            f"for {', '.join(missing)}: the loss does not depend on them; leave these sites out "
            f"with where=, or see that their output is used and not detached"
        )
    return not missing


class Switch(Generic[_Kind]):
    """What `enable` and `disable` return: leaving it as a context puts back what was in place."""

    def __init__(self, adaptation: _Kind, before: _Kind | None) -> None:
        self._adaptation, self._before = adaptation, before

    def __enter__(self) -> _Kind:
        return self._adaptation

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        now = adaptation_in_place(self._adaptation.model)
        if now is self._before:
            return
        if now is not None:
            now.disable()
        if self._before is not None and not self._before.removed:
            self._before.enable()


_KEY = "_flexure_adaptations"


class _Held(dict[str, Any]):
    """What a model holds: a table elsewhere would keep it alive, for adaptations refer to it.

    In copies of the model, pickled ones too, it is an empty dict.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.model = ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


def mark(model: nn.Module, adaptation: InPlace) -> Callable[[], None]:
    """Marks the adaptation as the one in place, and watches its first backward.

    Returns:
        A function that takes the mark off.
    """
    return model.register_forward_hook(Mark(adaptation)).remove


class Mark:
    """Forward hook of an adapted model's root; its gradients are checked at the first backward.

    Inert while compiling, exporting and tracing, and in copies of the model.
    """

    def __init__(self, owner: InPlace | None) -> None:
        self.owner = owner
        self.done = False
        self.queued = False

    def __getstate__(self) -> Mapping[str, Any]:
        """Without the owner: a copy of the model is nobody's."""
        return {"owner": None, "done": True, "queued": False}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Waits for the backward of a training step's output."""
        if torch.compiler.is_compiling() or self.done or not torch.is_grad_enabled():
            return
        if torch._C._get_tracing_state() is not None:
            return
        self.queued = False
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._queue)  # type: ignore[no-untyped-call]

    def _queue(self, gradient: Tensor) -> None:
        if not self.queued:
            self.queued = True
            # The gradients of parameters arrive later in the same backward: look when it ends.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._look)

    def _look(self) -> None:
        self.queued = False
        self.done = self.done or self.owner is None or self.owner.check_gradients()


run_as_python(Mark.__call__)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: itself, or in lists, tuples, dicts and attributes."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    else:
        values = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
        for value in values.values():
            if isinstance(value, (Tensor, list, tuple)):
                yield from _tensors(value)
