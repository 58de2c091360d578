"""Features of a network: what enters its head, for one setting of the dials after another.

The dials are turned by whoever calls; what is done with the features is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import call_model, evaluating, logits_of, map_tensors, take
from flexure.contracts import DataError, Example, FlexureError
from flexure.methods.samples import Samples
from flexure.surgery.preserve import preserved
from flexure.surgery.wrapped import module_at, plain_path

__all__ = ["FeatureReader", "check_head", "default_head", "device_of", "head_module"]

_CPU_BATCH = 32
"""Samples per forward pass on CPUs, whatever the batches' size: the activations of larger ones
leave the caches and are mapped anew each time, and smaller ones pay more for each call."""


class FeatureReader:
    """Reads the input of a network's head, by a hook; children are never sliced.

    The network is evaluated in eval mode without gradients. Its modes, buffers and the random
    generators are as before afterwards.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        self.model, self.head = model, head
        self._module = head_module(model, head)

    def __call__(self, samples: Samples, setting: str, *, first: bool = False) -> Tensor:
        """Features of all samples.

        Args:
            samples: what to run through the network.
            setting: how the dials stand, for messages.
            first: read no more than what goes through the network at once.

        Returns:
            (N, D) float32, on the CPU.

        Raises:
            FlexureError: the head is not called exactly once, or its input is not (B, D).
            DataError: features that are nan or infinite.
        """
        rows: list[Tensor] = []
        device = device_of(self.model)
        with preserved(self.model), evaluating(self.model), torch.no_grad(), self._hooked() as seen:
            for x, batch in samples.inputs():
                # A copy, for a network may write into its input, which later passes need.
                x = map_tensors(x, lambda leaf: leaf.to(device, copy=True))
                for part, size in _parts(x, batch, device):
                    seen.clear()
                    call_model(self.model, part)
                    rows.append(self._only(seen, size))
                    if first:
                        return rows[0]
        features = torch.cat(rows)
        if not bool(features.isfinite().all()):
            raise DataError(
                f"expected finite features, got nan or inf at {setting} in "
                f"{int((~features.isfinite()).any(1).sum())} of {len(features)} {samples.name} "
                f"samples; check the inputs, or leave that setting out"
            )
        return features

    @contextmanager
    def _hooked(self) -> Iterator[list[Any]]:
        """The list that the head's inputs are put into, one entry a call."""
        seen: list[Any] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(next(iter((*args, *kwargs.values())), None))

        handle = self._module.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    def _only(self, seen: list[Any], batch: int) -> Tensor:
        if len(seen) != 1:
            raise FlexureError(
                f"expected the head {self.head!r} to be called once per batch, got {len(seen)} "
                f"calls; name the classification layer with head="
            )
        x = seen[0]
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != batch:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise FlexureError(
                f"expected the head {self.head!r} to receive one (D,) vector per sample, got "
                f"{got} for {batch} samples; name a head behind the pooling with head="
            )
        return x.detach().to("cpu", torch.float32, copy=True)


def default_head(model: nn.Module, example: Example) -> str:
    """Path of the `nn.Linear` whose output are the logits, else of the last one that is called.

    Raises:
        FlexureError: the model calls no `nn.Linear` inside it.
    """
    linear: dict[nn.Module, str] = {
        m: name for name, m in model.named_modules() if name and isinstance(m, nn.Linear)
    }
    calls, output = _calls(model, linear, example)
    if not calls:
        raise FlexureError(
            "expected a model that calls an nn.Linear inside as its head, found none; name the "
            "module whose input are the features with head="
        )
    exact = [module for module, out in calls if _gives(out, output)]
    return plain_path(model, linear[(exact or [module for module, _ in calls])[-1]])


def check_head(model: nn.Module, head: str, example: Example) -> None:
    """Makes sure that a probe can take the head's place: what the head gives are the logits.

    Log-probabilities and probabilities of the logits are as good: the order is the same. A head
    that is not called once on (B, D) is left to `FeatureReader`, whose message says so.

    Raises:
        FlexureError: the model makes something else of the head's output.
    """
    module = head_module(model, head)
    calls, output = _calls(model, {module: head}, example)
    if len(calls) != 1 or not isinstance(calls[0][1], Tensor) or calls[0][1].dim() != 2:
        return
    if output is not None and not _gives(calls[0][1], output):
        raise FlexureError(
            f"expected the output of the head {head!r} to be the model's logits, got other values; "
            f"name the classification layer with head="
        )


def head_module(model: nn.Module, head: str) -> nn.Module:
    """The module at the plain path `head`.

    Raises:
        FlexureError: there is none, it is the model itself, or it is neither linear nor empty.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not head or head not in modules:
        linear = [name for name, m in modules.items() if isinstance(m, nn.Linear) and name]
        raise FlexureError(
            f"expected head= to be the path of a module inside the model, got {head!r}; its "
            f"linear layers are {', '.join(linear[-5:]) or 'none'}"
        )
    found = module_at(model, head)
    if not any(isinstance(module, nn.Linear | nn.Identity) for module in found.modules()):
        raise FlexureError(
            f"expected the head to be, or to hold, an nn.Linear or nn.Identity, got "
            f"{type(found).__name__} at {head!r}"
        )
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _calls(
    model: nn.Module, modules: Mapping[nn.Module, str], example: Example
) -> tuple[list[tuple[nn.Module, Any]], Tensor | None]:
    """The calls of `modules` in one forward pass with what they gave, and the model's logits."""
    calls: list[tuple[nn.Module, Any]] = []
    handles = [m.register_forward_hook(lambda m, _, out: calls.append((m, out))) for m in modules]
    try:
        with preserved(model), evaluating(model), torch.no_grad():
            output = call_model(model, map_tensors(example, torch.Tensor.clone))
    finally:
        for handle in handles:
            handle.remove()
    try:
        return calls, logits_of(output)
    except FlexureError:
        return calls, None  # features can be read all the same


def _gives(found: Any, logits: Tensor | None) -> bool:
    if found is logits:
        return True
    if logits is None or not isinstance(found, Tensor) or found.shape != logits.shape:
        return False
    same = (found, found.log_softmax(-1), found.softmax(-1))
    return any(torch.allclose(x.to(logits), logits, equal_nan=True) for x in same)


def _parts(x: Any, batch: int, device: torch.device) -> Iterator[tuple[Any, int]]:
    """A batch, in pieces where that is faster. Only plain tensors are known to be divisible."""
    if device.type != "cpu" or not isinstance(x, Tensor) or batch <= _CPU_BATCH:
        yield x, batch
        return
    for start in range(0, batch, _CPU_BATCH):
        end = min(start + _CPU_BATCH, batch)
        yield take(x, slice(start, end), batch), end - start
