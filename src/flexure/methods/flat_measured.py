"""What is measured of a trained network: geometry, calibration, attacks, and a map of classes.

What a network does not have is recorded with the reason. The measures are those of lower floors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexure.attacks import PGD, robust_accuracy
from flexure.calling import call_model, evaluating, logits_of, unwritten
from flexure.contracts import DataError, FlexureError
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.measure.lipschitz import lipschitz_bound
from flexure.methods.flat_task import FlatTask
from flexure.methods.measurements import NOISE_SAMPLES, RATE_SAMPLES, measure_model
from flexure.units.smooth import CenteredSoftplus

__all__ = ["ATTACK", "measured", "run_on_grid", "settled"]

ATTACK = PGD(norm="l2", steps=40)
"""Of the reported accuracies: the papers do not state their steps; the step is 2.5·eps/40."""

_TEST = ("curvature", "rate", "gradient_change", "calibration")
_PART = 4096  # points of the grid at once


def measured(
    task: FlatTask,
    network: nn.Module,
    *,
    store: str | os.PathLike[str] | None,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The fields of `FlatRun` that are measured after training.

    Args:
        task: what all runs share.
        network: the trained network; not changed.
        store: folder for finished batches of measures, or None.
        report: is told (stage, done, total).

    Raises:
        DataError: the data are wrong, whatever the network.
    """
    refusals: dict[str, str] = {}
    network = settled(network)
    model = task.space.wrap(network)

    def tried(what: str, work: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return work()
        except DataError:
            raise
        except FlexureError as error:
            refusals[what] = " ".join(str(error).split())
            return otherwise

    def summaries(name: str, batches: Any, measures: tuple[str, ...]) -> dict[str, Any]:
        found = measure_model(
            model,
            batches,
            names=(name, f"not {name}"),
            measures=measures,
            curvature_samples=task.measured,
            rate_samples=min(task.measured, RATE_SAMPLES),
            noise_samples=min(task.measured, NOISE_SAMPLES),
            seed=task.measure_seed,
            store=None if store is None else Path(store) / name,
            progress=report,
        ).models[0]
        refusals.update({f"{what} on {name} data": why for what, why in found.refusals.items()})
        return dict(found.summaries)

    shape = next(iter(task.measured_train))[0].shape[1:]
    return {
        "test": tried("geometry", partial(summaries, "test", task.test, _TEST), {}),
        "train": tried(
            "geometry on training data",
            partial(summaries, "train", task.measured_train, ("curvature",)),
            {},
        ),
        "robust": tried("accuracy under attack", lambda: _robust(task, model, report), None),
        "lipschitz": tried(
            "Lipschitz bound",
            lambda: float(lipschitz_bound(network, tuple(shape)).value) * task.space.steepest,
            None,
        ),
        "probabilities": None if task.grid is None else run_on_grid(model, task.grid),
        "betas": _values(network, CenteredSoftplus, "beta"),
        "gammas": _values(network, LipschitzBatchNorm, "gamma"),
        "refusals": refusals,
    }


def settled(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are what parametrizations made of them, and nothing else.

    The same function of the input: a spectral norm is not estimated anew for each measure.
    """
    copy = deepcopy(network).eval()
    for module in [m for m in copy.modules() if parametrize.is_parametrized(m)]:
        names = list(cast(nn.ModuleDict, module.parametrizations))
        values = {name: getattr(module, name).detach().clone() for name in names}
        # Not by remove_parametrizations: it changes the class, which the original shares.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    return copy


def run_on_grid(model: nn.Module, grid: Tensor) -> Tensor:
    """(G, G, classes) float32: class probabilities at the (G, G, 2) inputs of a grid."""
    rows = []
    with evaluating(model), unwritten(model), torch.no_grad():
        for part in grid.reshape(-1, grid.shape[-1]).split(_PART):
            rows.append(logits_of(call_model(model, part)).double().softmax(1).float().cpu())
    return torch.cat(rows).reshape(*grid.shape[:2], -1)


def _robust(task: FlatTask, model: nn.Module, report: Callable[[str, int, int], None]) -> Tensor:
    """(n, R) bool: right, and still right under attack, on the first test samples."""
    inputs, labels, left = [], [], task.measured
    for x, y in task.test:
        inputs.append(x[:left])
        labels.append(y[:left])
        left -= len(labels[-1])
        if not left:
            break
    found = []
    for done, radius in enumerate(task.radii):
        report("attack", done, len(task.radii))
        found.append(
            robust_accuracy(
                model,
                torch.cat(inputs),
                torch.cat(labels),
                attack=ATTACK,
                norm="l2",
                eps=radius,
                seed=task.measure_seed,
                batch_size=len(inputs[0]),
            ).robust.cpu()
        )
    return torch.stack(found, 1)


def _values(network: nn.Module, kind: type[nn.Module], name: str) -> dict[str, float]:
    return {
        path: float(getattr(module, name).detach())
        for path, module in network.named_modules()
        if isinstance(module, kind)
    }
