"""What the simplest methods install: nothing, or other values for every weight of a network.

The methods are in `baselines.py`; freezing and the head are `adapt.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import AdapterError
from flexure.surgery.frozen import check_constant

__all__ = ["NothingInstalled", "Weights", "check_names"]


class NothingInstalled:
    """An `InstalledMethod` that is nothing: the head alone is trained."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """None."""
        return {}

    def insert(self) -> None:
        """Does nothing."""

    def withdraw(self) -> None:
        """Does nothing."""

    def freeze(self) -> None:
        """Does nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def structure(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def betas(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def cs(self) -> dict[str, Tensor]:
        """None."""
        return {}


class Weights(NothingInstalled):
    """An `InstalledMethod`: other values for all parameters and buffers outside the head.

    Parameters stay the same objects, which recurrent layers and optimisers refer to, and get other
    data; buffers, which layers write into, are exchanged.
    """

    def __init__(self, model: nn.Module, head: str | None) -> None:
        inside = set() if head is None else set(model.get_submodule(head).modules())
        self._model = model
        self._modules = {path: m for path, m in model.named_modules() if m not in inside}
        self._parameters: dict[str, nn.Parameter] = dict(_each(self._modules, "_parameters"))
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._buffers = {name: b.detach().clone() for name, b in _each(self._modules, "_buffers")}
        self._undo: ExitStack | None = None
        self._frozen = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every weight that can be trained, by its name in the model."""
        trainable = {} if self._frozen else self._parameters
        return {name: p for name, p in trainable.items() if p.is_floating_point()}

    def insert(self) -> None:
        """Puts the trained values in the place of the original ones."""
        if self._undo is not None:
            return
        self._undo = ExitStack()
        for name, parameter in self._parameters.items():
            held = parameter.data, parameter.grad, parameter.requires_grad
            self._undo.callback(_give_back, parameter, *held)
            parameter.grad = None
            parameter.data = self._values[name].to(parameter)
            parameter.requires_grad_(parameter.is_floating_point() and not self._frozen)
        new = {
            id(old): self._buffers[name].to(old) for name, old in _each(self._modules, "_buffers")
        }
        for module in self._modules.values():
            self._undo.callback(_exchange_back, module._buffers, dict(module._buffers))
            module._buffers.update(
                {key: new[id(old)] for key, old in module._buffers.items() if old is not None}
            )

    def withdraw(self) -> None:
        """Puts the original values back."""
        if self._undo is not None:
            self._values = {name: p.data for name, p in self._parameters.items()}
            self._buffers = dict(_each(self._modules, "_buffers"))
            self._undo.close()
            self._undo = None

    def freeze(self) -> None:
        """Makes the trained weights constants.

        Raises:
            FlexureError: a layer would go on overwriting its weight.
        """
        check_constant(self._model)
        self._frozen = True

    def tensors(self) -> dict[str, Tensor]:
        """All weights, and the buffers that a state dict holds."""
        if self._undo is None:
            values, buffers = self._values, self._buffers
        else:
            values = {name: p.detach() for name, p in self._parameters.items()}
            buffers = dict(_each(self._modules, "_buffers"))
        passing = {
            _join(path, key)
            for path, module in self._modules.items()
            for key in module._non_persistent_buffers_set
        }
        return {**values, **{name: b for name, b in buffers.items() if name not in passing}}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes stored values, while the original ones are in place.

        Raises:
            AdapterError: they are not those of this model.
        """
        expected = self.tensors()
        check_names(expected, tensors)
        for name, own in expected.items():
            tensor = tensors[name]
            if tensor.shape != own.shape or tensor.dtype != own.dtype:
                raise AdapterError(
                    f"expected {name} of shape {tuple(own.shape)} and {own.dtype}, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}: another model, or a damaged file"
                )
            if name in self._values and not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{name} is not finite: the file is damaged")
            held = self._values if name in self._values else self._buffers
            held[name] = tensor.to(own.device, copy=True)


def _each(modules: Mapping[str, nn.Module], holder: str) -> Iterator[tuple[str, Any]]:
    """Name and value of every parameter or buffer, each once."""
    seen: set[int] = set()
    for path, module in modules.items():
        for key, value in getattr(module, holder).items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield _join(path, key), value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _give_back(
    parameter: nn.Parameter, data: Tensor, gradient: Tensor | None, trainable: bool
) -> None:
    """A parameter as it was, on the device and in the dtype that the model has now."""
    parameter.grad = None
    parameter.data = data.to(parameter)
    parameter.grad = gradient if gradient is None else gradient.to(parameter)
    parameter.requires_grad_(trainable)


def _exchange_back(buffers: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> None:
    """A module's buffers as they were, likewise."""
    now = dict(buffers)
    buffers.clear()
    for key, old in before.items():
        like = now.get(key)
        buffers[key] = old if old is None or like is None else old.to(like)


def check_names(expected: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Raises `AdapterError`, listing names, unless the tensors have exactly the expected ones."""
    expected = set(expected)
    missing = sorted(expected - tensors.keys())
    unexpected = sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise AdapterError(
            f"the adapter was made for another model; missing tensors: "
            f"{', '.join(missing) or 'none'}; unexpected tensors: {', '.join(unexpected) or 'none'}"
        )
