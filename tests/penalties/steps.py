"""Steps as the training loop makes them, without a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import Penalty
from flexure.processes import Processes
from flexure.train.arguments import cross_entropy
from flexure.train.step import Run, TrainingStep, shares
from flexure.train.update import Objective


def step_of(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    index: int = 0,
    epoch: int = 10,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    autocast: tuple[str, torch.dtype] | None = None,
    seed: int = 7,
) -> TrainingStep:
    run = Run(model.train(), 20, seed, Processes(), None, autocast, loss, True)
    (step,) = shares([(x, y)], run, index=index, epoch=epoch)
    return step.fresh()


def objective(model: nn.Module, penalty: Penalty, x: Tensor, y: Tensor, weight: float) -> Tensor:
    """Loss plus weighted penalty, as the loop adds them up."""
    whole = Objective({"it": (penalty, weight)})
    return whole.total(whole.parts(step_of(model, x, y)))


def labelled(count: int = 6, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, *(shape or (3,)), generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 3
