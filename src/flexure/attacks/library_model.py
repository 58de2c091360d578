"""A model as the AutoAttack library calls it: float32 inputs in [0, 1], plain logits.

Also what that library needs besides, and what is told of a model that it cannot judge. Its attacks
are `library`'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flexure.addresses import import_extra
from flexure.attacks.bounded import limits_of
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.norms import unusable
from flexure.calling import check_logits, logits_of, margin
from flexure.contracts import FlexureError

__all__ = ["LibraryModel", "autoattack_library", "default_dtype", "seed_for"]

_RANDOM = 1e-4
"""Two outputs for one input, each of norm 1, that are farther apart than this are random."""

_PROBABILITIES = 1e-5
"""Outputs that are this near to probabilities are taken for them."""


def autoattack_library(part: str | None = None) -> ModuleType:
    """The AutoAttack library, or a module of it.

    Raises:
        MissingExtraError: it is not installed.
    """
    name = "pyautoattack" if part is None else f"pyautoattack.{part}"
    return import_extra(name, install="pip install 'flexure[robust]'")


def seed_for(generator: Generator) -> int:
    """What the library seeds every attack with: the user's own seed, where the harness gives it."""
    if isinstance(generator, SampleGenerators):
        return generator.stream[0]
    return generator.initial_seed()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors are of this dtype unless another is asked for; the library wants float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class LibraryModel:
    """Logits of a model at inputs that are scaled to [0, 1] and laid out as the library wants them.

    The model is called with inputs of its own dtype, in its own range and shape, that it may
    overwrite; the library may overwrite the logits. Bounds of (0, 1) and float32 inputs pass as
    they are, bit by bit.

    Attributes:
        model: gives logits; its attribute `bounds` is finite.
        like: (B, *shape), inputs of the model.
        layout: (side that is filled, whole side) of the square images of one channel that inputs
            are laid out as, features row by row, the rest left unused; None: as they are.
        classes: K, once the model has been called.

    Raises:
        FlexureError: the model has no finite bounds.
    """

    model: nn.Module
    like: Tensor
    layout: tuple[int, int] | None = None
    classes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.dtype = torch.get_default_dtype()
        self.low, self.high = limits_of(self.model, self.like.dtype)
        if not math.isfinite(self.high - self.low):
            raise FlexureError(
                f"expected a model with finite bounds of its inputs, within which attacks of the "
                f"AutoAttack library stay, got {(self.low, self.high)}; wrap it in "
                f"flexure.Bounded(model, mean=..., std=...), which takes pixels in [0, 1], or give "
                f"it other bounds=(lowest, highest)"
            )

    @property
    def scale(self) -> float:
        """How long the bounds' interval is: what a radius is divided by."""
        return self.high - self.low

    def scaled(self, x: Tensor) -> Tensor:
        """Inputs as the library wants them: a new tensor, contiguous."""
        made = x.detach().to(torch.float32, copy=True).contiguous()
        if (self.low, self.high) != (0.0, 1.0):
            made = ((made - self.low) / self.scale).clamp(0, 1)
        if self.layout is None:
            return made
        filled, side = self.layout
        rows = F.pad(made.flatten(1), (0, filled**2 - made[0].numel()))
        return F.pad(rows.view(-1, 1, filled, filled), (0, side - filled, 0, side - filled))

    def restored(self, made: Tensor) -> Tensor:
        """Inputs of the model again: the inverse of `scaled`, up to rounding; may share memory."""
        if self.layout is not None:
            filled = self.layout[0]
            rows = made[:, 0, :filled, :filled].flatten(1)
            made = rows[:, : self.like[0].numel()].view(-1, *self.like.shape[1:])
        if (self.low, self.high) != (0.0, 1.0):
            made = self.low + made * self.scale
        return made.to(self.like.dtype)

    def __call__(self, made: Tensor) -> Tensor:
        """(B, K) float32 logits.

        Raises:
            FlexureError: the output is none.
        """
        if self.classes and not len(made):  # asked for where only draws are left of a batch
            return made.new_zeros(0, self.classes)
        with default_dtype(self.dtype):
            logits = logits_of(self.model(self.restored(made).clone()))
        self.classes = int(logits.shape[-1])
        return logits.clone().float()

    def judge(self, x: Tensor, y: Tensor) -> None:
        """Checks outputs and labels, and warns of outputs that make every attack look weak.

        That is: random ones, and probabilities in the place of logits.

        Args:
            x: (B, ...) as `scaled` makes them.
            y: (B,) labels.

        Raises:
            FlexureError: the outputs are no logits, or labels are none of the classes.
        """
        with torch.no_grad():
            logits = check_logits(self(x), y)
            again = self(x)
        self.classes = logits.shape[1]
        one, other = F.normalize(logits, dim=1), F.normalize(again, dim=1)
        if float((one - other).norm(dim=1).max()) > _RANDOM:
            self.warn(
                "the model's outputs are random: the attack sees other draws than the score, and "
                "the accuracy may be too high; average outputs over draws, or fix them"
            )
        total = (logits.sum(1) - 1).abs().max()
        if -float(logits.min()) < _PROBABILITIES and float(total) < _PROBABILITIES:
            self.warn(
                "the model's outputs are probabilities, whose gradients vanish where it is sure; "
                "let it return logits, before the softmax"
            )

    def judge_gradients(self, x: Tensor, y: Tensor, loss: str) -> None:
        """Warns of samples at which a loss has no gradient that an attack could follow.

        Args:
            x: (B, ...) as `scaled` makes them.
            y: (B,) labels.
            loss: "ce", or another: the margin then, which does not vanish where a network is sure.

        Raises:
            FlexureError: the model cannot be differentiated in its input.
        """
        with torch.enable_grad():
            at = x.detach().clone().requires_grad_()
            logits = self(at)
            ascent = F.cross_entropy(logits, y, reduction="sum") if loss == "ce" else None
            value = -margin(logits, y).sum() if ascent is None else ascent
            if not value.requires_grad:
                raise self._blind()
            (gradient,) = torch.autograd.grad(value, at, allow_unused=True)
        if gradient is None:
            raise self._blind()
        blind = int(unusable(gradient).sum())
        if blind:
            what = "cross-entropy" if loss == "ce" else "margin"
            self.warn(
                f"the gradient of the {what} is zero or not finite at {blind} of {len(x)} samples "
                f"of a batch, where an attack that follows it is blind; see flexure's "
                f"masking_report, and try Square"
            )

    def _blind(self) -> FlexureError:
        return FlexureError(
            "expected a model that can be differentiated in its input, got logits without a graph "
            "to it (detach(), no_grad() or NumPy inside); its gradients say nothing of its "
            "robustness: attack without gradients (Square), or a model that lets them through"
        )

    def warn(self, text: str) -> None:
        """What the harness tells of the attack."""
        warnings.warn(text, UserWarning, stacklevel=2)
