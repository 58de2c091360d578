"""Errors, the protocols of every extension point, and what counts as a number.

Nothing here computes. Every other module may import this one; it imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Generator, Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "AdaptationMethod",
    "AdapterError",
    "AddressError",
    "Attack",
    "Batches",
    "BudgetError",
    "DataError",
    "DataLoader",
    "Example",
    "FlexureError",
    "InstalledMethod",
    "LabelledData",
    "LoadedModel",
    "Measure",
    "MissingExtraError",
    "ModelLoader",
    "Penalty",
    "Perturbation",
    "RecipeConfig",
    "SiteError",
    "Step",
    "UpdateRule",
    "is_number",
]

Example: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"
"""What a model is called with: one tensor, positional arguments, or keyword arguments."""

Batches: TypeAlias = "Iterable[tuple[Any, Tensor]]"
"""Any iterable of `(x, y)`; `x` is an `Example`, `y` a `(B,)` integer tensor of labels."""


class FlexureError(ValueError):
    """A mistake that the caller can mend. The message says expected, got and remedy."""


class SiteError(FlexureError):
    """An activation site that is missing, ambiguous, or cannot be steered."""


class DataError(FlexureError):
    """Data that cannot be used: empty, one class, non-finite, labels out of range."""


class AddressError(FlexureError):
    """A model or data address that cannot be resolved."""


class AdapterError(FlexureError):
    """An adapter file that is damaged, foreign, or made for another model."""


class BudgetError(FlexureError):
    """A memory budget that not even one sample fits.

    Attributes:
        needed: bytes that would do; 0: not known.
    """

    def __init__(self, message: str, needed: int = 0) -> None:
        super().__init__(message)
        self.needed = needed


class MissingExtraError(FlexureError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


def is_number(value: object) -> bool:
    """Whether a setting is a real number, which no truth value, string or tensor is."""
    return isinstance(value, Real) and not isinstance(value, bool)


@runtime_checkable
class LabelledData(Protocol):
    """A finite, indexable, labelled data set.

    Items are unprocessed: images are `(C, H, W)` uint8 tensors (sizes may differ between items),
    vectors are `(D,)` float32 tensors. A model's own preprocessing turns them into its input.
    """

    @property
    def labels(self) -> Tensor:
        """`(N,)` int64, in `range(len(classes))`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """One name a class."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with what is needed to feed it.

    Attributes:
        model: the network, in eval mode.
        preprocess: one unprocessed item (see `LabelledData`) -> one model input, without the
            batch dimension. The backbone's own preprocessing, never the data set's statistics.
        address: where it came from.
        head: path of the classification layer, if the source knows it.
    """

    model: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    address: str
    head: str | None = None


class ModelLoader(Protocol):
    """Loads what stands behind a model address prefix; `rest` is the text after the colon."""

    def __call__(self, rest: str) -> LoadedModel:
        """Loads it, or raises `AddressError`."""
        ...


class DataLoader(Protocol):
    """Loads what stands behind a data address prefix, as named splits.

    The key `"train"` is always there; `"validation"` and `"test"` where the source has them.
    """

    def __call__(self, rest: str) -> dict[str, LabelledData]:
        """Loads it, or raises `AddressError` or `DataError`."""
        ...


class RecipeConfig(Protocol):
    """A frozen configuration of one experiment; `small()` runs everywhere in minutes."""

    @classmethod
    def small(cls) -> RecipeConfig:
        """The configuration that runs everywhere in under two minutes."""
        ...


class Measure(Protocol):
    """A number, or several, for each sample: `flexure.curvature` with its model bound, say.

    No mean is taken inside: a sample's values do not depend on the others in its batch.
    """

    def __call__(self, x: Any, y: Tensor, /, *, generator: Generator) -> Any:
        """The values of a batch, a `PerSample`. A measure without labels does not take `y`.

        Args:
            x: the inputs, an `Example` of B samples.
            y: (B,) labels.
            generator: of the CPU; everything random is drawn from it.
        """
        ...


class Step(Protocol):
    """One training step, as penalties and perturbations see it.

    With several processes, or with gradient accumulation, it is one process's share of one batch.

    Attributes:
        model: the network, in train mode.
        x: the inputs, perturbed if a perturbation is given.
        y: (B,) int64 labels, or whatever the loss takes.
        positions: (B,) int64, each sample's place in the global batch.
        index: the update that this is, from 0.
        epoch: from 0.
        epochs: of the whole run.
        seed: of the run. What a penalty draws, it draws from this, `index` and `positions`, so
            that the number of processes does not change it.
    """

    model: nn.Module
    x: Any
    y: Tensor
    positions: Tensor
    index: int
    epoch: int
    epochs: int
    seed: int

    @property
    def output(self) -> Any:
        """`model(x)`, computed once for the loss and every penalty, with its graph."""
        ...

    def input_gradient(self, x: Tensor | None = None) -> Tensor:
        """Row i: the gradient of sample i's loss in its input, with its graph.

        That is B times the gradient of the loss of `fit`, a mean over B samples. Where `y` is
        `(B,)` integers, samples labelled -100, which do not count in the mean, have rows of 0, and
        the others are scaled by the number of those that count. No other label is known to be
        left out: with a loss of another `ignore_index` all B samples are taken to count. A layer
        that couples samples (BatchNorm in train mode) is differentiated as it is: row i is then
        the gradient of the sum of all samples' losses in input i.

        Args:
            x: (B, *shape), what stands in the place of the one floating-point tensor in `step.x`:
                costs a forward pass, the same function as the first one (what the layers draw is
                the same), of which nothing stays in the model. None: at `step.x`, from
                `step.output`; computed once for all penalties.

        Returns:
            (B, *shape).

        Raises:
            FlexureError: no penalty of this training says `needs_input_gradient`; `step.x` does
                not have exactly one floating-point tensor, or the loss does not depend on it.
        """
        ...

    def global_mean(self, values: Tensor) -> Tensor:
        """Mean of (B, ...) values over dimension 0 and over all processes' samples.

        Its gradient is this process's part: averaged over processes as the loop does, it is the
        gradient of any function of the global mean.

        Accumulated batches are not taken together: the mean is that of this step's batch. A
        penalty that is not linear in it (its root, say) is then the mean of the batches' penalties
        and not the penalty of all their samples; larger batches are the remedy.
        """
        ...

    def global_max(self, values: Tensor) -> Tensor:
        """Largest of (B,) values and of all processes' samples, a scalar without a graph."""
        ...


