"""Freezing a network but for some parameters, and undoing it.

Frozen layers stay in eval mode whatever mode the caller sets, and become the light ones of
`light.py`. What is trainable, and what optimises it, is not known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import rewritten_weights
from flexure.contracts import FlexureError
from flexure.surgery.light import LIGHT

__all__ = ["KeepEval", "check_constant", "freeze", "stay_in_eval_mode"]


def freeze(
    model: nn.Module,
    *,
    trainable: Iterable[nn.Parameter],
    following: Iterable[nn.Module] = (),
) -> Callable[[], None]:
    """Makes everything in `model` a constant but the given parameters.

    - Every other parameter gets `requires_grad` False and loses its gradient until the end (an
      optimiser would act on it); the given ones get `requires_grad` True.
    - A module follows the caller's mode where it is one of `following`, lies inside one (the
      dropout of a trained head), or has parameters of its own that are all trainable. Every other
      module stays in eval mode, whether `train()` is called on it, on the model or on a parent, or
      its `training` is assigned to: then it is back in eval mode as soon as it is called. What
      holds only such modules is no exception: it may have buffers.
    - Frozen convolutions and BatchNorms of exactly torch's classes keep no input for backward
      (`light.py`): same values, gradients, parameters, state dict and printed form.

    What a network does only while its `training` is true, it does not do: Hugging Face's
    `gradient_checkpointing_enable()` has no effect on frozen layers. `torch.utils.checkpoint` has.

    Args:
        model: the network; changed in place. Its copies, pickled or by `copy.deepcopy`, are frozen
            too, for good.
        trainable: parameters of `model`; may be empty.
        following: modules that are trained whole, such as a head.

    Returns:
        A function that undoes all of it: `requires_grad`, gradients, modes and classes are what
        they were, the trainable parameters' gradients excepted. A second call does nothing. Of two
        that froze the same model, the later one must be called first, and what the earlier one
        froze stays in eval mode until its own is called.

    Raises:
        FlexureError: one of `trainable` is not a parameter of the model, or an embedding with
            `max_norm`, which rewrites its weight at each call, would have to stay as it is.
    """
    chosen = {id(parameter): parameter for parameter in trainable}
    strangers = chosen.keys() - {id(parameter) for parameter in model.parameters()}
    if strangers:
        shapes = ", ".join(str(tuple(chosen[key].shape)) for key in strangers)
        raise FlexureError(
            f"expected parameters of the model, got {len(strangers)} that are not its own, of "
            f"shape {shapes}; install what they belong to first"
        )
    check_constant(model, chosen.keys())
    with ExitStack() as undo:
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    _set_trainable(module, key, parameter, id(parameter) in chosen, undo)
        for module in _frozen_modules(model, chosen.keys(), following):
            _keep_in_eval_mode(module, undo)
            _lighten(module, undo)
        return undo.pop_all().close


def check_constant(model: nn.Module, trainable: Container[int] = ()) -> None:
    """Makes sure that no layer overwrites a weight that is to stay as it is.

    Args:
        model: the network.
        trainable: ids of the parameters that may change.

    Raises:
        FlexureError: an embedding with `max_norm` does.
    """
    found = [path for path, p in rewritten_weights(model).items() if id(p) not in trainable]
    if found:
        raise FlexureError(
            f"expected frozen layers to keep their weights, got max_norm in "
            f"{', '.join(repr(path or 'the model') for path in found)}, which scales rows of the "
            f"weight whenever they are looked up; do that once for all rows, then set "
            f"max_norm=None: layer.weight.data = layer.weight.data.renorm(layer.norm_type, 0, "
            f"layer.max_norm)"
        )


class KeepEval:
    """In the place of a frozen module's `train`: that module stays, its children hear the mode.

    A child that is frozen has its own. Copying or pickling the module makes one for the copy.
    """

    def __init__(self, module: nn.Module) -> None:
        # Weak: a module that refers to itself would outlive its last use, with all its memory.
        self._module = weakref.ref(module)

    def __call__(self, mode: bool = True) -> nn.Module:
        """As `nn.Module.train`, which also refuses what is not a bool."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        module = self._owner()
        module.training = False
        for child in module.children():
            child.train(mode)
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return KeepEval, (self._owner(),)

    def _owner(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise FlexureError("the module whose mode this keeps is gone; keep the module itself")
        return module


def stay_in_eval_mode(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a frozen module: undoes an assignment to `module.training`."""
    if module.training:
        module.training = False


def _set_trainable(
    owner: nn.Module, key: str, parameter: nn.Parameter, trainable: bool, undo: ExitStack
) -> None:
    undo.callback(_restore_flag, owner, key, parameter, parameter.requires_grad)
    parameter.requires_grad_(trainable)
    if not trainable:
        undo.callback(_restore_gradient, parameter, parameter.grad)
        parameter.grad = None


def _restore_gradient(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    # First none, for one of a parameter that was cast meanwhile may be of either dtype.
    parameter.grad = None
    parameter.grad = None if gradient is None else gradient.to(parameter)


def _restore_flag(owner: nn.Module, key: str, parameter: nn.Parameter, requires_grad: bool) -> None:
    parameter.requires_grad_(requires_grad)
    # `load_state_dict(assign=True)` may have put another in its place.
    current = owner._parameters[key] if key in owner._parameters else None  # noqa: SIM401
    if current is not None:
        current.requires_grad_(requires_grad)


def _frozen_modules(
    model: nn.Module, chosen: Iterable[int], following: Iterable[nn.Module]
) -> list[nn.Module]:
    """All but `following` with their inside, and those whose own parameters are all chosen."""
    chosen = set(chosen)
    inside = {id(module) for trained in following for module in trained.modules()}

    def follows(module: nn.Module) -> bool:
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        return id(module) in inside or (bool(own) and own <= chosen)

    return [module for module in model.modules() if not follows(module)]


def _keep_in_eval_mode(module: nn.Module, undo: ExitStack) -> None:
    undo.callback(setattr, module, "training", module.training)
    module.training = False
    attributes = module.__dict__
    if "train" in attributes:
        undo.callback(attributes.__setitem__, "train", attributes["train"])
    else:
        undo.callback(attributes.pop, "train", None)
    attributes["train"] = KeepEval(module)
    if not isinstance(module, torch.jit.ScriptModule):  # these refuse hooks
        undo.callback(module.register_forward_pre_hook(stay_in_eval_mode).remove)


def _lighten(module: nn.Module, undo: ExitStack) -> None:
    light = LIGHT.get(type(module))
    if light is not None and not any(p.requires_grad for p in module.parameters()):
        undo.callback(setattr, module, "__class__", type(module))
        module.__class__ = light
