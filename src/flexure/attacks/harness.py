"""One batch under one attack: whatever the attack returns is projected, checked and scored again.

Which samples are attacked, in which batches and by which process, is `rounds`'s business.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexure.attacks.checks import allowed, checked
from flexure.attacks.draws import SampleGenerators, normal, seed_of, uniform
from flexure.attacks.intact import intact
from flexure.attacks.library_model import default_dtype
from flexure.attacks.norms import norm_named, precise, project
from flexure.attacks.robustness import distinct
from flexure.attacks.warned import warned
from flexure.calling import check_logits, evaluating, logits_of, unwritten
from flexure.contracts import Attack, FlexureError

__all__ = ["Found", "Harness"]


@dataclass(frozen=True)
class Found:
    """What one attack found for the b samples of one batch; on the CPU.

    Attributes:
        x_adv: (b, *shape), within the ball and the bounds.
        right: (b,) bool, whether the model's prediction there is the label.
        seconds: that it took.
        warnings: that were given, each once.
    """

    x_adv: Tensor
    right: Tensor
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Harness:
    """A model, and the ball that attacks on it stay within.

    Attributes:
        model: gives logits; in the state of `measuring`.
        norm: of the ball.
        eps: its radius.
        limits: the lowest and the highest value of inputs.
        seed: the user's.
    """

    model: nn.Module
    norm: str
    eps: float
    limits: tuple[float, float]
    seed: int

    def scored(self, x: Tensor, y: Tensor, *, index: int, numbers: Tensor) -> Tensor:
        """What the model says at given inputs, once it takes them.

        Args:
            x: (b, *shape).
            y: (b,) labels.
            index: of the batch.
            numbers: (b,) the samples' places in all data.

        Returns:
            (b, 3) float64 on the CPU: 1 where the prediction is the label, otherwise 0; the
            label's logit minus the largest other; and the largest absolute logit.

        Raises:
            FlexureError: the model does not take them, or gives logits that are none or not finite.
        """
        self._start(0, index)
        try:
            logits = self._logits(x, y)
        except (FlexureError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise FlexureError(
                f"expected a model that takes inputs {tuple(x.shape)} of {x.dtype}, got an error "
                f"({error}); give inputs of the model's shape and dtype"
            ) from error
        known = logits.isfinite().all(1)
        if not bool(known.all()):
            at = int(numbers[(~known).nonzero()[0]])
            raise FlexureError(
                f"expected finite logits at the given inputs, got others at sample {at}; mend the "
                f"model or the inputs"
            )
        return _scores(logits, y)

    def scored_near(self, x: Tensor, y: Tensor, *, index: int, numbers: Tensor) -> Tensor:
        """The same where attacks look: at one point near each input, always the same one.

        Logits may be others than finite there.
        """
        self._start(0, index)
        return _scores(self._logits(self.near(x, numbers), y), y)

    def near(self, x: Tensor, numbers: Tensor) -> Tensor:
        """(b, *shape), a random point of the ball and the bounds for each of these samples."""
        generator = SampleGenerators((self.seed, -1), numbers)
        norm = norm_named(self.norm)
        point = norm.point(normal(x.shape, generator), uniform(x.shape[:1], generator))
        changed = precise(x) + self.eps * point.to(precise(x))
        return project(changed, x, norm=self.norm, eps=self.eps, limits=self.limits)

    def attacked(
        self, attack: Attack, x: Tensor, y: Tensor, *, place: int, index: int, numbers: Tensor
    ) -> Found:
        """What one attack finds for one batch; the model is as before.

        Args:
            attack: any.
            x: (b, *shape).
            y: (b,) labels.
            place: of the attack among those of the evaluation.
            index: of the batch among those of the attack.
            numbers: (b,) the samples' places in all data.

        Raises:
            FlexureError: the attack returns something else than finite inputs, or has changed the
                model.
        """
        name, told = type(attack).__name__, list[str]()
        generator = SampleGenerators((self.seed, place), numbers)
        self._start(1 + place, index)
        begun = time.perf_counter()
        with _own_flags(), warned(told), intact(self.model, name):
            made = attack.run(self.model, x.clone(), y.clone(), eps=self.eps, generator=generator)
        x_adv = self.accepted(made, name, x)
        right, _ = _right(self._logits(x_adv, y), y)
        return Found(x_adv.cpu(), right.cpu(), time.perf_counter() - begun, distinct(told))

    @property
    def searches(self) -> bool:
        """Whether attacks have anything to search: without a radius there is only x."""
        return self.eps > 0

    def accepted(self, made: Any, name: str, x: Tensor) -> Tensor:
        """What an attack returned, within the ball and the bounds: `checks.checked`."""
        return checked(made, name, x, norm=self.norm, eps=self.eps, limits=self.limits)

    def accepts(self, x_adv: Tensor, x: Tensor) -> bool:
        """Whether inputs of the right shape may be what was accepted of an attack on x."""
        return allowed(x_adv, x, norm=self.norm, eps=self.eps, limits=self.limits)

    def _logits(self, x: Tensor, y: Tensor) -> Tensor:
        with evaluating(self.model), unwritten(self.model), torch.no_grad():
            return check_logits(logits_of(self.model(x.clone())), y)

    def _start(self, stage: int, index: int) -> None:
        """Seeds the global generators for one batch, whichever process it falls to, and when."""
        seed = seed_of([self.seed % 2**64, stage, index, 1])
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)


@contextmanager
def _own_flags() -> Iterator[None]:
    """Puts back what attacks may leave set for all of torch: gradients, and the default dtype."""
    with torch.enable_grad(), default_dtype(torch.get_default_dtype()):
        yield


def _scores(logits: Tensor, y: Tensor) -> Tensor:
    """(b, 3), see `Harness.scored`."""
    z, own = logits.cpu().double(), y.cpu()[:, None]
    lead = (z.gather(1, own) - z.scatter(1, own, -torch.inf).amax(1, keepdim=True)).squeeze(1)
    right, _ = _right(logits, y)
    return torch.stack([right.cpu().double(), lead, z.abs().amax(1)], 1)


def _right(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) whether predictions are labels, and whether logits are finite."""
    known = logits.isfinite().all(1)
    return known & (logits.argmax(1) == y), known
