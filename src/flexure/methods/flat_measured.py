"""What is measured of a trained network: geometry, calibration, attacks, and a map of classes.

What a network does not have is recorded with the reason. The measures are those of lower floors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flexure.attacks import PGD, robust_accuracy
from flexure.calling import call_model, evaluating, logits_of, unwritten
from flexure.contracts import DataError, FlexureError
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.measure.kinks import kinks
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
    network = settled(network)
    work = _Measuring(task, task.space.wrap(network), store, report)
    one = next(iter(task.measured_train))[0][:1]
    shape = tuple(one.shape[1:])
    steepest = task.space.steepest
    return {
        "test": work.tried("geometry", lambda: work.geometry("test", task.test, _TEST), {}),
        "train": work.tried(
            "geometry on training data",
            lambda: work.geometry("train", task.measured_train, ("curvature",)),
            {},
        ),
        "robust": work.tried("accuracy under attack", work.robust, None),
        "lipschitz": work.tried(
            "Lipschitz bound", lambda: steepest * float(lipschitz_bound(network, shape).value), None
        ),
        "kinks": work.tried("search for kinks", lambda: kinks(work.model, one.to(task.device)), ()),
        "probabilities": None if task.grid is None else run_on_grid(work.model, task.grid),
        "betas": _values(network, CenteredSoftplus, "beta"),
        "gammas": _values(network, LipschitzBatchNorm, "gamma"),
        "refusals": work.refusals,
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
        for part in torch.split(grid.reshape(-1, grid.shape[-1]), _PART):
            rows.append(logits_of(call_model(model, part)).double().softmax(1).float().cpu())
    return torch.cat(rows).reshape(*grid.shape[:2], -1)


class _Measuring:
    """Measures one model, and notes what it does not have.

    Attributes:
        model: takes inputs in the task's space.
        refusals: what was to be measured -> why the model does not have it.
    """

    def __init__(
        self,
        task: FlatTask,
        model: nn.Module,
        store: str | os.PathLike[str] | None,
        report: Callable[[str, int, int], None],
    ) -> None:
        self._task, self._store, self._report = task, store, report
        self.model = model
        self.refusals: dict[str, str] = {}

    def tried(self, what: str, work: Callable[[], Any], otherwise: Any) -> Any:
        """What the work gives, or `otherwise` where the model does not have it."""
        try:
            return work()
        except DataError:
            raise  # the data are wrong, whatever the network
        except FlexureError as error:
            self.refusals[what] = " ".join(str(error).split())
            return otherwise

    def geometry(self, split: str, batches: Any, measures: tuple[str, ...]) -> dict[str, Any]:
        """Measure -> its values on a split, for those that the model has."""
        task = self._task
        found = measure_model(
            self.model,
            batches,
            names=(split, f"not {split}"),
            measures=measures,
            curvature_samples=task.measured,
            rate_samples=min(task.measured, RATE_SAMPLES),
            noise_samples=min(task.measured, NOISE_SAMPLES),
            seed=task.measure_seed,
            store=None if self._store is None else Path(self._store) / split,
            progress=self._report,
        ).models[0]
        self.refusals |= {f"{what} on {split} data": why for what, why in found.refusals.items()}
        return dict(found.summaries)

    def robust(self) -> Tensor:
        """(n, R) bool: right, and still right under attack, on the first test samples."""
        task = self._task
        inputs, labels, left = [], [], task.measured
        for x, y in task.test:
            inputs.append(x[:left])
            labels.append(y[:left])
            left -= len(labels[-1])
            if not left:
                break
        x, y, size = torch.cat(inputs), torch.cat(labels), len(labels[0])
        found = []
        for done, radius in enumerate(task.radii):
            self._report("attack", done, len(task.radii))
            attacked = robust_accuracy(
                self.model, x, y, attack=ATTACK, norm="l2", eps=radius, seed=task.measure_seed,
                batch_size=size,
            )  # fmt: skip
            found.append(attacked.robust.cpu())
        return torch.stack(found, 1)


def _values(network: nn.Module, kind: type[nn.Module], name: str) -> dict[str, float]:
    return {
        path: float(getattr(module, name).detach())
        for path, module in network.named_modules()
        if isinstance(module, kind)
    }
