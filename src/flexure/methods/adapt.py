"""Adapting a pretrained network: a method's parameters and a head, trained, switched, saved.

What a method installs is its own file's, one row of `catalogue.py` each; training is `fit`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from flexure.calling import seeded
from flexure.contracts import AdaptationMethod, Example, FlexureError, InstalledMethod
from flexure.methods.catalogue import check_method
from flexure.methods.groups import ParameterGroup
from flexure.methods.head import HEAD_LEARNING_RATE, Head, copied_head, find_head, fresh_head
from flexure.methods.hub import push_folder
from flexure.methods.in_place import (
    Switch,
    adaptation_in_place,
    adaptations_of,
    forget,
    gradients_arrived,
    mark,
    remember,
)
from flexure.surgery.adapter import AdapterFile, write_adapter
from flexure.surgery.frozen import freeze
from flexure.surgery.wrapped import unwrapped_to_train
from flexure.units.parameterization import saturated_share

__all__ = ["Adaptation", "adapt", "put_in_place"]


def adapt(
    model: nn.Module,
    method: AdaptationMethod,
    *,
    example: Example,
    head: str | None = None,
    classes: int | None = None,
    where: Any = None,
    axis: Any = None,
    name: str = "default",
    seed: int = 42,
) -> Adaptation:
    """Makes `model` ready to be adapted by `method`: only its parameters and a head are trained.

    The model is changed in place and reversibly: `remove()` restores it exactly, weights, buffers,
    modes and hooks included. What is trained is always new: the head a copy of the model's own, or
    a fresh one. Of several adaptations of a model one at a time is in place: this one, until
    another is enabled. One line with the trainable share is printed.

    Args:
        model: a pretrained network; of one that is wrapped (torch.compile, parallel, PEFT) the one
            inside. With PEFT paths are those after a merge, which the adaptation survives, and its
            parameters are frozen as all else (`requires_grad_` afterwards trains both).
            `DistributedDataParallel` is made after adapting.
        method: such as `TrainableCT()`.
        example: one input, to find sites and head with: a tensor, a tuple or a dict.
        head: path of the classification layer; default: the last `nn.Linear`.
        classes: replaces the head, an `nn.Linear`, by a fresh one for so many classes.
        where: which sites or layers the method changes; all by default.
        axis: channel axis of sites where the producing layer does not tell it.
        name: of this adaptation, among those of the model.
        seed: of all initial values that are drawn. Default 42, the paper's first.

    Raises:
        FlexureError: a head that does not exist or is not the model's last layer, a name that is
            taken, a setting that is out of range, or nothing to train. The model is unchanged.
        SiteError: the method finds no site or layer, or one that it cannot change; or the model is
            steered already. The model is unchanged.
    """
    check_method(method)
    model = unwrapped_to_train(model)

    def parts() -> tuple[Head, Callable[[], InstalledMethod]]:
        path = find_head(model, head, example)
        new = (
            copied_head(model, path) if classes is None else fresh_head(model, path, classes, seed)
        )

        def install() -> InstalledMethod:
            with seeded(seed):
                return method.install(model, example=example, where=where, axis=axis, head=path)

        return Head(model, path, new), install

    adaptation = put_in_place(model, method, parts, name=name)
    print(adaptation.share())
    return adaptation


def put_in_place(
    model: nn.Module,
    method: AdaptationMethod,
    parts: Callable[[], tuple[Head, Callable[[], InstalledMethod]]],
    *,
    name: str,
) -> Adaptation:
    """Puts a new adaptation in place of the one that is; on an error nothing changes.

    Args:
        model: the network.
        method: the method.
        parts: makes the head, and what installs the method once that head is in place; called
            while no adaptation is in place.
        name: of the adaptation.

    Raises:
        FlexureError: the name is taken, there is nothing to train, or what `parts` raises.
    """
    before = adaptation_in_place(model)
    if name in adaptations_of(model):
        raise FlexureError(
            f"expected a new name, got {name!r}, which an adaptation of this model has; give name="
            f", or remove() that one (flexure.adaptations: {', '.join(adaptations_of(model))})"
        )
    if before is not None:
        before.disable()
    try:
        head, install = parts()
        adaptation = Adaptation(model, method, head, install, name)
    except BaseException:
        if before is not None:
            before.enable()
        raise
    remember(model, name, adaptation)
    return adaptation


class Adaptation:
    """A model's adaptation: what is trained, and the way back. Made by `adapt`.

    Attributes:
        model: the network.
        method: what it is adapted by.
        name: of this adaptation.
    """

    def __init__(
        self,
        model: nn.Module,
        method: AdaptationMethod,
        head: Head,
        install: Callable[[], InstalledMethod],
        name: str,
    ) -> None:
        self.model, self.method, self.name = model, method, name
        self._head = head
        self._install: Callable[[], InstalledMethod] | None = install
        self._frozen = self._removed = False
        self._undo: ExitStack | None = None
        self._put_in()
        self._total = sum(parameter.numel() for parameter in model.parameters())
        if not self._all():
            self._take_out()
            raise FlexureError(
                f"expected something to train, got none: {method.name} adds no parameter, and the "
                f"head {head.path!r} has none; name another head with head="
            )

    @property
    def head(self) -> str:
        """Path of the head."""
        return self._head.path

    @property
    def active(self) -> bool:
        """Whether it is in place."""
        return self._undo is not None

    @property
    def removed(self) -> bool:
        """Whether the model was restored for good."""
        return self._removed

    @property
    def trainable(self) -> tuple[str, ...]:
        """Full names of what is trained, the head included, as `model.named_parameters()` has them.

        Those of the last time it was in place, if it is not.
        """
        return self._trainable

    @property
    def count(self) -> int:
        """How many numbers are trained, without the head."""
        return _numbers(self._own().values())

    @property
    def saturated(self) -> float:
        """Share of the learned beta and c below 0.01 or above 0.99; 0 where none is learned.

        In the paper's Figs. 5 and 6 they pile up there, which noise alone does too.
        """
        if not self._installed.tensors():
            return 0.0
        return saturated_share(*self.betas().values(), *self.cs().values())

    def parameter_groups(
        self, head_learning_rate: float = HEAD_LEARNING_RATE
    ) -> list[dict[str, Any]]:
        """The trained parameters for any optimiser: the method's, at its own rate, and the head's.

        Args:
            head_learning_rate: the same for every method, so that their comparison is fair;
                default as published for the probe.

        Raises:
            FlexureError: the adaptation is frozen.
        """
        if self._frozen:
            raise FlexureError("expected trainable parameters, got a frozen adaptation: adapt anew")
        own = list(self._own().values())
        head = list(self._head_parameters().values())
        method = {"params": own, "lr": self.method.learning_rate, "name": self.method.name}
        groups: list[dict[str, Any]] = [
            ParameterGroup(method, self.method.optimizer_settings),
            {"params": head, "lr": head_learning_rate, "name": "head"},
        ]
        return [group for group in groups if group["params"]]

    def betas(self) -> dict[str, Tensor]:
        """Site -> its values of beta now, `(channels,)`; empty where the method has none."""
        return dict(self._installed.betas())

    def cs(self) -> dict[str, Tensor]:
        """Site -> its values of c now, likewise."""
        return dict(self._installed.cs())

    def check_gradients(self) -> bool:
        """Whether gradients have arrived, at every parameter that the method has added.

        Called by itself after the first backward through the model's output. Weights of the model
        that full finetuning trains may go unused.

        Raises:
            FlexureError: some trained parameters have a gradient, and some have none.
        """
        own = self._own() if self.method.freezes else {}
        watched = {**own, **self._head_parameters()}
        full = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return gradients_arrived({full.get(id(p), name): p for name, p in watched.items()})

    def enable(self) -> Switch[Adaptation]:
        """Puts it in place of whichever is; also for `with`, which goes back to that one.

        Raises:
            FlexureError: it was removed.
        """
        if self._removed:
            raise FlexureError(f"adaptation {self.name!r} was removed; adapt the model again")
        before = adaptation_in_place(self.model)
        if before is not self:
            if before is not None:
                before.disable()
            try:
                self._put_in()
            except BaseException:
                if before is not None:
                    before.enable()
                raise
        return Switch(self, before)

    def disable(self) -> Switch[Adaptation]:
        """Restores the model exactly, what was learned is kept; also for `with`, which goes back.

        While disabled the model is the original: as fast, and bit-identical.
        """
        before = adaptation_in_place(self.model)
        self._take_out()
        return Switch(self, before)

    def remove(self) -> None:
        """Restores the model exactly, for good; a second call does nothing."""
        self._take_out()
        if not self._removed:
            forget(self.model, self.name)
        self._removed = True

    def freeze(self) -> None:
        """Turns what was learned into constants for deployment; a second call does nothing.

        Units get constant dials, low-rank changes are merged, the head stays; nothing is trainable
        and everything stays in eval mode. Switching, `remove()` and `save()` go on as before: the
        file is the one of the trainable adaptation, and loads as such.
        """
        active = self.active
        self._take_out()
        self._installed.freeze()
        self._frozen = True
        if active:
            self._put_in()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` into the folder `path`.

        They hold what was learned and the head; `flexure.load_adapter(model, path)` restores both
        bit by bit on another copy of the model.

        Raises:
            AdapterError: the folder cannot be written.
        """
        # A predicate is no JSON value; what it chose is in the structure.
        settings = {
            key: None if callable(value) else value for key, value in vars(self.method).items()
        }
        structure = {**self._installed.structure(), "head": self.head}
        tensors = {f"method.{key}": value for key, value in self._installed.tensors().items()}
        tensors |= {f"head.{key}": value for key, value in self._head.tensors().items()}
        write_adapter(path, AdapterFile(self.method.name, settings, structure, tensors))

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> None:
        """Uploads the two files of `save` to the Hugging Face Hub.

        Args:
            repo: `user/name`; made if it does not exist. `load_adapter(model, "hf:user/name")`
                reads it.
            private: whether a new one is.
            token: of the user; default: the one that is logged in.

        Raises:
            MissingExtraError: huggingface_hub is not installed.
            AdapterError: the upload failed.
        """
        push_folder(self.save, repo, private=private, token=token)

    def share(self) -> str:
        """How many numbers are trained, of how many, in one line."""
        head = _numbers(self._head_parameters().values())
        percent = 100 * (self.count + head) / self._total
        return (
            f"trainable: {self.count:,} + {head:,} head of {self._total:,} parameters "
            f"({percent:.2f} %)"
        )

    def __repr__(self) -> str:
        state = "removed" if self._removed else "in place" if self.active else "disabled"
        state = f"frozen, {state}" if self._frozen else state
        return f"Adaptation({self.name!r}, {self.method}, {state}; {self.share()})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise FlexureError(
            "expected a model or a file, got an Adaptation, which is bound to its model and cannot "
            "be pickled or copied; save() it and load_adapter() the folder, or copy the model"
        )

    def _own(self) -> Mapping[str, nn.Parameter]:
        return {} if self._frozen else self._installed.parameters

    def _head_parameters(self) -> dict[str, nn.Parameter]:
        found = {} if self._frozen else self._head.parameters
        return {f"{self.head}.{name}": p for name, p in found.items() if p.is_floating_point()}

    def _all(self) -> list[nn.Parameter]:
        return [*self._own().values(), *self._head_parameters().values()]

    def _put_in(self) -> None:
        """In this order, and out in the reverse: head, method, freezing, mark."""
        if self._undo is not None:
            return
        with ExitStack() as undo:
            if self.method.freezes or self._frozen:
                undo.callback(_set_modes, [(m, m.training) for m in self.model.modules()])
            self._head.insert()
            undo.callback(self._head.withdraw)
            if self._install is not None:
                self._installed, self._install = self._install(), None
            self._installed.insert()
            undo.callback(self._installed.withdraw)
            if self.method.freezes or self._frozen:
                trained = () if self._frozen else (self._head.module,)
                undo.callback(freeze(self.model, trainable=self._all(), following=trained))
            undo.callback(mark(self.model, self))
            self._undo = undo.pop_all()
        chosen = {id(parameter) for parameter in self._all()}
        names = self.model.named_parameters()
        self._trainable = tuple(name for name, p in names if id(p) in chosen)

    def _take_out(self) -> None:
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo.close()


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())