class Penalty(Protocol):
    """Something that training keeps small besides the loss.

    One that calls `step.input_gradient` says so by a class attribute `needs_input_gradient = True`:
    the input must ask for a gradient before the loop calls the network.
    """

    def __call__(self, step: Step) -> Tensor:
        """The unweighted penalty, a scalar that does not grow with the batch."""
        ...


class Perturbation(Protocol):
    """A change of the inputs before each training step, such as an attack."""

    def __call__(self, step: Step) -> Any:
        """The changed `step.x`; `step.output` must not be used."""
        ...


class Attack(Protocol):
    """A search for inputs near x that a model gets wrong: a frozen dataclass of its settings.

    The harness (`flexure.robust_accuracy`) projects what it returns, checks it and scores it again.
    """

    @property
    def norm(self) -> str:
        """The norm that the radius is meant in: a row of `attacks.norms.NORMS`."""
        ...

    def run(
        self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float, generator: Generator
    ) -> Tensor:
        """Changed inputs (B, *shape), a new tensor.

        Args:
            model: gives logits (B, classes); its attribute `bounds`, if it has one, is the
                (lowest, highest) value of its inputs.
            x: (B, *shape), not to be changed.
            y: (B,) int64 labels.
            eps: the radius, above 0, in units of x.
            generator: of the CPU; everything random is drawn from it.
        """
        ...


class UpdateRule(Protocol):
    """How one update uses gradients: once (plain), or several times (SAM)."""

    def __call__(self, backward: Callable[[], float], optimizer: Optimizer) -> float:
        """Performs one update.

        Args:
            backward: at the current weights, replaces every `.grad` by the gradient of the
                objective over the global batch, clipped, and returns the objective. Each call
                starts from the buffers before the update (BatchNorm's statistics, the vectors of
                spectral norms), so that all are one function of the weights; those of the first
                call stay, for further ones are made at weights that no one keeps.
            optimizer: to be stepped.

        Returns:
            The objective at the weights before the update.
        """
        ...


class InstalledMethod(Protocol):
    """What an adaptation method has put into a model. Made by `AdaptationMethod.install`.

    The harness (`flexure.adapt`) takes care of the head, of freezing, of names and of files.
    """

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters without the head, by a name that means the same in a copy."""
        ...

    def insert(self) -> None:
        """Puts the same parameters back in place after `withdraw`; in place: does nothing."""
        ...

    def withdraw(self) -> None:
        """Restores the model exactly, keeping what was learned; withdrawn: does nothing."""
        ...

    def freeze(self) -> None:
        """Turns what was learned into constants; afterwards `parameters` is empty."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """What a file must hold to restore it bit by bit."""
        ...

    def structure(self) -> Mapping[str, Any]:
        """Where things are, as JSON values: sites or layers by path."""
        ...

    def betas(self) -> Mapping[str, Tensor]:
        """Site -> the values of beta now, `(channels,)`, detached; empty where there are none."""
        ...

    def cs(self) -> Mapping[str, Tensor]:
        """Site -> the values of c now, likewise."""
        ...


class AdaptationMethod(Protocol):
    """A way to adapt a pretrained network: a frozen dataclass of JSON values, its settings."""

    @property
    def name(self) -> str:
        """Its row in the catalogue of methods, and in adapter files; a class attribute."""
        ...

    @property
    def freezes(self) -> bool:
        """Whether all but its parameters and the head stays as it is; a class attribute."""
        ...

    @property
    def learning_rate(self) -> float:
        """For its parameters, with Adam; `parameter_groups()` carry it."""
        ...

    @property
    def optimizer_settings(self) -> Mapping[str, float]:
        """What their group sets for Adam and its kin besides the rate; empty for most methods."""
        ...

    def install(
        self, model: nn.Module, *, example: Example, where: Any, axis: Any, head: str | None
    ) -> InstalledMethod:
        """Puts it into `model` outside the module at path `head`; on an error nothing changes."""
        ...

    def load(
        self, model: nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> InstalledMethod:
        """Puts a stored one into `model`, bit by bit.

        Raises:
            AdapterError: the model has other sites or layers; the missing and the unexpected ones
                are listed, and the model is unchanged.
        """
        ...
