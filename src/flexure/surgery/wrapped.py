"""Networks inside wrappers, of PyTorch and of other libraries.

`torch.compile` and data parallelism wrap a network, and so does PEFT, which also keeps layers that
it trains whole in wrappers inside it; `merge_and_unload()` hands out the network without any. What
flexure puts into a model goes into the network itself, by the paths that it has on its own, or
after a merge: it then survives one, and its files load on either.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn

from flexure.contracts import FlexureError

__all__ = ["is_tuned", "module_at", "plain_path", "unwrapped", "unwrapped_to_train"]

_PARALLEL = ("torch.nn.parallel.distributed", "DistributedDataParallel")
_AROUND = (
    ("peft", "PeftModel", "base_model"),
    ("peft", "PeftMixedModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    (*_PARALLEL, "module"),
)
"""Module and class of each wrapper, and its attribute that holds what is inside."""

_INSIDE = ("peft.utils.other", "ModulesToSaveWrapper")
_TUNED = ("peft.tuners.tuners_utils", "BaseTunerLayer")
_COPIES = "modules_to_save"
"""Its child with the copies that are trained, by the name of PEFT's adapter."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside all wrappers; a model in no wrapper as it is.

    Raises:
        FlexureError: it is no network.
    """
    if not isinstance(model, nn.Module):
        raise FlexureError(
            f"expected a network, an nn.Module, got {model!r}; load_model(address).model is one"
        )
    for module, name, attribute in _AROUND:
        if _is(model, module, name):
            inside: nn.Module = getattr(model, attribute)
            return unwrapped(inside)
    return model


def unwrapped_to_train(model: nn.Module) -> nn.Module:
    """As `unwrapped`, for parameters to be added; warns of what would not average their gradients.

    `DistributedDataParallel` knows the parameters that it was made around, and no later ones: each
    process would go its own way, without an error.
    """
    inside, around = unwrapped(model), model
    while around is not inside:
        group: Any = getattr(around, "process_group", None)
        if _is(around, *_PARALLEL) and group.size() > 1:
            warnings.warn(
                "DistributedDataParallel does not average the gradients of parameters that are "
                "added later: to train them, make it anew around the adapted network",
                stacklevel=3,
            )
        row = next(row for row in _AROUND if _is(around, *row[:2]))
        around = getattr(around, row[2])
    return inside


def plain_path(model: nn.Module, path: str) -> str:
    """The path that the module at `path` has, or would have, after a merge.

    Raises:
        AttributeError: the model has no module at `path`.
    """
    plain: list[str] = []
    module, names = model, iter(path.split("."))
    for name in names:
        inside = _is(module, *_INSIDE)
        module = module.get_submodule(name)
        if not inside:
            plain.append(name)
        elif name == _COPIES:
            module = module.get_submodule(next(names))
    return ".".join(plain)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a plain path; of a layer that PEFT trains whole, the copy that is in use.

    Raises:
        AttributeError: the model has no module at `path`.
    """
    module: Any = model.get_submodule(path)
    while _is(module, *_INSIDE):
        active = module.active_adapter
        module = module.modules_to_save[active if isinstance(active, str) else active[0]]
    found: nn.Module = module
    return found


def is_tuned(model: nn.Module, path: str) -> bool:
    """Whether the module at `path` is, holds, or is part of a layer that PEFT adapts."""
    names = path.split(".")
    around = (model.get_submodule(".".join(names[:count])) for count in range(1, len(names)))
    inside = module_at(model, path).modules()
    return any(_is(module, *_TUNED) for module in (*around, *inside))


def _is(model: nn.Module, module: str, name: str) -> bool:
    # A library that nothing has imported has wrapped nothing.
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(model, kind)
