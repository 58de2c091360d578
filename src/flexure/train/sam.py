"""Sharpness-aware minimisation as an update rule of `flexure.fit`, by pytorch_optimizer's SAM.

The loop around it is `flexure.train.update`'s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from flexure.addresses import import_extra
from flexure.contracts import FlexureError, is_number
from flexure.train.arguments import needs_closure

__all__ = ["SAM"]


@dataclass(frozen=True)
class SAM:
    """The gradient of the step is that at w + e, a way up from the weights w.

    e = rho·g/|g|, the norm over all parameters of the optimiser (Foret et al., Sharpness-aware
    minimization for efficiently improving generalization, 2021); adaptive: e = rho·w²g/|w·g|,
    elementwise (Kwon et al., ASAM, 2021). The optimiser then steps from w. Two gradients an update;
    both start from the same buffers (BatchNorm statistics), and those of the first pass stay. Where
    `fit` clips, it clips both gradients; in several processes both are those of the global batch.

    Performed by `pytorch_optimizer.SAM` (the extra `sam`) around any optimiser, which does not know
    of it: its groups and state are as without, and nothing is kept between updates. The library
    takes the norm in float32 and adds 1e-12 to it: gradients whose norm is not far above that move
    the weights less.

    Attributes:
        rho: the length of e (adaptive: relative to the weights); default of Foret et al. For the
            adaptive form Kwon et al. take about ten times as much.
        adaptive: see above.

    Raises:
        FlexureError: `rho` is not positive and finite, or `adaptive` no bool.
        FlexureError: when called, the optimiser's step needs a closure (LBFGS).
        MissingExtraError: when called, pytorch_optimizer is not installed.

    Example:
        >>> import torch
        >>> from flexure.train import SAM, fit
        >>> x, y = torch.randn(8, 4), torch.arange(8) % 2
        >>> history = fit(torch.nn.Linear(4, 2), [(x, y)], epochs=1, seed=0, update=SAM())
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not (is_number(self.rho) and 0 < self.rho < math.inf):
            raise FlexureError(
                f"expected rho above 0, a finite length, got {self.rho!r}; take 0.05"
            )
        if not isinstance(self.adaptive, bool):
            raise FlexureError(
                f"expected adaptive to be True or False, got {self.adaptive!r}; take False for the "
                f"plain form, whose rho is a length"
            )

    def __call__(self, backward: Callable[[], float], optimizer: Optimizer) -> float:
        """One update; see `flexure.contracts.UpdateRule`."""
        if needs_closure(optimizer):
            raise FlexureError(
                f"expected an optimiser that steps once a gradient, got "
                f"{type(optimizer).__name__}, whose step needs a closure; give fit another one, "
                f"such as torch.optim.SGD, or leave SAM out"
            )
        library = import_extra("pytorch_optimizer", install="pip install 'flexure[sam]'")
        # Groups of its own, of the same parameters: it writes its settings into them.
        groups = [{"params": list(group["params"])} for group in optimizer.param_groups]

        def around(groups: list[dict[str, Any]]) -> _Around:
            return _Around(groups, optimizer)

        value = backward()
        library.SAM(groups, around, rho=self.rho, adaptive=self.adaptive).step(backward)
        return value


class _Around:
    """What pytorch_optimizer's SAM takes for its optimiser: groups and state of its own."""

    def __init__(self, groups: list[dict[str, Any]], optimizer: Optimizer) -> None:
        self.param_groups = groups
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._optimizer = optimizer

    def step(self) -> None:
        self._optimizer.step()
