"""Adversarial training: the inputs of a training step, attacked at the current weights.

The attack itself is `pgd`'s or another's; the training loop is `flexure.fit`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexure.attacks.bounded import Bounded, check_bounds, check_within, limits_of
from flexure.attacks.checks import check_attack, checked
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.norms import check_eps
from flexure.attacks.pgd import PGD
from flexure.calling import unwritten
from flexure.contracts import Attack, FlexureError, Step
from flexure.measuring import constant_parameters, unchanged_randomness

__all__ = ["Adversarial"]


@dataclass(frozen=True)
class Adversarial:
    """Replaces a step's inputs by adversarial ones: `fit(..., perturb=Adversarial(eps=0.1))`.

    Training then minimises the loss at max_{‖x' − x‖ <= eps} cross-entropy(x') (Madry et al. 2018),
    the maximum as far as the attack finds it. The model is attacked as it is trained: in its mode,
    at its current weights; what its calls write into it (the statistics of BatchNorm) is put back,
    and no parameter gets a gradient. The step's own dropout masks are those that it would have
    drawn without an attack. Draws depend on the step's seed and number and on each
    sample's position, not on the processes.

    Attributes:
        attack: "last" is what PGD keeps here by default, which costs `steps` calls of the model.
            The default, three steps in l2, and `eps` are the baseline of Srinivas et al. 2022.
        eps: the radius, in units of the model's input.
        bounds: (lowest, highest) value of the inputs; None: the model's attribute `bounds`, and
            without one there are none.

    Raises:
        FlexureError: a setting that does not fit; when called, inputs that are no floating-point
            tensor within the bounds, or an attack that returns no finite inputs.
    """

    attack: Attack = field(default_factory=lambda: PGD(norm="l2", steps=3, keep="last"))
    eps: float = 0.1
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_attack(self.attack)
        check_bounds(self.bounds)

    def __call__(self, step: Step) -> Tensor:
        """(B, *shape) within eps of `step.x` and the bounds, without a graph."""
        x = step.x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise FlexureError(
                f"expected inputs that are a floating-point tensor, got "
                f"{x.dtype if isinstance(x, Tensor) else type(x).__name__}; attack a model of one"
            )
        model = step.model
        if self.bounds is not None:
            model = Bounded(model, bounds=self.bounds)
        limits = limits_of(model, x.dtype)
        check_within(x, limits)
        if self.eps == 0:
            return x.detach()
        generator = SampleGenerators((step.seed, step.index), step.positions)
        with ExitStack() as stack:
            stack.enter_context(unchanged_randomness(x.device))
            stack.enter_context(unwritten(step.model))
            stack.enter_context(constant_parameters(step.model))
            stack.enter_context(torch.enable_grad())
            found = self.attack.run(model, x.detach(), step.y, eps=self.eps, generator=generator)
        name, norm = type(self.attack).__name__, self.attack.norm
        return checked(found, name, x.detach(), norm=norm, eps=self.eps, limits=limits)
