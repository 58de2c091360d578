"""What all trainings of a comparison share: the network's start, its inputs, optimiser, schedule.

One training is `flat_run.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flexure.attacks.bounded import Bounded
from flexure.calling import seeded
from flexure.contracts import Batches, Example, FlexureError
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.train.fit import Schedule
from flexure.units.smooth import CenteredSoftplus

__all__ = ["OPTIMIZERS", "FlatTask", "Network", "Recipe", "Space"]

Network: TypeAlias = "nn.Module | Callable[[int], nn.Module]"
"""A network whose weights are the start of every training; or seed -> a new network."""

OPTIMIZERS: Mapping[str, float] = MappingProxyType({"sgd": 0.1, "adam": 1e-3})
"""Name -> its learning rate where none is given: the paper's, and torch's own."""

_UNDECAYED: Mapping[type[nn.Module], str] = MappingProxyType(
    {CenteredSoftplus: "raw_beta", LipschitzBatchNorm: "raw_gamma"}
)
"""Class -> its parameter that has no weight decay: it has a penalty of its own."""


@dataclass(frozen=True)
class Space:
    """The space that inputs lie in, and how they reach the network.

    Attributes:
        mean: one number a channel, taken off the inputs; None: they reach the network as they are.
        std: what they are divided by then.
        bounds: lowest and highest value of an input, which attacks keep to; None: there are none.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bounds: tuple[float, float] | None = None

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as a model of inputs in this space; its parameters are the network's own."""
        return Bounded(network, mean=self.mean, std=self.std, bounds=self.bounds)

    @property
    def steepest(self) -> float:
        """The Lipschitz constant of what comes before the network."""
        return 1.0 if self.std is None else 1 / min(self.std)


@dataclass(frozen=True)
class Recipe:
    """How every network is trained, whatever the method.

    Attributes:
        epochs: of each training.
        optimizer: a name in `OPTIMIZERS`.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: on all parameters but learned betas and gammas.
        clip: largest norm of the gradient; None: any.
        keep: `"last"` or `"best"`: whose epoch's weights are kept.
    """

    epochs: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    clip: float | None
    keep: str

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise FlexureError(
                f"expected an optimizer (--optimizer) among {', '.join(OPTIMIZERS)}, got "
                f"{self.optimizer!r}; choose one of them"
            )
        _number("a learning rate (--lr)", self.lr, above=0.0)
        _number("a momentum", self.momentum, least=0.0, below=1.0)
        _number("a weight decay (--weight-decay)", self.weight_decay, least=0.0)
        if self.clip is not None:
            _number("a largest gradient norm (--clip)", self.clip, above=0.0)
        if self.keep not in ("last", "best"):
            raise FlexureError(
                f"expected keep (--keep) to be 'last' or 'best', got {self.keep!r}; choose one of "
                f"them"
            )

    def made(self, model: nn.Module) -> Optimizer:
        """The optimiser of a model's trainable parameters.

        Two groups: learned betas and gammas, without weight decay, and all others.
        """
        free = {
            id(parameter)
            for module in model.modules()
            for kind, name in _UNDECAYED.items()
            if isinstance(module, kind) and (parameter := getattr(module, name)) is not None
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in trained if id(p) not in free],
                "weight_decay": self.weight_decay,
            },
            {"params": [p for p in trained if id(p) in free], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class FlatTask:
    """What all runs share.

    Attributes:
        network: where trainings start.
        device: where they run; None: where the network is made.
        space: of the inputs.
        recipe: of the training.
        schedule: factor on the learning rate at each update.
        residual: what becomes of residual sums in LCNNs.
        train: seed -> training batches in that seed's order.
        val: validation batches.
        test: test batches, in an order that is the same for all.
        measured_train: the first training samples, as batches.
        measured: how many samples of test and of training data are measured.
        radii: of the attacks.
        example: an input, on the device.
        grid: (G, G, 2) inputs to give class probabilities of, or None.
        measure_seed: of everything random in measures and attacks.
    """

    network: Network
    device: torch.device | None
    space: Space
    recipe: Recipe
    schedule: Schedule
    residual: str
    train: Callable[[int], Batches]
    val: Batches
    test: Batches
    measured_train: Batches
    measured: int
    radii: tuple[float, ...]
    example: Example
    grid: Tensor | None
    measure_seed: int

    def start(self, seed: int) -> nn.Module:
        """A network to train, which is nobody else's: the same one for the same seed."""
        if isinstance(self.network, nn.Module):
            made = deepcopy(self.network)
        else:
            with seeded(seed):
                made = self.network(seed)
            if not isinstance(made, nn.Module):
                raise FlexureError(
                    f"expected the factory to return a torch.nn.Module, got "
                    f"{type(made).__name__}; return the network"
                )
        return made if self.device is None else made.to(self.device)


def _number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float = float("inf"),
) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    fits = real and value < below and (value > above if above is not None else value >= least)
    if not fits:
        wanted = f"above {above:g}" if above is not None else f"of at least {least:g}"
        limit = "finite" if below == float("inf") else f"below {below:g}"
        raise FlexureError(f"expected {name} {wanted} and {limit}, got {value!r}; choose another")
