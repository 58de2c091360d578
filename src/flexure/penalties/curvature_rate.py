"""The penalty on the curvature rate: the ratio of second to first derivatives along directions.

The derivatives are `flexure.measure.jets`', the probability is `flexure.measure.probability`'s.
The measure of the same name, over more orders and directions, is `flexure.curvature_rate`.

[CR] is The Curvature Rate λ (Poschl, 2025, arXiv:2511.01438).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from flexure.calling import call_model, evaluating, logits_of, map_tensors, unwritten
from flexure.contracts import FlexureError, Step
from flexure.measure.fields import point_of
from flexure.measure.jets import taylor_coefficients
from flexure.measure.probability import Odds
from flexure.measure.propagate import primal_of
from flexure.measuring import twice_differentiable, uncompiled
from flexure.penalties.scripted import refuse_scripted

__all__ = ["CurvatureRate"]

_BLOCK = 64
"""Samples whose directions are drawn at once: what a sample gets must not depend on the others."""


@dataclass(frozen=True)
class CurvatureRate:
    """v_2/v_1, the penalty CRR of [CR]: the exponential of the slope of log v_n over two orders.

    v_n is the root mean square over the global batch of D^n f(x)[v, ..., v], neither normalised
    nor calibrated for the dimension. f is the predicted probability of the class that is largest
    at x, which is held; of a model with one output, that output. Each sample has one unit
    direction v, fresh in every update, which depends on the run's seed, the update and the
    sample's place in the global batch alone.

    f is the network in eval mode, which treats each sample by itself: BatchNorm with its running
    statistics, held constant, and no dropout; parametrized weights are as they are in training,
    since they see no samples. It is computed in the precision of the inputs, also where `fit`
    computes in bfloat16, and compiled networks run as Python. Where v_1 or v_2 is 0 to rounding at
    all samples, the penalty is 0 and has no gradient. Costs one forward pass that carries three
    tensors.

    Attributes:
        default_weight: of [CR].
    """

    default_weight: ClassVar[float] = 0.03

    def __call__(self, step: Step) -> Tensor:
        """The penalty, a scalar.

        Raises:
            FlexureError: the network has kinks (ReLU, max-pooling) or another operation without
                such derivatives, which is named; its output does not depend on the input, or is
                affine in it; or a part of it was made by torch.jit.
        """
        refuse_scripted(step.model, "CurvatureRate")
        x = map_tensors(step.x, torch.Tensor.detach)
        point = point_of(x)
        first, second, log_scale = _derivatives(step.model, x, unit_directions(step, point))
        # In float64: squares of the derivatives of a sure network leave float32.
        derivatives = torch.stack([first, second], 1).double()
        # What all are divided by cancels: the largest is 1, however sure the network is.
        size = log_scale + derivatives.detach().abs().amax(1).log()
        largest = step.global_max(size)
        scale = torch.where(size.isneginf(), 0.0, log_scale - largest).exp()[:, None]
        squares = (derivatives * scale).square()
        mean_first, mean_second = step.global_mean(squares).unbind()
        defined = (mean_first > 0) & (mean_second > 0)
        # Inside, too: the slope of the root at 0 would spoil the gradient of the other branch.
        ratio = torch.where(defined, mean_second, 1.0) / torch.where(defined, mean_first, 1.0)
        return torch.where(defined, ratio.sqrt(), 0.0).to(point.dtype)


def unit_directions(step: Step, point: Tensor) -> Tensor:
    """(B, *shape): a unit direction for each sample, of its place in the global batch.

    Args:
        step: its seed, index and positions are used.
        point: (B, *shape), of whose dtype and on whose device they are.
    """
    positions = step.positions.cpu()
    blocks = positions // _BLOCK
    drawn = torch.empty(len(point), *point.shape[1:])
    for block in sorted(set(blocks.tolist())):
        entropy = np.random.SeedSequence([step.seed % 2**64, step.index, block, _BLOCK])
        seed = int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))
        generator = torch.Generator().manual_seed(seed)
        rows = blocks == block
        all_of_block = torch.randn(_BLOCK, *point.shape[1:], generator=generator)
        drawn[rows] = all_of_block[positions[rows] % _BLOCK]
    drawn = drawn.to(point)
    drawn /= drawn.flatten(1).norm(dim=1).view(-1, *[1] * (point.dim() - 1))
    return drawn


def _derivatives(model: nn.Module, x: Any, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Df[v] and D²f[v, v], (B,) each up to sign, and (B,) logs of what they are to be scaled by."""
    point = point_of(x)
    field = _Field(model, x, point)
    with (
        _one_by_one(model),
        unwritten(model, differentiated=True),
        twice_differentiable(),
        uncompiled(),
    ):
        found, computed = taylor_coefficients(field, point, v, order=2)
    for order, what in ((1, "independent of"), (2, "affine in")):
        if not computed[order]:
            raise FlexureError(
                f"expected a network whose curvature in the input can change, got one whose output "
                f"is {what} it; leave the penalty CurvatureRate out"
            )
    return found[1], 2 * found[2], field.log_scale


@contextmanager
def _one_by_one(model: nn.Module) -> Iterator[None]:
    """Eval mode, but for parametrizations of weights, which see no samples.

    Spectral norms converge in eval mode, which costs many steps, and would after each update.
    """
    with evaluating(model):
        for module in model.modules():
            if isinstance(module, ParametrizationList):
                module.train()
        yield


class _Field:
    """As `flexure.measure.probability.probability_field`, at the point of its first call.

    The class that is largest there, and the scale, are taken from that pass itself.
    """

    def __init__(self, model: nn.Module, x: Any, point: Tensor) -> None:
        self.log_scale = torch.zeros(len(point), dtype=torch.float64, device=point.device)
        self._model, self._x, self._point = model, x, point

    def __call__(self, inputs: Tensor) -> Tensor:
        example = map_tensors(self._x, lambda leaf: inputs if leaf is self._point else leaf)
        z = logits_of(call_model(self._model, example))
        if z.dim() != 2 or z.shape[1] == 1:
            return z  # of another shape than one output a sample: refused by jets
        odds = Odds(primal_of(z))
        self.log_scale = odds.log_scale
        return odds(z)
