"""What a training saves: where and when, its random generators and its optimiser.

The file itself is `flexure.train.state_file`'s; what else belongs to the state of a training is
the loop's business.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from flexure.contracts import FlexureError
from flexure.train.state_file import check_tree, load_state, save_state

__all__ = [
    "Checkpoint",
    "check_optimizer_tree",
    "load_optimizer_tree",
    "load_state",
    "optimizer_tree",
    "rng_state",
    "save_state",
    "set_rng_state",
]


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a training saves its state; it goes on from there if it is killed.

    Attributes:
        path: a folder for this run alone.
        every: updates between two saves, besides the save at the end of each epoch; None: no
            other saves.

    Raises:
        FlexureError: `path` is empty, or `every` is below 1.
    """

    path: str | os.PathLike[str]
    every: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not os.fspath(self.path):
            raise FlexureError(f"expected path to be a folder, got {self.path!r}; name one")
        every = self.every
        if every is not None and (type(every) is not int or every < 1):
            raise FlexureError(
                f"expected every to be a number of updates, at least 1, or None, got {every!r}"
            )


def rng_state() -> dict[str, Any]:
    """The states of all global generators: torch (CPU, every CUDA device), Python's, numpy's.

    Returns:
        A tree that `save_state` takes. CUDA is left out as long as nothing has used it.
    """
    # Asking a device that was never used for its state would claim memory on it.
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    keys = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if used else [],
        "python": random.getstate(),
        "numpy": _map_arrays(keys, _as_signed),
    }


def set_rng_state(tree: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` returned; states of CUDA devices that are not here are skipped.

    Raises:
        FlexureError: `tree` is something else; the generators are then as they were.
    """
    before = rng_state()
    try:
        _set_rng_state(tree)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        _set_rng_state(before)
        raise FlexureError(
            f"expected the states of random generators as rng_state returns them, got something "
            f"else ({error})"
        ) from error


def optimizer_tree(optimizer: Optimizer) -> dict[str, Any]:
    """The state and the settings of an optimiser of `torch.optim`, or of one that works like it.

    Returns:
        A tree that `save_state` takes, for `load_optimizer_tree`. It holds the optimiser's own
        tensors, not copies: the next step changes it.

    Raises:
        FlexureError: the optimiser keeps something that has no such form, or keeps it elsewhere
            than in `.state` and `.param_groups`.
    """
    stored = optimizer.state_dict()
    if set(stored) != {"state", "param_groups"}:
        raise FlexureError(
            f"expected an optimiser with its state in .state and .param_groups, got "
            f"{type(optimizer).__name__} with {sorted(map(str, stored))}; train without checkpoint"
        )
    parameters = _parameters(optimizer)
    groups = [
        {**group, "params": [list(p.shape) for p in own["params"]]}
        for group, own in zip(stored["param_groups"], optimizer.param_groups, strict=True)
    ]
    state = []
    for index, values in stored["state"].items():
        owner = parameters[index] if isinstance(index, int) else None
        state.append({"of": index, "values": values, "apart": _apart(values, owner)})
    tree = {"optimizer": type(optimizer).__name__, "groups": groups, "state": state}
    check_tree(tree, f"the state of {type(optimizer).__name__}")
    return tree


def check_optimizer_tree(optimizer: Optimizer, tree: Mapping[str, Any]) -> None:
    """Checks that `tree` is what `optimizer_tree` returned of an optimiser like this one.

    Raises:
        FlexureError: it is of another one.
    """
    shapes = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    here = (type(optimizer).__name__, shapes)
    try:
        there = (tree["optimizer"], [group["params"] for group in tree["groups"]])
        entries = [(entry["of"], entry["values"], entry["apart"]) for entry in tree["state"]]
    except (KeyError, TypeError) as error:
        raise FlexureError(
            f"expected the tree of an optimiser as optimizer_tree returns it, got something else "
            f"({type(error).__name__}: {error})"
        ) from error
    if here != there or not all(isinstance(values, Mapping) for _, values, _ in entries):
        raise FlexureError(
            f"expected the state of {here[0]} on parameters of shapes {here[1]} by group, got that "
            f"of {there[0]} on {there[1]}; train with the settings of the checkpoint, or choose "
            f"another folder"
        )


def load_optimizer_tree(optimizer: Optimizer, tree: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_tree` returned: the next step is the same, bit by bit.

    Args:
        optimizer: of the same class, on parameters of the same shapes in the same groups.
        tree: is not changed, and shares no memory with the optimiser afterwards.

    Raises:
        FlexureError: the optimiser is another one; it is then unchanged.
    """
    check_optimizer_tree(optimizer, tree)
    parameters, counts = _parameters(optimizer), iter(range(len(_parameters(optimizer))))
    groups = optimizer.param_groups
    stored = [
        {**group, "params": [next(counts) for _ in group["params"]]} for group in tree["groups"]
    ]
    state = {entry["of"]: entry["values"] for entry in tree["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": stored})
    # torch casts what it loads to the parameter's dtype and device (all but `step`); scalars that
    # are kept in float32 or on the CPU beside it would make another next step.
    for entry in tree["state"]:
        owner = parameters[entry["of"]] if isinstance(entry["of"], int) else None
        optimizer.state[cast(Tensor, entry["of"]) if owner is None else owner] = {
            key: _placed(value, None if owner is None or key in entry["apart"] else owner.device)
            for key, value in entry["values"].items()
        }
    # The same dictionaries as before: schedules hold them.
    for group, loaded in zip(groups, optimizer.param_groups, strict=True):
        own = dict(group)
        group.clear()
        group.update({key: _beside(value, own.get(key)) for key, value in loaded.items()})
    optimizer.param_groups = groups


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in its lists, tuples and dicts replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value


def _map_arrays(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value` with every numpy array in its dicts replaced."""
    if isinstance(value, Mapping):
        return {key: _map_arrays(item, function) for key, item in value.items()}
    return function(value) if isinstance(value, np.ndarray) else value


def _as_signed(array: Any) -> Tensor:
    # Not every version of safetensors takes the unsigned integers of numpy's generators.
    return torch.from_numpy(array.view(f"i{array.itemsize}").copy())


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """In the order in which a state dict numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _apart(values: Any, owner: Tensor | None) -> list[str]:
    """The keys of a parameter's state that stay on the CPU while the parameter is elsewhere."""
    if owner is None or owner.device.type == "cpu" or not isinstance(values, Mapping):
        return []
    return [key for key, value in values.items() if any(t.device.type == "cpu" for t in _in(value))]


def _in(value: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    _map_tensors(value, found.append)
    return iter(found)


def _placed(value: Any, device: torch.device | None) -> Any:
    """A copy of `value`, its tensors on `device`; None: where they are."""
    return _map_tensors(value, lambda tensor: tensor.detach().to(device, copy=True))


def _beside(value: Any, own: Any) -> Any:
    """A setting; a tensor goes where the optimiser's own is."""
    return value.to(own.device) if isinstance(value, Tensor) and isinstance(own, Tensor) else value


def _set_rng_state(tree: Mapping[str, Any]) -> None:
    random.setstate(tree["python"])
    np.random.set_state(
        {
            key: _map_tensors(value, lambda t: t.numpy().view(f"u{t.itemsize}"))
            for key, value in tree["numpy"].items()
        }
    )
    torch.set_rng_state(tree["torch"])
    for device, state in zip(range(torch.cuda.device_count()), tree["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)
