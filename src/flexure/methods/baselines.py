"""What Trainable CT is compared with: the probe, the steered probe, and full finetuning.

LoRA is `lora.py`'s; the comparison itself is `tune.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from flexure.contracts import AdapterError, Example
from flexure.methods.finetune import NothingInstalled, Weights, check_names
from flexure.methods.head import HEAD_LEARNING_RATE
from flexure.methods.placing import Maker, UnitMethod
from flexure.methods.settings import check_positive, check_unused
from flexure.surgery.sites import Site
from flexure.units.functional import check_dial
from flexure.units.unit import CTU

__all__ = ["FullFinetune", "LinearProbe", "SteeredProbe"]


@dataclass(frozen=True)
class LinearProbe:
    """Trains the head alone, on the frozen network."""

    name: ClassVar[str] = "linear_probe"
    freezes: ClassVar[bool] = True
    optimizer_settings: ClassVar[Mapping[str, float]] = {}
    learning_rate: ClassVar[float] = HEAD_LEARNING_RATE

    def install(
        self,
        model: nn.Module,
        *,
        example: Example,
        where: Any = None,
        axis: Any = None,
        head: str | None = None,
    ) -> NothingInstalled:
        """Changes nothing.

        Raises:
            FlexureError: `where` or `axis` is given.
        """
        check_unused(self.name, where, axis)
        return NothingInstalled()

    def load(
        self, model: nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> NothingInstalled:
        """Changes nothing.

        Raises:
            AdapterError: the file holds tensors.
        """
        check_names((), tensors)
        return NothingInstalled()


@dataclass(frozen=True)
class SteeredProbe(UnitMethod):
    """Trains the head of a network steered to a constant dial, as Curvature Tuning does.

    Attributes:
        beta: the dial of every site, in [0, 1].
        c: the mixture in [0, 1] (0.5 in the paper), or `"balanced"`.

    Raises:
        FlexureError: beta or c outside [0, 1] or nan.
    """

    name: ClassVar[str] = "steered_probe"
    freezes: ClassVar[bool] = True
    optimizer_settings: ClassVar[Mapping[str, float]] = {}
    learning_rate: ClassVar[float] = HEAD_LEARNING_RATE

    beta: float
    c: float | str = 0.5

    def __post_init__(self) -> None:
        check_dial(self.beta, self.c)

    def maker(self, chosen: tuple[Site, ...]) -> Maker:
        """Units with the constant dial."""

        def make(site: Site, arguments: dict[str, Any]) -> CTU:
            return CTU(**arguments, beta=self.beta, c=self.c)

        return make


@dataclass(frozen=True)
class FullFinetune:
    """Trains every weight, in train mode; the original weights and buffers are kept aside.

    Attributes:
        learning_rate: for every weight but the head's, with Adam.

    Raises:
        FlexureError: the learning rate is not a positive number.
    """

    name: ClassVar[str] = "full_finetune"
    freezes: ClassVar[bool] = False
    optimizer_settings: ClassVar[Mapping[str, float]] = {}

    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)

    def install(
        self,
        model: nn.Module,
        *,
        example: Example,
        where: Any = None,
        axis: Any = None,
        head: str | None = None,
    ) -> Weights:
        """Gives every weight outside the head a copy of its values to train.

        Raises:
            FlexureError: `where` or `axis` is given.
        """
        check_unused(self.name, where, axis)
        weights = Weights(model, head)
        weights.insert()
        return weights

    def load(
        self, model: nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Weights:
        """Gives every weight and buffer outside the head the stored values, in the model's dtype.

        Raises:
            AdapterError: the model has other weights, listed; or the file is damaged.
        """
        weights = Weights(model, structure.get("head"))
        weights.fill(_cast(tensors, weights.tensors()))
        weights.insert()
        return weights


def _cast(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored values in the dtypes of the model's own, finite wherever those are."""
    cast = dict(tensors)
    for name in tensors.keys() & own.keys():
        found, like = tensors[name], own[name]
        if found.shape != like.shape or not (
            found.is_floating_point() and like.is_floating_point()
        ):
            continue
        cast[name] = found.to(like)
        # A mask may hold infinities: those that the model has by itself.
        if bool((~cast[name].isfinite() & like.isfinite()).any()):
            raise AdapterError(
                f"expected {name} to be finite, got other numbers in {like.dtype}: the file is "
                f"damaged, or saved from a wider dtype than the model's"
            )
    return cast
