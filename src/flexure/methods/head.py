"""The head that an adaptation trains, in the place of the model's own, which stays untouched.

Which head, and when it is in place, is `adapt.py`'s; how it is trained, the training loop's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from flexure.addresses import first_line
from flexure.calling import seeded
from flexure.contracts import AdapterError, Example, FlexureError
from flexure.methods.features import check_head, default_head, head_module
from flexure.surgery.replace import HOOKS, linear_of, replace_module
from flexure.surgery.wrapped import is_tuned, module_at, plain_path

__all__ = ["HEAD_LEARNING_RATE", "Head", "copied_head", "find_head", "fresh_head", "stored_head"]

HEAD_LEARNING_RATE = 1e-3
"""Of the head in every comparison, with Adam; as published for the probe
(Curvature Tuning, experiments)."""


class Head:
    """A trained head, put in the place of a model's own and taken out again.

    Attributes:
        path: where it goes.
        module: the trained head.
    """

    def __init__(self, model: nn.Module, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self._model = model
        self._put_back: Callable[[], None] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by their names inside it."""
        return dict(self.module.named_parameters())

    def insert(self) -> None:
        """Puts it in place; in place: does nothing."""
        if self._put_back is None:
            self._put_back = replace_module(self._model, self.path, self.module)

    def withdraw(self) -> None:
        """Puts the model's own head back; not in place: does nothing."""
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold of it."""
        return dict(self.module.state_dict())


def find_head(model: nn.Module, head: str | None, example: Example) -> str:
    """The path of the head: the one given, checked, or the last `nn.Linear` that is called.

    Raises:
        FlexureError: there is none, it does not give the logits, or the example does not run.
    """
    try:
        path = default_head(model, example) if head is None else head
        check_head(model, path, example)
    except FlexureError:
        raise
    except Exception as error:  # whatever a model raises
        raise FlexureError(
            f"expected an example that runs through the model, got {first_line(error)}; give one "
            f"input with a batch axis, on the model's device and in its dtype"
        ) from error
    if is_tuned(model, path):
        raise FlexureError(
            f"expected a head that PEFT leaves alone, got {path!r}; merge_and_unload() first, or "
            f"leave the head out of PEFT's target_modules"
        )
    return plain_path(model, path)


def copied_head(model: nn.Module, path: str) -> nn.Module:
    """A copy of the head at `path`, trainable, with the same hooks.

    Raises:
        FlexureError: there is no head at `path`.
    """
    old = head_module(model, path)
    hooks = [module.__dict__[key] for module in old.modules() for key in HOOKS]
    new: nn.Module = copy.deepcopy(old, {id(held): held for held in hooks})
    for parameter in new.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return new


def fresh_head(model: nn.Module, path: str, classes: int, seed: int) -> nn.Linear:
    """An `nn.Linear` for so many classes, with torch's initial weights, drawn from `seed`.

    Raises:
        FlexureError: there is no `nn.Linear` with weights of its own at `path`, or `classes` is
            not a positive whole number.
    """
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise FlexureError(f"expected classes, a positive whole number, got {classes!r}")
    old = head_module(model, path)
    if not isinstance(old, nn.Linear) or "weight" not in old._parameters:
        raise FlexureError(
            f"expected an nn.Linear at {path!r}, to be replaced by one for {classes} classes, got "
            f"{type(old).__name__}; name the last linear layer with head=, or leave classes= out "
            f"to train what is there"
        )
    with seeded(seed):
        return nn.Linear(old.in_features, classes)


def stored_head(model: nn.Module, path: object, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The head of an adapter file.

    Args:
        model: where it belongs; unchanged.
        path: of the head it takes the place of.
        tensors: its state dict.

    Raises:
        AdapterError: the model has no such head, or one that takes other features or has other
            tensors; or a tensor is missing or not finite.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(path, str) or not path or path not in modules:
        raise AdapterError(f"the adapter's head belongs at {path!r}; the model has no such module")
    damaged = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if damaged:
        raise AdapterError(
            f"expected finite numbers in the adapter's head, got others in {', '.join(damaged)}: "
            f"the file is damaged"
        )
    old = module_at(model, path)
    own = {name: tensor.shape for name, tensor in old.state_dict().items()}
    if own == {name: tensor.shape for name, tensor in tensors.items()}:
        new = copied_head(model, path)
        new.load_state_dict(tensors)
        return new
    return _linear(old, path, tensors)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _linear(old: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Linear:
    """The linear layer that was trained in the place of `old`, whatever that was."""
    weight = tensors.get("weight")
    if weight is None or tensors.keys() - {"weight", "bias"}:
        raise AdapterError(
            f"expected the adapter to hold head.weight and head.bias, or what the model's {path!r} "
            f"holds, got {', '.join(f'head.{name}' for name in tensors) or 'neither'}: the file is "
            f"damaged, or was made for another model"
        )
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise AdapterError("expected the adapter's head in floating point: the file is damaged")
    new = linear_of(weight, tensors.get("bias"))
    if isinstance(old, nn.Linear) and old.in_features != new.in_features:
        raise AdapterError(
            f"the adapter's head takes {new.in_features} features, the model's {path!r} "
            f"takes {old.in_features}: another model"
        )
    return new
