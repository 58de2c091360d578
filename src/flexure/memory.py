"""Counting the bytes that a computation holds: for backward, and at its peak.

Counts tensors, not what allocators do with them, so that on the CPU the numbers are the same on
every machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes", "saved_bytes"]


def saved_bytes(run: Callable[[], Any], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward when `run` has returned.

    Counted are the storages of the tensors that the graph saves, each storage once and wholly (a
    saved view keeps all of it), as long as the result is alive: what only dropped parts of the
    graph saved is not counted. Not seen: what an autograd function keeps by other means than
    `save_for_backward`, and what other saved-tensor hooks inside `run` take over.

    Args:
        run: builds the graph and returns what holds on to it, such as the loss.
        exclude: tensors whose storages do not count: parameters, buffers, inputs.
    """
    graph: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        graph.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = run()
    storages = {_key(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in graph}
    del result
    excluded = {_key(tensor) for tensor in exclude}
    return sum(size for key, size in storages.items() if key not in excluded)


def peak_bytes(run: Callable[[], Any], *, device: torch.device | str = "cpu") -> int:
    """The largest number of bytes that `run` holds at one time beyond what was there before.

    On the CPU: the storages of the tensors that operators return while `run` runs, backward passes
    included, each from the operator that made it until it is freed. Scratch space inside an
    operator is not seen, nor is memory that comes from elsewhere (NumPy). On a CUDA device: the
    rise of `torch.cuda.max_memory_allocated`, which sees scratch space and rounds sizes up.

    Args:
        run: called once; what it returns is dropped.
        device: where it computes; tensors elsewhere do not count.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        before = torch.cuda.memory_allocated(where)
        torch.cuda.reset_peak_memory_stats(where)
        run()
        torch.cuda.synchronize(where)
        return int(torch.cuda.max_memory_allocated(where)) - before
    allocations = _Allocations(where.type)
    with allocations:
        run()
    return allocations.peak


class _Saved:
    """A saved tensor, which nothing but the graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operator that makes it until it is freed."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.peak = self.total = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set() if func in _FRESH else {_key(t) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if tensor.device.type == self.device and (
                (key := _key(tensor)) in self._sizes or key not in given
            ):
                self._hold(key, tensor.untyped_storage())
        return out

    def _hold(self, key: int, storage: torch.UntypedStorage) -> None:
        """Counts a new storage, or an old one's new size."""
        if key not in self._sizes:
            # The object lives as long as the memory, whoever holds it.
            self._watched[key] = weakref.ref(storage, lambda _: self._release(key))
        self.total += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.total)

    def _release(self, key: int) -> None:
        self.total -= self._sizes.pop(key)
        del self._watched[key]


_FRESH = (torch.ops.aten.lift_fresh.default,)
"""Operators that return their argument, which Python has just made (`torch.tensor`)."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    """Tells storages apart that are alive."""
    return int(tensor.untyped_storage()._cdata)
